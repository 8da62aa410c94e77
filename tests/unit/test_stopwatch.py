from __future__ import annotations

from contextlib import suppress

import pytest

from nrrn_pipeline import stopwatch
from nrrn_pipeline.stopwatch import Busy, Stopwatch, note


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now[0])
    return now


def test_what_is_noted_inside_a_stage_is_no_part_of_it(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.during("decode"):
        clock[0] = 5
        note("fetch", 2)
        note("fetch", 1)
    with watch.during("decode"):
        clock[0] = 6
    assert watch.seconds == {"decode": 3, "fetch": 3}


def test_stages_that_fail_count_and_nobody_hears_what_is_noted_outside(clock: list[float]) -> None:
    watch = Stopwatch()
    note("fetch", 9)
    with suppress(ZeroDivisionError), watch.during("decode"):
        clock[0] = 4
        raise ZeroDivisionError
    note("fetch", 9)
    assert watch.seconds == {"decode": 4}


def test_what_is_under_way_together_counts_once(clock: list[float]) -> None:
    busy = Busy()
    with busy:
        clock[0] = 1
        with busy:
            clock[0] = 3
    clock[0] = 10
    with busy:
        clock[0] = 11
    assert busy.seconds == 4
