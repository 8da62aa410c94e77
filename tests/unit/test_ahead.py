"""Batches that are made before they are asked for."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest

from nrrn_pipeline.training.ahead import made_ahead


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_come_in_order_whoever_is_done_first(threads: int) -> None:
    def make(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number

    assert list(islice(made_ahead(make, 7, threads), 12)) == list(range(7, 19))


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_as_there_are_threads_are_made_ahead_and_no_more(threads: int) -> None:
    begun, last = [], threading.Event()

    def make(number: int) -> int:
        begun.append(number)
        if len(begun) == threads + 1:
            last.set()
        return number

    made = made_ahead(make, 0, threads)
    assert begun == []
    assert next(made) == 0
    assert last.wait(10)
    time.sleep(0.1)
    assert sorted(begun) == list(range(threads + 1))


def test_what_fails_fails_where_its_turn_comes() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    made = made_ahead(make, 0, 4)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(made)


def test_once_closed_nothing_more_is_begun() -> None:
    begun, go_on = [], threading.Event()

    def make(number: int) -> int:
        begun.append(number)
        if number:
            assert go_on.wait(10)
        return number

    made = made_ahead(make, 0, 1)
    assert next(made) == 0
    made.close()
    go_on.set()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("ahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert begun in ([0], [0, 1])
