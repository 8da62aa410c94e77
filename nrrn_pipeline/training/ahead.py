"""Things made before they are asked for, so that who uses them need not wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

Made = TypeVar("Made")


def made_ahead(make: Callable[[int], Made], first: int, threads: int) -> Generator[Made, None, None]:
    """make(first), make(first + 1), ... in order, for ever; as many as there are threads are made ahead.

    What `make` raises is raised where its turn comes. Once closed, nothing more is begun.
    """
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        coming = deque(pool.submit(make, number) for number in range(first, first + threads))
        for number in count(first + threads):
            made = coming.popleft().result()
            coming.append(pool.submit(make, number))
            yield made
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
