"""A real Slurm takes workers away, and the run goes on with others: each time the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nrrn_pipeline import Layout, Options, denoise, verify
from nrrn_pipeline.cluster import SlurmSettings, jobqueue
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.ledger import Ledger
from tests.faults.drivers import Driver, Nursery, nursery
from tests.slurm import Slurm
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 64, 64), shard=(4, 64, 128), tile=64)
WORDS = ("--chunk", "4,64,64", "--shard", "4,64,128", "--tile", "64", "--device", "cpu", "--weights", "w.safetensors")
SLABS = 40
WAIT_S = 60.0
# Python imports this before a worker starts, and so tasks find this denoise_slab by its name
SLOW = """\
import os, pathlib, time
import nrrn_pipeline.slab as slab

real = slab.denoise_slab


def denoise_slab(plan, device, task, keeping=None):
    pathlib.Path({folder!r}, f"{{task.slab.key}}@{{os.environ['SLURM_JOB_ID']}}@{{time.monotonic_ns()}}").touch()
    time.sleep({seconds})
    return real(plan, device, task, keeping)


slab.denoise_slab = denoise_slab
"""


@dataclass(frozen=True)
class Bench:
    """A folder with a volume and weights, what a serial run makes of them, and the means to start drivers."""

    folder: Path
    chunks: dict[str, bytes]
    nursery: Nursery
    slurm: Slurm

    def settings(self, name: str, slab_s: float = 0.0, **changes: Any) -> Path:
        """A settings file of two workers on nodes with GPUs, where each slab takes some seconds more."""
        (self.folder / name).mkdir()
        code = SLOW.format(folder=str(self.folder / name), seconds=slab_s)
        (self.folder / name / "sitecustomize.py").write_text(code)
        values = {
            "kind": "slurm",
            "workers": 2,
            "cores": 1,
            "memory": "1GB",
            "gpus": 1,
            "walltime": "0:10:00",
            "queue": "gpu",
            "interface": "lo",
            "log_directory": str(self.logs(name)),
            "prologue": [f"export PYTHONPATH={self.folder / name}:$PYTHONPATH"],
        }
        lines = [f"{key} = {value!r}\n" for key, value in (values | changes).items()]
        (self.folder / f"{name}.toml").write_text("".join(lines))
        return self.folder / f"{name}.toml"

    def logs(self, name: str) -> Path:
        return self.folder / f"logs-{name}"

    def start(self, name: str) -> Driver:
        return self.nursery.start(
            self.folder, "denoise", "in.zarr", f"{name}.zarr", *WORDS, "--cluster", f"{name}.toml"
        )

    def denoise(self, name: str, cluster: Path | SlurmSettings) -> None:
        options = Options(layout=LAYOUT, cluster=str(cluster) if isinstance(cluster, Path) else cluster, device="cpu")
        denoise(self.folder / "in.zarr", self.folder / f"{name}.zarr", self.folder / "w.safetensors", options)

    def begun(self, name: str) -> Counter[str]:
        """How often each slab was begun."""
        return Counter(file.name.split("@")[0] for file in (self.folder / name).glob("*@*@*"))

    def workers(self, name: str) -> set[str]:
        """The jobs that began slabs."""
        return {file.name.split("@")[1] for file in (self.folder / name).glob("*@*@*")}

    def done(self, name: str) -> int:
        return len(Ledger(f"{self.folder / name}.zarr/0").done())

    def assert_whole_and_clean(self, name: str) -> None:
        output = self.folder / f"{name}.zarr"
        assert stored_chunks(output / "0") == self.chunks
        assert verify(output, deep=True) == []
        assert not list((output / "0/nrrn").glob("failed/*"))
        self.assert_clean(name)

    def assert_clean(self, name: str) -> None:
        """No job is left, and no keys."""
        self.slurm.wait_until_idle()
        assert not list(self.logs(name).glob("**/*.pem"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("slurm-runs")
    bare_zarr(folder / "in.zarr", image_like((40, 100, 200)), chunks=(8, 64, 64))
    tiny_weights(folder / "w.safetensors", units=1, channels=8)
    options = Options(layout=LAYOUT, cluster="serial", device="cpu")
    summary = denoise(folder / "in.zarr", folder / "whole.zarr", folder / "w.safetensors", options)
    assert summary.slabs == SLABS
    with nursery(tmp_path_factory.mktemp("drivers")) as drivers:
        yield Bench(folder, stored_chunks(folder / "whole.zarr/0"), drivers, slurm)


def until(condition: Callable[[], Any], driver: Driver | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        assert driver is None or driver.poll() is None, driver.err
        time.sleep(0.05)


def test_a_cancelled_job_and_a_node_that_fails_are_replaced(bench: Bench) -> None:
    slurm = bench.slurm
    bench.settings("lost", slab_s=2)
    driver = bench.start("lost")
    until(lambda: bench.done("lost") >= 4 and len(bench.workers("lost")) == 2, driver)
    first, second = sorted(bench.workers("lost"), key=int)
    failing = slurm.node_of(second)
    slurm.cancel(first)
    slurm.set_node(failing, "down")
    try:
        until(lambda: not {first, second} & set(slurm.jobs()), driver)
        until(lambda: len(slurm.jobs()) == 2, driver)
    finally:
        slurm.resume(failing)
    assert driver.wait(120) == 0, driver.err
    assert len(bench.workers("lost")) == 4
    again = [slab for slab, times in bench.begun("lost").items() if times > 1]
    assert len(bench.begun("lost")) == SLABS
    assert len(again) <= 2, "at most what was in flight on the node that failed"
    bench.assert_whole_and_clean("lost")


def test_workers_whose_time_is_over_are_replaced_and_no_slab_is_begun_twice(bench: Bench) -> None:
    bench.settings("short", slab_s=5, walltime="0:01:00", stop_before=15)
    driver = bench.start("short")
    assert driver.wait(170) == 0, driver.err
    assert len(bench.workers("short")) >= 3, "all was done before the time was over"
    assert bench.begun("short") == Counter(dict.fromkeys(bench.begun("short"), 1))
    assert len(bench.begun("short")) == SLABS
    bench.assert_whole_and_clean("short")


def test_jobs_end_by_themselves_when_their_driver_is_killed(bench: Bench) -> None:
    bench.settings("orphans", slab_s=1)
    driver = bench.start("orphans")
    until(lambda: bench.done("orphans") >= 2, driver)
    os.kill(driver.pid, signal.SIGKILL)
    bench.slurm.wait_until_idle()
    bench.denoise("orphans", SlurmSettings(**settings_of(bench), log_directory=str(bench.logs("orphans"))))
    assert stored_chunks(bench.folder / "orphans.zarr/0") == bench.chunks


def settings_of(bench: Bench) -> dict[str, Any]:
    return {"workers": 1, "cores": 1, "memory": "1GB", "walltime": "0:10:00", "interface": "lo"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobqueue, "TEND_S", 0.3)


def test_jobs_that_end_at_once_end_the_run(bench: Bench, impatient: None) -> None:
    cluster = bench.settings("broken", python="/bin/false", replacements=3)
    with pytest.raises(RunError, match=r"^[34] worker jobs of slurm ended and no slab was done .* in /.*logs-broken"):
        bench.denoise("broken", cluster)
    assert not (bench.folder / "broken.zarr").exists()
    bench.assert_clean("broken")


def test_jobs_that_never_begin_end_the_run_when_the_patience_does(bench: Bench, impatient: None) -> None:
    for node in ("n1", "n2"):
        bench.slurm.set_node(node, "drain")
    try:
        with pytest.raises(InputError, match="no worker job began within 2 s: ask squeue why they wait"):
            bench.denoise("queued", bench.settings("queued", patience=2))
        assert not bench.slurm.jobs()
    finally:
        for node in ("n1", "n2"):
            bench.slurm.resume(node)
    bench.assert_clean("queued")


def test_what_slurm_refuses_is_said_in_its_own_words(bench: Bench) -> None:
    cluster = bench.settings("refused", queue="nowhere")
    with pytest.raises(InputError, match=r"slurm refuses the worker jobs .*invalid partition"):
        bench.denoise("refused", cluster)
    assert not (bench.folder / "refused.zarr").exists()
    assert not bench.logs("refused").exists()
    bench.assert_clean("refused")


def test_without_slurm_the_missing_command_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = bench.settings("elsewhere")
    monkeypatch.setenv("PATH", str(bench.folder))
    with pytest.raises(InputError, match="sbatch is not on the PATH"):
        bench.denoise("elsewhere", cluster)
    assert not bench.logs("elsewhere").exists()
