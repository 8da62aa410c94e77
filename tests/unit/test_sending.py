"""What the driver of a cluster sends to whom, and takes back: by a scheduler and futures that do as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import distributed
import pytest

from nrrn_pipeline import crew
from nrrn_pipeline.crew import Crew
from nrrn_pipeline.runners import ATTEMPTS, GONE, LOSSES, Outcome, _Sent

THREADS = 2


@dataclass(eq=False)
class Told:
    """A future: what it was sent as, and what becomes of it; None: nothing yet."""

    item: Any
    worker: str | None
    end: Callable[[], Any] | None = None
    released: bool = False
    status: str = "finished"

    def done(self) -> bool:
        return self.end is not None

    def exception(self, timeout: float) -> BaseException | None:
        assert self.end is not None
        found = self.end()
        return found if isinstance(found, BaseException) else None

    def result(self, timeout: float) -> Any:
        assert self.end is not None
        return self.end()

    def release(self) -> None:
        self.released = True


@dataclass
class Scheduler:
    """Stands in for a client: workers by address, with their status, and what was sent."""

    workers: dict[str, str] = field(default_factory=dict)
    gpus: float | None = None
    sent: list[Told] = field(default_factory=list)
    status: str = "running"
    answers: bool = True

    @property
    def scheduler(self) -> Scheduler:
        return self

    def sync(self, ask: Callable[..., Any], **how: Any) -> Any:
        return ask(**how)

    def identity(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1, "all of them"
        if not self.answers:
            raise OSError("timed out")
        resources = {} if self.gpus is None else {"GPU": self.gpus}
        return {
            "workers": {
                address: {"nthreads": THREADS, "status": status, "resources": resources}
                for address, status in self.workers.items()
            }
        }

    def submit(self, _: Any, item: Any, **how: Any) -> Told:
        assert how["resources"] == (None if self.gpus is None else {"GPU": 0.5})
        self.sent.append(Told(item, how["workers"][0] if how["workers"] else None))
        return self.sent[-1]

    @property
    def held(self) -> list[tuple[Any, str | None]]:
        """Items that are sent and neither done nor taken back, and who may do them."""
        return [(told.item, told.worker) for told in self.sent if not told.done() and not told.released]


def sending(scheduler: Scheduler, items: Iterable[Any]) -> _Sent:
    sent = _Sent(scheduler, abs, items)  # type: ignore[arg-type]
    sent.send()
    return sent


def ends(sent: _Sent, scheduler: Scheduler, item: Any, value: Any = None) -> Outcome | None:
    """That item ends, with a result or an error, and more is sent."""
    (told,) = (told for told in scheduler.sent if told.item == item and not told.done() and not told.released)
    told.end = lambda: value
    outcome = sent.settle(told)
    assert told.released
    sent.send()
    return outcome


def running(*addresses: str) -> dict[str, str]:
    return dict.fromkeys(addresses, "running")


def test_each_worker_gets_neighbours_as_many_as_it_has_threads() -> None:
    scheduler = Scheduler(running("a", "b"))
    sent = sending(scheduler, range(12))
    assert sorted(scheduler.held) == [(0, "a"), (1, "a"), (6, "b"), (7, "b")]
    assert ends(sent, scheduler, 7, "seven") == Outcome(7, "seven")
    assert ends(sent, scheduler, 6) == Outcome(6)
    assert ends(sent, scheduler, 0) == Outcome(0)
    assert sorted(scheduler.held) == [(1, "a"), (2, "a"), (8, "b"), (9, "b")]


def test_a_worker_that_comes_later_gets_a_part_of_its_own_at_once() -> None:
    scheduler = Scheduler(running("a"))
    sent = sending(scheduler, range(12))
    scheduler.workers = running("a", "b")
    sent.send()
    assert sorted(scheduler.held) == [(0, "a"), (1, "a"), (7, "b"), (8, "b")]


def test_half_a_gpu_is_a_place() -> None:
    scheduler = Scheduler(running("a", "b"), gpus=1.0)
    sending(scheduler, range(12))
    assert len(scheduler.held) == 4
    scheduler = Scheduler(running("a", "b"), gpus=2.0)
    sending(scheduler, range(12))
    assert len(scheduler.held) == 8


def test_what_a_worker_had_that_dies_is_given_to_another_and_then_tried_alone() -> None:
    scheduler = Scheduler(running("a", "b", "c"))
    sent = sending(scheduler, range(3))
    assert sorted(scheduler.held) == [(0, "a"), (1, "b"), (2, "c")]
    scheduler.workers = running("b", "c")
    sent.send()
    ((_, second),) = [each for each in scheduler.held if each[0] == 0]
    assert second in ("b", "c"), "a death is no failure of the item's"
    scheduler.workers = running(*{"b", "c"} - {second})
    sent.send()
    assert [item for item, _ in scheduler.held if item == 0] == [], "not beside others"
    while len(others := scheduler.held) > 1 or others[0][0] != 0:
        ends(sent, scheduler, others[0][0])
    assert scheduler.held == [(0, None)], "for Dask to give to whom it likes, and to count deaths"
    for attempt in range(2, ATTEMPTS):
        assert ends(sent, scheduler, 0, distributed.KilledWorker("0", None, 2)) is None, attempt
        assert scheduler.held == [(0, None)]
    outcome = ends(sent, scheduler, 0, distributed.KilledWorker("0", None, 2))
    assert outcome is not None
    assert isinstance(outcome.error, distributed.KilledWorker)
    assert scheduler.held == []


def test_a_worker_that_leaves_after_it_said_so_is_no_death_but_not_for_ever() -> None:
    """So does one that is short of memory, and is killed then."""
    scheduler = Scheduler(running("0"))
    sent = sending(scheduler, [7])
    for number in range(LOSSES + 1):
        assert scheduler.held == [(7, str(number))]
        scheduler.workers = {str(number): "paused", **running(str(number + 1))}
        sent.send()
        assert scheduler.held == [(7, str(number))], "it may finish what it has"
        scheduler.workers = running(str(number + 1))
        sent.send()
    assert scheduler.held == [(7, None)]


def test_what_a_paused_worker_does_not_end_is_given_to_others_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(running("a"))
    sent = sending(scheduler, [7])
    scheduler.workers = {"a": "paused", **running("b")}
    sent.send()
    assert scheduler.held == [(7, "a")]
    monkeypatch.setattr(crew, "PAUSED_S", 0.05)
    time.sleep(0.1)
    sent.send()
    assert scheduler.held == [(7, "b")]


@pytest.mark.parametrize("how", ["late", "lost"])
def test_a_result_that_went_with_its_worker_is_made_again_so_many_times(how: str) -> None:
    def gone() -> Any:
        raise TimeoutError

    scheduler = Scheduler(running("a"))
    sent = sending(scheduler, [7])
    outcomes: list[Outcome] = []
    for address in ["a"] * (LOSSES + 1) + [None] * (ATTEMPTS - 1):
        assert scheduler.held == [(7, address)]
        told = scheduler.sent[-1]
        told.end, told.status = gone, "lost" if how == "lost" else "finished"
        outcomes += filter(None, [sent.settle(told)])
        sent.send()
    assert scheduler.held == []
    assert [str(outcome.error) for outcome in outcomes] == [GONE]


def test_without_workers_one_item_waits_for_whoever_comes() -> None:
    scheduler = Scheduler()
    sent = sending(scheduler, range(8))
    sent.send()
    assert scheduler.held == [(0, None)]
    scheduler.workers = running("a")
    sent.send()
    assert len(scheduler.held) == 1 + THREADS
    scheduler.workers = {}
    sent.send()
    assert scheduler.held == [(0, None)], "and nothing waits for one that is gone"


def test_a_scheduler_that_does_not_answer_loses_no_worker() -> None:
    scheduler = Scheduler(running("a"))
    seen = Crew(scheduler)  # type: ignore[arg-type]
    scheduler.answers, scheduler.workers = False, {}
    seen.look()
    assert (seen.places, seen.has_lost("a")) == ({"a": THREADS}, False)
    scheduler.answers, scheduler.status = True, "closed"
    seen.look()
    assert not seen.has_lost("a")
    scheduler.status = "running"
    seen.look()
    assert seen.has_lost("a")
    assert seen.died("a")
