"""A worker whose time is over, or that is told to go, finishes what it holds, takes nothing more, and is not blamed."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from nrrn_pipeline import runners
from nrrn_pipeline.cluster.worker import GRACE_S, STOP_AT, STOP_WITHIN_S
from nrrn_pipeline.runners import DaskRunner

WAIT_S = 60.0
LONG_S = "1000"


def hold(folder: Path, item: int) -> int:
    """The id of this process, as soon as there is a file named `go`; leaves one that says when it began where."""
    (folder / f"{item}-{os.getpid()}").touch()
    until(lambda: (folder / "go").exists())
    return os.getpid()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal; Linux alone tells."""
    (mask,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def begun(folder: Path) -> list[tuple[int, int]]:
    """Each item, and the process it began in."""
    pairs = (file.name.split("-") for file in folder.glob("*-*"))
    return sorted((int(item), int(pid)) for item, pid in pairs)


@dataclass(frozen=True)
class Scene:
    """A scheduler, and workers that are processes like those of jobs."""

    cluster: LocalCluster
    client: Client
    folder: Path
    stack: ExitStack

    def worker(self, name: str, threads: int = 2, **environment: str) -> subprocess.Popen[bytes]:
        process = self.start(name, threads, **environment)
        until(lambda: self.states().get(name, "init") != "init")  # before that the scheduler gives it nothing
        return process

    def start(self, name: str, threads: int = 2, **environment: str) -> subprocess.Popen[bytes]:
        words = ("--no-nanny", "--memory-limit", "0", "--dashboard-address", "127.0.0.1:0", "--name", name)
        preload = ("--preload", "nrrn_pipeline.cluster.worker", "--nthreads", str(threads))
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.cluster.scheduler_address]
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [*command, *words, *preload], env=os.environ | environment, stdout=log, stderr=log
            )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def states(self) -> dict[str, str]:
        return {str(worker.name): worker.status.name for worker in list(self.cluster.scheduler.workers.values())}

    def submit(self, items: range, worker: str | None = None) -> list[Any]:
        """To a worker, or others if it takes nothing."""
        where = {} if worker is None else {"workers": [worker], "allow_other_workers": True}
        return [self.client.submit(hold, self.folder, item, pure=False, **where) for item in items]

    def departures(self) -> list[bool]:
        """Whether each worker that left was expected to."""
        events = [event for _, event in self.cluster.scheduler.get_events("all") if isinstance(event, dict)]
        return [event["expected"] for event in events if event.get("action") == "remove-worker"]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),  # one death is one too many
        LocalCluster(
            n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
        ExitStack() as stack,
    ):
        yield Scene(cluster, client, tmp_path, stack)


@contextmanager
def ends_in_peace(process: subprocess.Popen[bytes], within_s: float = WAIT_S) -> Iterator[None]:
    yield
    assert process.wait(within_s) == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR2", "time"])
def test_a_worker_that_has_to_go_finishes_what_it_holds_and_takes_nothing_more(scene: Scene, how: str) -> None:
    environment = {GRACE_S: LONG_S}
    if how == "time":
        environment |= {STOP_AT: str(time.time() + 20), STOP_WITHIN_S: LONG_S}
    leaving = scene.worker("leaving", **environment)
    held = scene.submit(range(2))
    until(lambda: len(begun(scene.folder)) == 2)
    assert scene.states() == {"leaving": "running"}
    if how != "time":
        leaving.send_signal(getattr(signal, how))
    until(lambda: scene.states()["leaving"] == "paused")

    staying = scene.worker("staying")
    later = scene.submit(range(2, 4), "leaving")
    until(lambda: len(begun(scene.folder)) == 4)
    assert leaving.poll() is None
    with ends_in_peace(leaving):
        (scene.folder / "go").touch()
        assert [future.result(WAIT_S) for future in held] == [leaving.pid] * 2
        assert [future.result(WAIT_S) for future in later] == [staying.pid] * 2
        held.clear()
    assert begun(scene.folder) == [(0, leaving.pid), (1, leaving.pid), (2, staying.pid), (3, staying.pid)]
    assert scene.departures() == [True]


@pytest.mark.parametrize("others", [True, False])
def test_what_cannot_be_finished_in_time_goes_to_others_and_nothing_is_suspected(scene: Scene, others: bool) -> None:
    leaving = scene.worker("leaving", **{GRACE_S: "0.5"})
    held = scene.submit(range(2))
    until(lambda: len(begun(scene.folder)) == 2)
    staying = scene.worker("staying") if others else None
    with ends_in_peace(leaving):
        leaving.send_signal(signal.SIGTERM)
    staying = staying or scene.worker("staying")
    (scene.folder / "go").touch()
    assert [future.result(WAIT_S) for future in held] == [staying.pid] * 2
    assert scene.departures() == [True]


def test_what_waits_on_a_worker_that_leaves_goes_to_others_at_once(scene: Scene) -> None:
    leaving = scene.worker("leaving", threads=1, **{GRACE_S: LONG_S})
    futures = scene.submit(range(3))
    until(lambda: len(begun(scene.folder)) == 1)
    (first,) = (item for item, _ in begun(scene.folder))
    staying = scene.worker("staying")
    leaving.send_signal(signal.SIGTERM)
    until(lambda: scene.states()["leaving"] == "paused")
    with ends_in_peace(leaving):
        (scene.folder / "go").touch()
        assert futures[first].result(WAIT_S) == leaving.pid
        futures[first].release()
    rest = [future.result(WAIT_S) for item, future in enumerate(futures) if item != first]
    assert rest == [staying.pid] * 2
    assert scene.departures() == [True]


def test_a_result_that_nobody_has_fetched_is_waited_for(scene: Scene) -> None:
    leaving = scene.worker("leaving", **{GRACE_S: LONG_S})
    (scene.folder / "go").touch()
    (future,) = scene.submit(range(1))
    until(future.done)
    leaving.send_signal(signal.SIGTERM)
    until(lambda: scene.states()["leaving"] == "paused")
    scene.worker("staying")
    assert leaving.poll() is None
    with ends_in_peace(leaving):
        assert future.result(WAIT_S) == leaving.pid
        future.release()
    assert len(begun(scene.folder)) == 1


def test_the_runner_keeps_no_result_that_a_leaving_worker_would_wait_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "POLL_S", 0.05)  # waits time out, and their tracebacks refer to what they waited for
    scene.worker("only", threads=2)
    tasks = scene.cluster.scheduler.tasks
    outcomes = DaskRunner(scene.client)(time.sleep, [0.3] * 6)
    for _ in range(6):
        next(outcomes)
        until(lambda: sum(task.state == "memory" for task in list(tasks.values())) <= 1)  # one may just have ended


def test_a_signal_after_the_time_is_over_leaves_only_the_grace(scene: Scene) -> None:
    environment = {STOP_AT: str(time.time() + 20), STOP_WITHIN_S: LONG_S, GRACE_S: "0.5"}
    leaving = scene.worker("leaving", **environment)
    held = scene.submit(range(1))
    until(lambda: begun(scene.folder))
    until(lambda: scene.states()["leaving"] == "paused")
    with ends_in_peace(leaving):
        leaving.send_signal(signal.SIGTERM)
    staying = scene.worker("staying")
    (scene.folder / "go").touch()
    assert held[0].result(WAIT_S) == staying.pid


@pytest.mark.parametrize("how", ["SIGTERM", "time"])
def test_a_worker_that_has_to_go_while_it_starts_goes(scene: Scene, how: str) -> None:
    over = {} if how == "SIGTERM" else {STOP_AT: str(time.time() - 60), STOP_WITHIN_S: LONG_S}
    leaving = scene.start("leaving", **{GRACE_S: LONG_S}, **over)
    if how == "SIGTERM":
        until(lambda: catches(leaving.pid, signal.SIGUSR2))  # and SIGTERM, which Dask's own program catches before
        leaving.send_signal(signal.SIGTERM)
    assert leaving.wait(WAIT_S) == 0
    assert scene.departures() == [True]


def test_a_worker_leaves_though_its_scheduler_is_gone(scene: Scene) -> None:
    leaving = scene.worker("leaving", **{GRACE_S: LONG_S})
    scene.cluster.close()
    assert leaving.wait(WAIT_S) == 0
