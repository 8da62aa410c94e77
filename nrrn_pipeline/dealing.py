"""Items dealt to hands: each hand gets neighbours, in order, and none is idle while there are any."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Deal:
    """Each hand has a part of the items' numbers; one that has none left takes half of the largest part that is left.

    A hand that comes later does so at once, and one that stops loses nothing: others take what it has left.
    """

    def __init__(self, count: int, hands: Sequence[Hashable]) -> None:
        many = max(1, len(hands))
        ends = [count * number // many for number in range(many + 1)]
        self._parts = {hand: range(*ends[number : number + 2]) for number, hand in enumerate(hands or [None])}

    def take(self, hand: Hashable) -> int | None:
        """The next number for a hand; None: all are taken."""
        part = self._parts.pop(hand, None) or self._half_of_the_largest()
        self._leave(hand, part[1:])
        return part[0] if part else None

    def _leave(self, hand: Hashable, part: range) -> None:
        if part:
            self._parts[hand] = part

    def _half_of_the_largest(self) -> range:
        """The later one: its hand goes on where it is."""
        if not self._parts:
            return range(0)
        hand = max(self._parts, key=lambda one: len(self._parts[one]))
        part = self._parts.pop(hand)
        self._leave(hand, part[: len(part) // 2])
        return part[len(part) // 2 :]


def dealt(items: Iterable[T], hands: Sequence[Hashable]) -> Callable[[Hashable], tuple[T] | None]:
    """What a hand gets next: of a sequence neighbours, else whatever comes; None: nothing is left."""
    if not isinstance(items, Sequence):
        stream = iter(items)
        return lambda _: next(((item,) for item in stream), None)
    deal = Deal(len(items), hands)

    def following(hand: Hashable) -> tuple[T] | None:
        number = deal.take(hand)
        return None if number is None else (items[number],)

    return following
