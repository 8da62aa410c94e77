"""A disk that fills up, or turns read-only, ends a run in one line; with more room the same command ends whole."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nrrn_pipeline import Layout, Options, RunError, RunWatch, denoise, presence, verify
from nrrn_pipeline.progress import Progress
from tests.faults.drivers import Nursery, nursery
from tests.support import bare_zarr, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 32, 32), shard=(4, 64, 64), tile=64)
WORDS = ["--chunk", "4,32,32", "--shard", "4,64,64", "--tile", "64", "--device", "cpu"]
OPTIONS = Options(layout=LAYOUT, cluster="serial", device="cpu")
SLABS = 24


@dataclass(frozen=True)
class Noise:
    """A volume that does not compress, weights, and what an undisturbed run makes of them."""

    source: Path
    weights: Path
    chunks: dict[str, bytes]

    def words(self, output: Path, cluster: str) -> list[str]:
        inputs = [str(self.source), str(output), "--weights", str(self.weights)]
        return ["denoise", *inputs, *WORDS, "--cluster", cluster, "--workers", "2"]

    def assert_whole(self, output: Path) -> None:
        assert stored_chunks(output / "0") == self.chunks
        assert verify(output, deep=True) == []


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Noise:
    folder = tmp_path_factory.mktemp("full")
    voxels = np.random.default_rng(0).integers(0, 256, (24, 128, 128), dtype=np.uint8)
    source, weights = bare_zarr(folder / "in.zarr", voxels), tiny_weights(folder / "w.safetensors", channels=1)
    assert denoise(source, folder / "whole.zarr", weights, OPTIONS).slabs == SLABS
    return Noise(source, weights, stored_chunks(folder / "whole.zarr/0"))


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("drivers")) as started:
        yield started


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def assert_names_the_full_disk(err: str) -> None:
    (line,) = [line for line in err.splitlines() if line.startswith("nrrn: ")]
    assert "No space left on device" in line
    assert "run the same command again to go on" in line
    assert "Traceback" not in err


@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_more_room_lets_it_finish(
    small_disk: Path, noise: Noise, drivers: Nursery, cluster: str
) -> None:
    output = small_disk / "out.zarr"
    full = drivers.start(noise.source.parent, *noise.words(output, cluster))
    assert full.wait() == 1, full.err
    assert_names_the_full_disk(full.err)
    done = len(os.listdir(output / "0/nrrn/slabs"))
    assert 0 < done < SLABS
    remount(small_disk, "size=16m")
    again = drivers.start(noise.source.parent, *noise.words(output, "serial"))
    assert again.wait() == 0, again.err
    assert f"{done} of them done before" in again.out
    noise.assert_whole(output)


def kib_of_disks() -> list[int]:
    """In pages: a few in which the ledger is begun, then as many as part of the slabs take."""
    rng = random.Random(7)
    return [*range(4, 24, 4), *(4 * rng.randrange(6, 90) for _ in range(4))]


@pytest.mark.parametrize("kib", kib_of_disks())
def test_wherever_the_disk_is_full_one_line_says_so_and_more_room_ends_in_the_same_bytes(
    small_disk: Path, noise: Noise, drivers: Nursery, kib: int
) -> None:
    output = small_disk / "out.zarr"
    remount(small_disk, f"size={kib}k")
    full = drivers.start(noise.source.parent, *noise.words(output, "serial"))
    assert full.wait() == 1, full.err
    assert_names_the_full_disk(full.err)
    remount(small_disk, "size=16m")
    again = drivers.start(noise.source.parent, *noise.words(output, "serial"))
    assert again.wait() == 0, again.err
    noise.assert_whole(output)


class TurnsReadOnly(RunWatch):
    """Remounts a disk as soon as some slabs are done."""

    def __init__(self, disk: Path, slabs: int) -> None:
        self.disk, self.slabs = disk, slabs

    def progressed(self, progress: Progress) -> None:
        if progress.stage == "denoising" and progress.done == self.slabs:
            remount(self.disk, "ro")


@pytest.mark.parametrize("slabs", [0, 1, 17])
def test_a_disk_that_turns_read_only_ends_the_run_and_one_that_turns_back_lets_it_finish(
    small_disk: Path, noise: Noise, slabs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "LEASE_S", 0.1)  # this process, which could not give it back, lives on
    output = small_disk / "out.zarr"
    remount(small_disk, "size=16m")
    with pytest.raises(RunError, match=r"Read-only file system.*run the same command again to go on") as error:
        denoise(noise.source, output, noise.weights, OPTIONS, TurnsReadOnly(small_disk, slabs))
    assert error.value.exit_status == 1
    remount(small_disk, "rw")
    assert denoise(noise.source, output, noise.weights, OPTIONS).resumed == slabs
    noise.assert_whole(output)
