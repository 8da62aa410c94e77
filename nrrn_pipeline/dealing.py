"""Who of several workers gets which items of a sequence: each gets neighbours, in order, and nobody waits."""

from __future__ import annotations

from collections.abc import Sequence


class Deal:
    """Each worker has a part of the items' numbers; who has none left takes half of the largest part that is left.

    Workers come and go: a newcomer takes half of a part likewise, and the part of one who is gone is others' to take.
    """

    def __init__(self, count: int, workers: Sequence[str]) -> None:
        ends = [count * n // max(1, len(workers)) for n in range(max(1, len(workers)) + 1)]
        self._parts = {who: range(*ends[n : n + 2]) for n, who in enumerate(workers or [""])}

    def take(self, worker: str) -> int | None:
        """The next number for a worker; None: all are taken."""
        part = self._parts.get(worker) or self._half_of_the_largest()
        self._parts[worker] = part[1:]
        return part[0] if part else None

    def _half_of_the_largest(self) -> range:
        """The later one: its worker goes on where it is."""
        worker = max(self._parts, key=lambda who: len(self._parts[who]))
        part = self._parts[worker]
        middle = len(part) // 2
        self._parts[worker] = part[:middle]
        return part[middle:]
