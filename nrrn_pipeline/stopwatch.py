"""Where a task's time goes, stage by stage."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

_of_thread = threading.local()


@dataclass
class Stopwatch:
    """Seconds by stage. What goes on inside a stage may be told by `note`, and is then no part of it."""

    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=perf_counter)

    def age(self) -> float:
        """Seconds since it was made."""
        return perf_counter() - self._started

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Within the block it is this thread's."""
        outer, inner = getattr(_of_thread, "noted", None), dict[str, float]()
        _of_thread.noted, started = inner, perf_counter()
        try:
            yield
        finally:
            _of_thread.noted = outer
            self.add(stage, perf_counter() - started - sum(inner.values()))
            for name, spent in inner.items():
                self.add(name, spent)

    def add(self, stage: str, seconds: float) -> None:
        """So many more."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def note(stage: str, seconds: float) -> None:
    """To the stopwatch of the block that this thread is in, if it is in one: so long something else was waited for."""
    noted = getattr(_of_thread, "noted", None)
    if noted is not None:
        noted[stage] = noted.get(stage, 0.0) + seconds


class Busy:
    """How long anything at all was under way, of what may be many things at a time, in any threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._under_way, self._since, self._counting = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._counting:
            if self._under_way == 0:
                self._since = perf_counter()
            self._under_way += 1

    def __exit__(self, *_: object) -> None:
        with self._counting:
            self._under_way -= 1
            if self._under_way == 0:
                self.seconds += perf_counter() - self._since
