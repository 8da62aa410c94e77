"""What tests of batches share: small volumes by number, what single runs make of them, and a watch that remembers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nrrn_pipeline import Layout, Options, denoise, read_manifest
from nrrn_pipeline.batch import BatchWatch, Job, Result
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 16, 32), shard=(4, 32, 64), tile=40)
WORDS = ("--chunk", "4,16,32", "--shard", "4,32,64", "--tile", "40", "--device", "cpu", "--cluster", "serial")
SERIAL = Options(layout=LAYOUT, cluster="serial", device="cpu")
SLABS = 4
FLOAT = 8  # the number of one volume of floats


def name_of(number: int) -> str:
    return f"v{number:02}.zarr"


def voxels_of(number: int) -> Any:
    return image_like((8, 48, 64), "float32" if number == FLOAT else "uint8", seed=number)


@dataclass(frozen=True)
class Told(BatchWatch):
    """What a batch said of itself."""

    taken_up: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def taken(self, job: Job, number: int, total: int) -> None:
        self.taken_up.append(job.source.rpartition("/")[2])

    def ended(self, result: Result) -> None:
        self.results.append(result)

    def noted(self, text: str) -> None:
        self.notes.append(text)


def states(results: Sequence[Result]) -> list[str]:
    return [result.state for result in results]


def single_runs(folder: Path, count: int) -> Path:
    """`raw`, volumes; `clean`, what a single run makes of each; weights."""
    tiny_weights(folder / "w.safetensors")
    for number in range(count):
        source = bare_zarr(folder / "raw" / name_of(number), voxels_of(number))
        denoise(source, folder / "clean" / name_of(number), folder / "w.safetensors", SERIAL)
    return folder


def four_volumes(folder: Path) -> Path:
    """Volumes in `raw`, weights, and a manifest with outputs in `clean`."""
    for number in range(4):
        bare_zarr(folder / "raw" / name_of(number), voxels_of(number))
    tiny_weights(folder / "w.safetensors")
    lines = [f"raw/{name_of(number)},clean/{name_of(number)}" for number in range(4)]
    (folder / "jobs.csv").write_text("\n".join(["source,output", *lines]))
    return folder


def jobs_in(lab: Path) -> list[Job]:
    return read_manifest(lab / "jobs.csv", lab / "w.safetensors")


def assert_exact(lab: Path, whole: Path, *numbers: int) -> None:
    for number in numbers:
        output = f"clean/{name_of(number)}/0"
        assert stored_chunks(lab / output) == stored_chunks(whole / output)


def rows(table: str) -> dict[str, list[str]]:
    """The lines of a table by the last part of the volume's name, without it."""
    header, *lines = table.splitlines()
    assert header.split("\t") == ["volume", "state", "slabs", "seconds", "reason"]
    cells = [line.split("\t") for line in lines]
    return {volume.rpartition("/")[2]: rest for volume, *rest in cells}


def nrrn_process(folder: Path, *words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "nrrn_pipeline.cli", *words], cwd=folder, stdout=pipe, stderr=pipe, text=True
    )


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
