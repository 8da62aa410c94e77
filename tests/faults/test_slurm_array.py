"""A job array of a real Slurm: tasks that are cancelled, or run out of time, cost no byte and no slab's work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nrrn_pipeline import Layout, Options, denoise, storage, verify
from nrrn_pipeline.ledger import Ledger
from tests.slurm import Slurm
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 64, 64), shard=(4, 64, 128), tile=64)
WORDS = ("--chunk", "4,64,64", "--shard", "4,64,128", "--tile", "64", "--weights", "w.safetensors")
SLABS = 40
WAIT_S = 90.0
NRRN = str(Path(sys.executable).parent / "nrrn")
# Python imports this before a task starts, and so runs find this denoise_slab by its name
SLOW = """\
import os, pathlib, time
import nrrn_pipeline.slab as slab

real, folder = slab.denoise_slab, pathlib.Path({folder!r})


def denoise_slab(plan, device, task, keeping=None):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES")
    who = "@".join(os.environ.get(name, "0") for name in names)
    (folder / f"{{task.slab.key}}@{{who}}@{{time.monotonic_ns()}}").touch()
    time.sleep({seconds})
    record = real(plan, device, task, keeping)
    (folder / f"ended@{{task.slab.key}}@{{time.monotonic_ns()}}").touch()
    return record


slab.denoise_slab = denoise_slab
"""


@dataclass(frozen=True)
class Array:
    """A job array that was submitted; each slab takes some seconds more, and leaves a note of who began it."""

    folder: Path
    name: str
    job: str
    slurm: Slurm

    @property
    def output(self) -> Path:
        return self.folder / f"it's {self.name}.zarr"

    @property
    def logs(self) -> Path:
        return self.folder / f"logs of {self.name}"

    def begun(self) -> list[list[str]]:
        """Slab, task, how often the task had been requeued, GPU: of each slab that was begun."""
        return [file.name.split("@")[:4] for file in (self.folder / self.name).glob("z*@*@*@*@*")]

    def ended(self) -> Counter[str]:
        """How often each slab was done."""
        return Counter(file.name.split("@")[1] for file in (self.folder / self.name).glob("ended@*"))

    def done(self) -> int:
        return len(Ledger(f"{self.output}/0").done())

    def tasks(self) -> dict[str, str]:
        """The state of each task that has not ended, by its number."""
        lines = self.slurm.run("squeue", "--noheader", "--array", "--format=%F %K %T").splitlines()
        return {task: state for job, task, state in map(str.split, lines) if job == self.job}

    def said(self, task: int | str) -> str:
        log = self.logs / f"nrrn-{self.job}_{task}.out"
        return log.read_text() if log.exists() else ""

    def interrupted(self, task: int | str) -> int:
        """How often it ended before all was done, and said so."""
        return self.said(task).count("interrupted; what is done is kept")

    def until(self, condition: Callable[[], object], wait_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + wait_s
        while not condition():
            said = {log.name: log.read_text()[-500:] for log in self.logs.glob("*.out")}
            assert time.monotonic() < deadline, f"{self.done()} done, {self.slurm.jobs()}, {said}"
            time.sleep(0.2)

    def has_ended(self) -> bool:
        return not self.tasks()

    def assert_whole(self, chunks: dict[str, bytes]) -> None:
        assert stored_chunks(self.output / "0") == chunks
        assert verify(self.output, deep=True) == []
        for folder in ("members", "claims", "failed"):
            assert not storage.list_sizes(f"{self.output}/0/nrrn/{folder}"), folder


@dataclass(frozen=True)
class Bench:
    """A folder with a volume and weights, what a serial run makes of them, and a Slurm to submit to."""

    folder: Path
    chunks: dict[str, bytes]
    slurm: Slurm

    def submit(self, name: str, *words: str, slab_s: float) -> Array:
        (self.folder / name).mkdir()
        code = SLOW.format(folder=str(self.folder / name), seconds=slab_s)
        (self.folder / name / "sitecustomize.py").write_text(code)
        prologue = ("--prologue", f"export PYTHONPATH={self.folder / name}")
        own = ("--partition", "gpu", "--gpus", "1", "--logs", f"logs of {name}", *prologue)
        ended = subprocess.run(
            [NRRN, "submit", "slurm", "in.zarr", f"it's {name}.zarr", *WORDS, *own, *words],
            cwd=self.folder,
            env=os.environ | self.slurm.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return Array(self.folder, name, ended.stdout.split()[1].rstrip(":"), self.slurm)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("slurm-arrays")
    bare_zarr(folder / "in.zarr", image_like((40, 100, 200)), chunks=(8, 64, 64))
    tiny_weights(folder / "w.safetensors", units=1, channels=8)
    options = Options(layout=LAYOUT, cluster="serial", device="cpu")
    assert denoise(folder / "in.zarr", folder / "whole.zarr", folder / "w.safetensors", options).slabs == SLABS
    yield Bench(folder, stored_chunks(folder / "whole.zarr/0"), slurm)
    if jobs := slurm.jobs():  # of a test that failed
        slurm.cancel(*jobs)
    slurm.wait_until_idle()


def test_a_cancelled_task_leaves_its_share_to_the_others(bench: Bench) -> None:
    array = bench.submit("cancelled", "--array", "4", "--time", "0:10:00", slab_s=1.0)
    array.until(lambda: {task for _, task, *_ in array.begun()} == {"0", "1"} and array.done() >= 4)
    assert array.tasks() == {"0": "RUNNING", "1": "RUNNING", "2": "PENDING", "3": "PENDING"}
    gpus = {(task, gpu) for _, task, _, gpu in array.begun()}
    assert len(gpus) == 2, "a GPU each, as Slurm gave it"
    bench.slurm.cancel(f"{array.job}_0")
    array.until(array.has_ended)
    assert array.interrupted(0) == 1
    assert {again for _, _, again, _ in array.begun()} == {"0"}, "plain scancel requeues nothing"
    shares = Counter(task for _, task, *_ in array.begun())
    assert shares["0"] < SLABS / 4
    assert shares["2"] > 0, "queued behind the first two, it took the place of the one that was cancelled"
    assert array.ended() == Counter(dict.fromkeys(array.ended(), 1)), "no slab was done twice"
    array.assert_whole(bench.chunks)


def test_tasks_whose_time_is_over_go_on_in_new_jobs(bench: Bench) -> None:
    array = bench.submit("short", "--array", "2", "--time", "0:01:00", "--stop-before", "15", slab_s=5.0)
    requeued: dict[str, float] = {}

    def has_ended() -> bool:
        """Slurm would wait two minutes with a task that is requeued; too early it refuses it for good."""
        tasks = array.tasks()
        for task, state in tasks.items():
            if state == "PENDING" and array.interrupted(task) and time.monotonic() > requeued.get(task, 0.0) + 6:
                requeued[task] = time.monotonic()
                bench.slurm.run("scontrol", "update", f"jobid={array.job}_{task}", "starttime=now+3")
        return not tasks

    array.until(has_ended, 300)
    assert requeued.keys() == {"0", "1"}
    assert len({again for _, _, again, _ in array.begun()}) > 1, "requeued tasks went on with slabs"
    assert array.ended() == Counter(dict.fromkeys(array.ended(), 1)), "what was in flight was finished"
    for task in requeued:
        assert "complete, 40 slabs" in array.said(task), "one log, of all its jobs"
    array.assert_whole(bench.chunks)
