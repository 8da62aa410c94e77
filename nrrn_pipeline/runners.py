"""Runners take a task and its items, in any order, on any machines, and give an outcome for each.

`run_serially` is the specification; the Dask runner must be told apart from it by speed alone.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, Protocol

import distributed
from distributed.comm.core import CommClosedError

from nrrn_pipeline.crew import Crew
from nrrn_pipeline.dealing import dealt
from nrrn_pipeline.errors import GO_ON, InputError, NrrnError, RunError
from nrrn_pipeline.machine import refuse_other_versions, versions
from nrrn_pipeline.places import adopt_options, options_text
from nrrn_pipeline.retrying import is_refused, reason_of

ATTEMPTS = 3  # of one item before it is set aside
DEATHS = 1  # of workers that have an item, in an attempt
LOSSES = 5  # of an item, in an attempt, for whatever reason
POLL_S = 5.0  # how often a driver that waits looks whether there is anybody to wait for
RESULT_S = 30.0  # for a record to come from its worker
GONE = "its result went with its worker"
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

    @property
    def workers(self) -> int:
        """How many take items now; at least one, as a lone one may just be starting anew."""
        return max(1, len(Crew(self.client).places))

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, as they finish. Whatever is in flight when the caller stops asking is cancelled.

        Of a sequence each worker gets neighbours, which read much in common. An item whose workers died is tried again
        alone, when all others are done: they may have died of its neighbour.
        """
        sent, finished, deserted_s = None, 0, 0.0
        try:
            sent = _Sent(self.client, task, items)
            while True:
                sent.send()
                if not sent.running:
                    return
                if self.tend is not None:
                    self.tend(finished)
                ended = sent.ended()
                deserted_s = 0.0 if ended or sent.crew.places else deserted_s + POLL_S
                if deserted_s >= self.patience_s:
                    raise RunError(f"the cluster has had no worker for {self.patience_s:.0f} s: start some; {GO_ON}")
                for future in ended:
                    if (outcome := sent.settle(future)) is not None:
                        finished += outcome.error is None
                        yield outcome
        except (distributed.CancelledError, CommClosedError, OSError) as error:  # items' own errors are not raised here
            raise RunError(f"the Dask scheduler is gone or was restarted; {GO_ON}") from error
        finally:
            if sent is not None:
                with suppress(Exception):  # of a scheduler that is gone there is nothing to cancel
                    self.client.cancel(list(sent.running))


@dataclass(frozen=True)
class _Try:
    """An item that is sent. address: who may do it; None: anybody.

    deaths: of workers that had it in this attempt. losses: how often it was sent for nothing, whatever became of them.
    """

    item: Any
    attempt: int = 1
    deaths: int = 0
    losses: int = 0
    address: str | None = None


class _Sent:
    """What workers have of some items, and what is left.

    Each item is for one worker alone, of whom it is known what it has read; what has lost its worker is sent anew, as
    Dask would wait for that worker for ever.
    """

    def __init__(self, client: distributed.Client, task: Callable[[Any], Any], items: Iterable[Any]) -> None:
        self._client, self.crew = client, Crew(client)
        self._there = partial(_as_the_driver, versions(), options_text(), task)
        # keys of one group: Dask keeps account of every group for as long as anything runs
        self._group, self._numbers = f"{_name_of(task)}-{uuid.uuid4().hex}", count()
        self._following = dealt(items, [*self.crew.places])
        self._again: list[_Try] = []
        self._suspects: list[_Try] = []
        self.running: dict[Any, _Try] = {}

    def send(self) -> None:
        """As much as workers can run at a time; what is suspected alone, when nothing else is left."""
        self.crew.look()
        self._take_back()
        load = Counter(one.address for one in self.running.values())
        while (address := self.crew.freest(load)) and (one := self._next(address)):
            self._start(one)
            load[address] += 1
        if self.running:
            return
        if not self.crew.places and (one := self._next(None)):
            self._start(one)  # for whoever comes
        elif self._suspects:
            self._start(self._suspects.pop())

    def _next(self, address: str | None) -> _Try | None:
        if self._again:
            return replace(self._again.pop(), address=address)
        one = self._following(address)
        return None if one is None else _Try(*one, address=address)

    def _start(self, one: _Try) -> None:
        key, workers = (self._group, next(self._numbers)), one.address and [one.address]
        resources = self.crew.resources
        future = self._client.submit(self._there, one.item, key=key, pure=False, resources=resources, workers=workers)
        self.running[future] = one

    def _take_back(self) -> None:
        """What has lost its worker."""
        for future in [future for future, one in self.running.items() if self.crew.has_lost(one.address)]:
            if not future.done():
                future.release()
                self._lost(self.running.pop(future))

    def _lost(self, one: _Try) -> None:
        deaths, losses = one.deaths + self.crew.died(one.address), one.losses + 1
        if deaths > DEATHS or losses > LOSSES:
            self._suspects.append(_Try(one.item, min(one.attempt + 1, ATTEMPTS)))
        else:
            self._again.append(replace(one, deaths=deaths, losses=losses))

    def ended(self) -> list[Any]:
        """Some that have ended; none, if none does within POLL_S."""
        try:
            return list(distributed.wait(list(self.running), timeout=POLL_S, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def settle(self, future: Any) -> Outcome | None:
        """Of one that has ended; None: it is tried again. Raises what no retry can mend."""
        one, error, result = self.running.pop(future), None, None
        gone = future.status == "lost"  # its worker went, and took the result along
        try:
            if not gone:
                error = future.exception(RESULT_S)
                result = None if error else future.result(RESULT_S)
        except TimeoutError:
            gone = True
        finally:
            # a wait that timed out may still refer to it: a worker that leaves would have it computed again
            future.release()
        if gone and one.address is not None:
            self._lost(one)
            return None
        if gone:
            error = TimeoutError(GONE)
        if error is None:
            return Outcome(one.item, result)
        raise_permanent(error, one.item)
        if one.attempt == ATTEMPTS:
            return Outcome(one.item, error=error)
        alone = gone or isinstance(error, distributed.KilledWorker)
        (self._suspects if alone else self._again).append(_Try(one.item, one.attempt + 1))
        return None


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
