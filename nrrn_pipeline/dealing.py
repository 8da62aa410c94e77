"""Items dealt to hands: each hand gets neighbours, in order, and none is idle while there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Deal:
    """Each hand has a part of the items' numbers; one that has none left takes half of the largest part that is left.

    A hand that comes later does so at once, and one that stops loses nothing: others take what it has left.
    """

    def __init__(self, count: int, hands: int) -> None:
        ends = [count * hand // hands for hand in range(hands + 1)]
        self._parts = {hand: range(*ends[hand : hand + 2]) for hand in range(hands)}

    def take(self, hand: int) -> int | None:
        """The next number for a hand; None: all are taken."""
        part = self._parts.get(hand) or self._half_of_the_largest()
        self._parts[hand] = part[1:]
        return part[0] if part else None

    def _half_of_the_largest(self) -> range:
        """The later one: its hand goes on where it is."""
        hand = max(self._parts, key=lambda one: len(self._parts[one]))
        part = self._parts[hand]
        self._parts[hand] = part[: len(part) // 2]
        return part[len(part) // 2 :]


def dealt(items: Iterable[T], hands: int) -> Callable[[int], tuple[T] | None]:
    """What a hand gets next: of a sequence neighbours, else whatever comes; None: nothing is left."""
    if not isinstance(items, Sequence):
        stream = iter(items)
        return lambda _: next(((item,) for item in stream), None)
    deal = Deal(len(items), hands)

    def following(hand: int) -> tuple[T] | None:
        number = deal.take(hand)
        return None if number is None else (items[number],)

    return following
