"""A driver that follows a growing volume is killed at any moment: what it had done stays, and the end is one run's."""

from __future__ import annotations

import random
import time
from pathlib import Path

import zarr

from nrrn_pipeline import Layout, Options, denoise, storage, verify
from nrrn_pipeline.ledger import Ledger
from tests.faults.drivers import nursery
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(2, 64, 64), shard=(4, 64, 64), tile=64)
WORDS = ("--chunk", "2,64,64", "--shard", "4,64,64", "--tile", "64", "--device", "cpu", "--cluster", "serial")
FOLLOW = ("--follow", "--every", "0.05", "--settle", "0.1")
SLICES, KILLS = 101, 8


def records(output: Path) -> dict[str, bytes | None]:
    folder = f"{output}/0/nrrn/slabs"
    return {name: storage.read_file(f"{folder}/{name}") for name in storage.list_sizes(folder)}


def test_kills_of_a_driver_that_follows_cost_no_slab_that_was_done(tmp_path: Path) -> None:
    rng, voxels = random.Random(4), image_like((SLICES, 64, 128))
    weights, whole = tiny_weights(tmp_path / "w.safetensors"), bare_zarr(tmp_path / "whole.zarr", voxels)
    denoise(whole, tmp_path / "once.zarr", weights, Options(layout=LAYOUT, cluster="serial", device="cpu"))
    raw, out = tmp_path / "raw.zarr", tmp_path / "out.zarr"
    array = zarr.create_array(raw, shape=(1, 64, 128), chunks=(1, 64, 64), dtype="uint8")
    array[:] = voxels[:1]
    command = ("denoise", "raw.zarr", "out.zarr", "--weights", "w.safetensors", *WORDS)
    done: dict[str, bytes | None] = {}
    with nursery(tmp_path) as drivers:
        for _ in range(KILLS):
            driver = drivers.start(tmp_path, *command, *FOLLOW)
            until = time.monotonic() + rng.uniform(0.3, 1.5)
            while time.monotonic() < until and driver.poll() is None:
                start = array.shape[0]
                stop = min(SLICES, start + rng.randrange(4))
                if stop > start:
                    array.resize((stop, 64, 128))
                    array[start:stop] = voxels[start:stop]
                time.sleep(0.05)
            assert driver.poll() is None, driver.err  # it follows until it is killed
            driver.kill()
            now = records(out)
            assert done.items() <= now.items()  # none was done again
            done = now
        assert done, "it was killed before it did anything: not much of a test"
        start = array.shape[0]
        array.resize((SLICES, 64, 128))
        array[start:] = voxels[start:]
        last = drivers.start(tmp_path, *command)
        assert last.wait() == 0, last.err
    assert done.items() <= records(out).items()
    assert stored_chunks(out / "0") == stored_chunks(tmp_path / "once.zarr/0")
    assert verify(out, deep=True) == []
    assert len(Ledger(f"{out}/0").done()) == 26 * 2
