"""Whatever is killed, whenever: the same command again ends in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nrrn_pipeline import Layout, Options, denoise, verify
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 64, 64), shard=(4, 64, 128), tile=64)
SLABS = 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume, weights and the output of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("kills")
    bare_zarr(folder / "in.zarr", image_like((40, 100, 200)), chunks=(8, 64, 64))
    tiny_weights(folder / "w.safetensors", units=2, channels=8)
    summary = denoise(
        folder / "in.zarr", folder / "whole.zarr", folder / "w.safetensors", Options(layout=LAYOUT, cluster="serial")
    )
    assert summary.slabs == SLABS
    return folder


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[str]:
    layout = ["--chunk", "4,64,64", "--shard", "4,64,128", "--tile", "64", "--device", "cpu"]
    command = [sys.executable, "-m", "nrrn_pipeline.cli", "denoise", "in.zarr", name, "--weights", "w.safetensors"]
    pipe = subprocess.PIPE
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test run in the background ignores it, and its children
    return subprocess.Popen(
        [*command, *layout, *options], cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def records(output: Path) -> dict[str, str]:
    """The text of every record; a slab that was done again has another time in it."""
    return {file.stem: file.read_text() for file in (output / "0/nrrn/slabs").glob("*.json")}


def wait_for_records(process: subprocess.Popen[str], output: Path, count: int) -> None:
    folder = output / "0/nrrn/slabs"
    while process.poll() is None and (len(list(folder.glob("*.json"))) if folder.exists() else 0) < count:
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_undisturbed(folder: Path, name: str) -> None:
    assert stored_chunks(folder / name / "0") == stored_chunks(folder / "whole.zarr/0")
    assert verify(folder / name) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random_moments_and_run_again_gives_the_same_bytes(undisturbed: Path, seed: int) -> None:
    rng, name = random.Random(seed), f"killed{seed}.zarr"
    output, kept = undisturbed / name, {}
    for _ in range(3):
        process = start(undisturbed, name, "--cluster", "serial")
        wait_for_records(process, output, len(kept) + rng.randrange(0, 8))
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        finish(process)
        now = records(output)
        assert kept.items() <= now.items(), "a finished slab was done again"
        kept = now
    assert 0 < len(kept) < SLABS
    status, out, err = finish(start(undisturbed, name, "--cluster", "serial"))
    assert status == 0, err
    assert f"{len(kept)} of them done before" in out
    assert kept.items() <= records(output).items()
    assert_undisturbed(undisturbed, name)


def test_killed_before_the_first_slab_leaves_an_output_that_can_be_resumed(undisturbed: Path) -> None:
    output = undisturbed / "early.zarr"
    for marker in ("0/nrrn/plan.json", "0/nrrn/statistics.json", "0/zarr.json"):
        process = start(undisturbed, "early.zarr", "--cluster", "serial")
        while process.poll() is None and not (output / marker).exists():
            time.sleep(0.005)
        process.kill()
        finish(process)
    status, _, err = finish(start(undisturbed, "early.zarr", "--cluster", "serial"))
    assert status == 0, err
    assert_undisturbed(undisturbed, "early.zarr")


def test_a_killed_driver_takes_its_workers_along_and_the_next_goes_on(undisturbed: Path) -> None:
    output = undisturbed / "driver.zarr"
    process = start(undisturbed, "driver.zarr", "--workers", "2")
    wait_for_records(process, output, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    finish(process)
    kept = records(output)
    status, out, err = finish(start(undisturbed, "driver.zarr", "--workers", "2"))
    assert status == 0, err
    assert f"{len(kept)} of them done before" in out
    assert_undisturbed(undisturbed, "driver.zarr")


def test_a_killed_worker_is_replaced_and_the_run_ends_whole(undisturbed: Path) -> None:
    output = undisturbed / "worker.zarr"
    process = start(undisturbed, "worker.zarr", "--workers", "2")
    wait_for_records(process, output, 2)
    worker = json.loads(next(iter(records(output).values())))["worker"]
    os.kill(int(worker.split(":")[1]), signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 0, err
    assert_undisturbed(undisturbed, "worker.zarr")


@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_ctrl_c_stops_at_once_and_leaves_a_resumable_output(undisturbed: Path, cluster: str) -> None:
    name = f"interrupted_{cluster}.zarr"
    process = start(undisturbed, name, "--cluster", cluster, "--workers", "2")
    wait_for_records(process, undisturbed / name, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the driver and all of its workers
    status, _, err = finish(process)
    assert status == 130
    assert "Traceback" not in err
    assert "interrupted; what is done is kept: run the same command again to go on" in err
    kept = records(undisturbed / name)
    assert 3 <= len(kept) < SLABS
    status, out, err = finish(start(undisturbed, name, "--cluster", "serial"))
    assert status == 0, err
    assert f"{len(kept)} of them done before" in out
    assert_undisturbed(undisturbed, name)


def test_a_shard_torn_by_the_system_does_not_fail_the_retry(undisturbed: Path) -> None:
    output = undisturbed / "torn.zarr"
    process = start(undisturbed, "torn.zarr", "--cluster", "serial")
    wait_for_records(process, output, 2)
    process.kill()
    finish(process)
    for shard in [file for file in (output / "0/c").rglob("*") if file.is_file()]:
        shard.write_bytes(shard.read_bytes()[:40])
    for record in (output / "0/nrrn/slabs").glob("*.json"):
        record.unlink()
    status, _, err = finish(start(undisturbed, "torn.zarr", "--cluster", "serial"))
    assert status == 0, err
    assert_undisturbed(undisturbed, "torn.zarr")
