"""Cutting an axis into pieces whose kept parts tile it, each read with the halo that makes its kept part exact.

    volume   |------------------------------------------------|
    cut i            |halo|==========keep==========|halo|
                     |<------------- read ------------->|

All positions are voxels, half-open, in z, y, x order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Self

Shape = tuple[int, int, int]


@dataclass(frozen=True, order=True)
class Span:
    """Voxels start <= i < stop of one axis."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def within(self, origin: Span) -> slice:
        """This span as a slice of an array that holds `origin`."""
        return slice(self.start - origin.start, self.stop - origin.start)

    def meets(self, other: Span) -> bool:
        """Whether they have a voxel in common."""
        return self.start < other.stop and other.start < self.stop

    def grown(self, halo: int, bounds: Span) -> Span:
        """`halo` voxels more on each side, but none outside `bounds`."""
        return Span(max(self.start - halo, bounds.start), min(self.stop + halo, bounds.stop))

    def moved(self, by: int) -> Span:
        """As many voxels, so many further on."""
        return Span(self.start + by, self.stop + by)

    def around(self, at: int, side: int) -> Span:
        """`side` voxels around one, all of them in this span, or all of it if it is shorter."""
        start = max(self.start, min(at - side // 2, self.stop - side))
        return Span(start, min(start + side, self.stop))

    def middle(self, side: int) -> Span:
        """`side` voxels in its middle, or all of it if it is shorter."""
        start = self.start + max(0, len(self) - side) // 2
        return Span(start, min(start + side, self.stop))

    def aligned(self, grid: int) -> Span:
        """The same, begun at the multiple of `grid` voxels before."""
        return Span(self.start // grid * grid, self.stop)


@dataclass(frozen=True, order=True)
class Cut:
    """One piece of an axis: `keep` is written, `read` (which holds it) is what must be read for that."""

    keep: Span
    read: Span

    @property
    def crop(self) -> slice:
        """`keep` as a slice of an array that holds `read`."""
        return self.keep.within(self.read)


@dataclass(frozen=True, order=True)
class Box:
    """A cuboid of voxels."""

    z: Span
    y: Span
    x: Span

    @property
    def spans(self) -> tuple[Span, Span, Span]:
        """The three spans in z, y, x order."""
        return self.z, self.y, self.x

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""
        return len(self.z), len(self.y), len(self.x)

    @property
    def size(self) -> int:
        """Voxels in all."""
        return len(self.z) * len(self.y) * len(self.x)

    def within(self, origin: Box) -> tuple[slice, slice, slice]:
        """This box as slices of an array that holds `origin`."""
        return self.z.within(origin.z), self.y.within(origin.y), self.x.within(origin.x)

    def shifted(self, origin: Box) -> Box:
        """The same voxels, counted from the first of `origin`."""
        return Box(*(span.moved(-of.start) for span, of in zip(self.spans, origin.spans, strict=True)))

    def moved(self, by: Shape) -> Box:
        """As many voxels, so many further on along z, y, x."""
        return Box(*(span.moved(step) for span, step in zip(self.spans, by, strict=True)))

    def __str__(self) -> str:
        return ",".join(map(str, self.spans))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of str: "0:8,0:512,0:512" in z, y, x order. Raises ValueError for any other text."""
        z, y, x = (tuple(int(end) for end in part.split(":")) for part in text.split(","))
        if not len(z) == len(y) == len(x) == 2:
            raise ValueError(f"{text!r} does not give two ends for each axis")
        return cls(Span(*z), Span(*y), Span(*x))


def box_of(shape: Shape) -> Box:
    """The box of a whole volume."""
    z, y, x = shape
    return Box(Span(0, z), Span(0, y), Span(0, x))


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same voxels of spans that do not overlap, in order; those that touch become one."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and found[-1].stop == span.start:
            found[-1] = Span(found[-1].start, span.stop)
        else:
            found.append(span)
    return found


def hull_of(boxes: Collection[Box]) -> Box:
    """The smallest box that holds all of these, of which there is one at least."""
    along = ([box.spans[axis] for box in boxes] for axis in range(3))
    return Box(*(Span(min(span.start for span in spans), max(span.stop for span in spans)) for spans in along))


def spans_of(span: Span, step: int) -> Iterator[Span]:
    """`span` in pieces of `step` voxels from its start on, the last one as long as what is left."""
    for start in range(span.start, span.stop, step):
        yield Span(start, min(start + step, span.stop))


def boxes_of(box: Box, step: Shape) -> Iterator[Box]:
    """`box` in pieces of `step` voxels, x fastest: the grid that slabs and storage units share."""
    for z in spans_of(box.z, step[0]):
        for y in spans_of(box.y, step[1]):
            for x in spans_of(box.x, step[2]):
                yield Box(z, y, x)


def cells_along(span: Span, step: int) -> Iterator[Span]:
    """`span` in the pieces that a grid of `step` voxels, anchored at voxel 0, cuts it into."""
    for start in range(span.start // step * step, span.stop, step):
        yield Span(max(start, span.start), min(start + step, span.stop))


def cells_of(box: Box, step: Shape) -> Iterator[Box]:
    """`box` in the pieces that a grid of `step` voxels, anchored at voxel 0, cuts it into, x fastest."""
    for z in cells_along(box.z, step[0]):
        for y in cells_along(box.y, step[1]):
            for x in cells_along(box.x, step[2]):
                yield Box(z, y, x)


def tiles_of(keep: Span, bounds: Span, window: int, halo: int, grid: int = 1) -> tuple[Cut, ...]:
    """The fewest cuts that keep all of `keep`, each reading at most `window` voxels, all of them equally many.

    A read never leaves `bounds`; where it meets a bound it stays flush with it, so that what the network does at a
    slice's own border happens at the border and nowhere else. Kept parts differ by at most one voxel in length:
    two windows of 135 cost less than one of 256 and one of 14.

    With a `grid` every read begins at a multiple of it, as `bounds` does: so a network that pools over 2 x 2 voxels
    pools the same ones in every tile. Then reads are as long as they need be.

    Raises ValueError if a window of `window` voxels keeps nothing once its halo is discarded.
    """
    if window < 2 * halo + grid and window < len(bounds):
        raise ValueError(f"a tile of {window} voxels with a halo of {halo} on each side keeps nothing")
    for pieces in count(-(-len(keep) // window)):
        kept = [
            Span(keep.start + i * len(keep) // pieces, keep.start + (i + 1) * len(keep) // pieces)
            for i in range(pieces)
        ]
        reads = [span.grown(halo, bounds).aligned(grid) for span in kept]
        longest = max(map(len, reads))
        if longest <= window:
            if grid == 1:
                reads = [_read(span, longest, bounds, halo) for span in kept]
            return tuple(Cut(span, read) for span, read in zip(kept, reads, strict=True))
    raise AssertionError("unreachable: one voxel with its halo fits every valid window")


def _read(keep: Span, length: int, bounds: Span, halo: int) -> Span:
    """`length` voxels in `bounds` that hold `keep` and its halo."""
    start = min(max(keep.start - halo, bounds.start), bounds.stop - length)
    return Span(start, start + length)
