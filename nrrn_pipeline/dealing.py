"""Items dealt to lanes: each lane gets neighbours, in order, and none is idle while there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Deal:
    """Each lane has a part of the items' numbers; one that has none left takes half of the largest part that is left.

    A lane that comes later does so at once, and one that stops loses nothing: others take what it has left.
    """

    def __init__(self, count: int, lanes: int) -> None:
        ends = [count * lane // lanes for lane in range(lanes + 1)]
        self._parts = {lane: range(*ends[lane : lane + 2]) for lane in range(lanes)}

    def take(self, lane: int) -> int | None:
        """The next number for a lane; None: all are taken."""
        part = self._parts.get(lane) or self._half_of_the_largest()
        self._parts[lane] = part[1:]
        return part[0] if part else None

    def _half_of_the_largest(self) -> range:
        """The later one: its lane goes on where it is."""
        lane = max(self._parts, key=lambda one: len(self._parts[one]))
        part = self._parts[lane]
        self._parts[lane] = part[: len(part) // 2]
        return part[len(part) // 2 :]


def dealt(items: Iterable[T], lanes: int) -> Callable[[int], tuple[T] | None]:
    """What a lane gets next: of a sequence neighbours, else whatever comes; None: nothing is left."""
    if not isinstance(items, Sequence):
        stream = iter(items)
        return lambda _: next(((item,) for item in stream), None)
    deal = Deal(len(items), lanes)

    def following(lane: int) -> tuple[T] | None:
        number = deal.take(lane)
        return None if number is None else (items[number],)

    return following
