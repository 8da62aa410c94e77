"""Lanes: threads that give a network one tile each, at the same time, and share the threads of their process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

GPU_LANES = 2  # one tile is copied, or made ready, while the other computes
CPU_LANES = 2  # each holds what the network makes of its tile
START_S = 60.0  # for threads to start

T = TypeVar("T")


def cpu_lanes(threads: int, tiles: int) -> int:
    """How many of a slab's tiles to compute at a time: more if all threads are busy then to the end.

    A tile on one thread takes less than twice as long as on two, which wait for each other after every layer.
    """
    return next(lanes for lanes in range(CPU_LANES, 0, -1) if threads % lanes == 0 and tiles % lanes == 0)


def in_lanes(lanes: int, work: Callable[[T], object], items: Iterable[T]) -> None:
    """One after the other, so many at a time; when one fails the rest is not begun, and what was begun is finished."""
    if lanes == 1:
        for item in items:
            work(item)
        return
    pool = _lanes(lanes, torch.get_num_threads())
    begun = [pool.submit(work, item) for item in items]
    try:
        for each in begun:
            each.result()
    finally:
        for each in begun:
            each.cancel()
        wait(begun)


@cache
def _lanes(lanes: int, threads: int) -> ThreadPoolExecutor:
    """They live as long as the process: each has a stream of a GPU, and what was learnt of its algorithms."""
    begun = Barrier(lanes + 1, timeout=START_S)

    def begin() -> None:
        torch.get_num_threads()  # takes what new threads get, which the first use of torch would do after the next line
        torch.set_num_threads(max(1, threads // lanes))  # what this one gets, and new ones
        begun.wait()

    pool = ThreadPoolExecutor(lanes, thread_name_prefix="tile", initializer=begin)
    for _ in range(lanes):
        pool.submit(int)
    begun.wait()
    torch.set_num_threads(threads)  # new ones, as before
    return pool
