"""Runners take a task and its items, in any order, on any machines, and give an outcome for each.

`run_serially` is the specification; the Dask runner must be told apart from it by speed alone.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Protocol

import distributed
from distributed.comm.core import CommClosedError

from nrrn_pipeline.dealing import dealt
from nrrn_pipeline.errors import GO_ON, InputError, NrrnError, RunError
from nrrn_pipeline.machine import refuse_other_versions, versions
from nrrn_pipeline.places import adopt_options, options_text
from nrrn_pipeline.retrying import is_refused, reason_of

ATTEMPTS = 3  # of one item before it is set aside
POLL_S = 5.0  # how often a driver that waits looks whether there is anybody to wait for
PATIENCE_S = 300.0  # without any worker, before a run is given up


@dataclass(frozen=True)
class Outcome:
    """What became of one item: a result, or the error of its last attempt."""

    item: Any
    result: Any = None
    error: BaseException | None = None


class Runner(Protocol):
    """Runs a task on every item; an error that no retry can mend is raised at once, as RunError or InputError."""

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, in any order."""


def run_serially(task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
    """One item after the other, in this process."""
    for item in items:
        yield _outcome(task, item)


def _outcome(task: Callable[[Any], Any], item: Any) -> Outcome:
    for _ in range(ATTEMPTS):
        try:
            return Outcome(item, task(item))
        except Exception as error:
            raise_permanent(error, item)
            outcome = Outcome(item, error=error)
    return outcome


@dataclass(frozen=True)
class ThreadRunner:
    """Items in threads of this process, `at_once` of them: while one computes, the next is read.

    When the caller stops asking, what is in flight is finished first.
    """

    at_once: int

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, as they finish; an item is asked for when there is a thread for it."""
        waiting, running = iter(items), set[Future[Outcome]]()
        with ThreadPoolExecutor(self.at_once, thread_name_prefix="slab") as pool:
            while True:
                for item in islice(waiting, self.at_once - len(running)):
                    running.add(pool.submit(_outcome, task, item))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()


@dataclass(frozen=True)
class DaskRunner:
    """Items as single futures on a Dask cluster, a bounded number of them at a time: no graph, no voxels sent.

    tend: called every POLL_S or so, with the number of items that are done: the cluster looks after its workers.
    patience_s: how long to go on without any worker.
    """

    client: distributed.Client
    tend: Callable[[int], None] | None = None
    patience_s: float = PATIENCE_S

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, as they finish. Whatever is in flight when the caller stops asking is cancelled.

        An item whose worker died is tried again alone, when all others are done: it may have died of its neighbour.

        A sequence is dealt to hands, one a worker, so that neighbours, which read much in common, follow each other:
        the next item of a hand is sent when one of it is done, and Dask gives it to the worker that has just become
        free. Where another one takes it, or workers come and go, that costs time alone.
        """
        there = partial(_as_the_driver, versions(), options_text(), task)
        # keys of one group: Dask keeps account of every group for as long as anything runs
        group, numbers = f"{_name_of(task)}-{uuid.uuid4().hex}", count()
        finished = 0
        again: list[tuple[Any, int]] = []
        suspects: list[tuple[Any, int]] = []
        running: dict[Any, tuple[Any, int, int]] = {}
        try:
            resources = self._resources()
            hands = max(1, len(self._workers()))
            following, free, later = dealt(items, hands), deque[int](), count()

            def start(item: Any, attempt: int, hand: int) -> None:
                key = (group, next(numbers))
                future = self.client.submit(there, item, key=key, pure=False, resources=resources)
                running[future] = item, attempt, hand

            while True:
                at_once = max(1, self._places(resources))
                while len(running) < at_once:
                    hand = free.popleft() if free else next(later) % hands
                    if again:
                        start(*again.pop(), hand)
                    elif one := following(hand):
                        start(*one, 1, hand)
                    else:
                        break
                if not running and suspects:
                    start(*suspects.pop(), 0)
                if not running:
                    return
                for future in self._finished(list(running), resources, finished):
                    item, attempt, hand = running.pop(future)
                    free.append(hand)
                    error = future.exception()
                    result = None if error else future.result()
                    # a wait that timed out may still refer to it: a worker that leaves would have it computed again
                    future.release()
                    if error is None:
                        finished += 1
                        yield Outcome(item, result)
                        continue
                    raise_permanent(error, item)
                    if attempt == ATTEMPTS:
                        yield Outcome(item, error=error)
                    else:
                        died = isinstance(error, distributed.KilledWorker)
                        (suspects if died else again).append((item, attempt + 1))
        except (distributed.CancelledError, CommClosedError, OSError) as error:  # items' own errors are not raised here
            raise RunError(f"the Dask scheduler is gone or was restarted; {GO_ON}") from error
        finally:
            with suppress(Exception):  # of a scheduler that is gone there is nothing to cancel
                self.client.cancel(list(running))

    def _finished(self, running: list[Any], resources: dict[str, float] | None, finished: int) -> list[Any]:
        """Some that have ended, as soon as there are any. Raises RunError if no worker is left to end them."""
        deserted_s = 0.0
        while deserted_s < self.patience_s:
            if self.tend is not None:
                self.tend(finished)
            try:
                return list(distributed.wait(running, timeout=POLL_S, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                deserted_s = 0.0 if self._places(resources) else deserted_s + POLL_S
        raise RunError(f"the cluster has had no worker for {self.patience_s:.0f} s: start some; {GO_ON}")

    def _places(self, resources: dict[str, float] | None) -> int:
        """How many items can run now, one a thread, or two a GPU.

        No more are sent: one that waits behind another is suspected too when that kills their worker.
        """
        workers = self._workers()
        if resources:
            return int(sum(worker.get("resources", {}).get("GPU", 0) for worker in workers) / resources["GPU"])
        return sum(int(worker["nthreads"]) for worker in workers)

    def _resources(self) -> dict[str, float] | None:
        """Half a GPU a task, on a cluster whose workers declare GPUs: while one slab computes the next is read."""
        workers = self._workers()
        return {"GPU": 0.5} if any("GPU" in worker.get("resources", {}) for worker in workers) else None

    def _workers(self) -> list[dict[str, Any]]:
        """Those that take items: not one that is paused because its time is nearly over."""
        workers = self.client.scheduler_info(n_workers=-1).get("workers", {}).values()  # none of one that is gone
        return [worker for worker in workers if worker.get("status", "running") == "running"]


def raise_permanent(error: BaseException, item: Any) -> None:
    """Raise what no retry can mend, naming the item."""
    if isinstance(error, InputError):
        raise error
    if isinstance(error, NrrnError):
        raise RunError(f"{item}: {error}") from error
    if is_refused(error):
        where = f" ({filename})" if (filename := getattr(error, "filename", None)) else ""
        said = getattr(error, "strerror", None) or reason_of(error)
        raise RunError(f"{item}: storage refused a read or write: {said}{where}. Mend this; {GO_ON}") from error


def _name_of(task: Callable[[Any], Any]) -> str:
    """What the dashboard calls it."""
    return str(getattr(getattr(task, "func", task), "__name__", "task"))


def _as_the_driver(wanted: dict[str, str], options: str, task: Callable[[Any], Any], item: Any) -> Any:
    refuse_other_versions(wanted)  # also of workers that come later
    adopt_options(options)
    return task(item)
