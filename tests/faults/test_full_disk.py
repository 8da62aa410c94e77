from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nrrn_pipeline import Layout, Options, denoise, verify
from tests.support import bare_zarr, stored_chunks, tiny_weights

LAYOUT = ["--chunk", "4,64,64", "--shard", "4,128,128", "--tile", "128"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_more_room_lets_it_finish(
    small_disk: Path, tmp_path: Path, cluster: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 256, 256), dtype=np.uint8)  # does not compress
    source, weights = bare_zarr(tmp_path / "in.zarr", noise), tiny_weights(tmp_path / "w.safetensors", channels=2)
    command = [
        sys.executable,
        "-m",
        "nrrn_pipeline.cli",
        "denoise",
        source,
        small_disk / "out.zarr",
        "--weights",
        weights,
    ]
    run = [*command, *LAYOUT, "--cluster", cluster, "--workers", "2", "--device", "cpu"]

    full = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert full.returncode == 1
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("nrrn: ")]
    assert "No space left on device" in line
    assert "run the same command again to go on" in line
    assert "Traceback" not in full.stderr
    done = len(os.listdir(small_disk / "out.zarr/0/nrrn/slabs"))
    assert 0 < done < 40

    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{done} of them done before" in again.stdout
    assert verify(small_disk / "out.zarr") == []
    layout = Layout(chunk=(4, 64, 64), shard=(4, 128, 128), tile=128)
    denoise(source, tmp_path / "whole.zarr", weights, Options(layout=layout, cluster="serial", device="cpu"))
    assert stored_chunks(small_disk / "out.zarr/0") == stored_chunks(tmp_path / "whole.zarr/0")
