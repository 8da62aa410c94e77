"""Chunks that a worker has read, kept for the slabs that come next: neighbours read some of the same.

A slab's halo is a few voxels, but storage gives whole chunks: if each slab reads for itself, a large volume in chunks
of ours is read 5.5 times. A worker's slabs mostly come in storage order, x fastest, so it is known which slab wants a
chunk next: what is wanted along x takes a few chunks, along y a row of slabs, along z a layer of them.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.geometry import Box, Cut, Span, cells_of, hull_of, spans_of
from nrrn_pipeline.machine import free_memory_bytes, memory_limit_bytes
from nrrn_pipeline.slabs import Slab, Slabs
from nrrn_pipeline.stopwatch import note
from nrrn_pipeline.volume import Volume, read_box

KEEP_GB = 3.2  # of a worker, at most: all that is wanted again of slices of 4000 x 6000 voxels of two bytes
IDLE_S = 600.0  # after which a worker that is given no more slabs lets go of them
READ_SHARE = 8  # what is read at a time takes no more than this part of what may be held
FREE_SHARE = 4  # what is held grows by no more than this part of what is free, each time
AGAIN = 8  # slabs: no further back lies one that is tried again, or that another thread reads

Place = tuple[int, int, int]  # along z, y, x: of a chunk in the volume, or of a slab in the plan


@dataclass(frozen=True)
class Keeping:
    """That a run's workers keep chunks, `most_bytes` each. `run`: its name, as nothing outlives it.

    beside_bytes: what else a worker takes, for those who do not know how much memory there is where it runs.
    """

    run: str
    most_bytes: int
    beside_bytes: int = 0

    def room(self, held_bytes: int, for_others: int = 0) -> int:
        """Bytes that this process may hold now, of which it holds some, and some more for other runs.

        It takes no more than a part of what is free, so that several processes on one machine that know nothing of each
        other leave room for all.
        """
        within = min(self.most_bytes, memory_limit_bytes() - self.beside_bytes) - for_others
        return max(0, min(within, held_bytes + free_memory_bytes() // FREE_SHARE))


class Along:
    """Along one axis: which chunks, by number, each cut reads, and which cuts read a chunk."""

    def __init__(self, cuts: Sequence[Cut], chunk: int, length: int) -> None:
        self.chunk, self.length = chunk, length
        self.number = {cut.keep.start: number for number, cut in enumerate(cuts)}
        self.first = [cut.read.start // chunk for cut in cuts]
        self.end = [-(-cut.read.stop // chunk) for cut in cuts]

    def whole(self, first: int, end: int | None = None) -> Span:
        """The voxels of one chunk, or of several."""
        return Span(first * self.chunk, min((first + 1 if end is None else end) * self.chunk, self.length))

    def readers(self, chunk: int) -> tuple[int, int]:
        """The first and the last cut that read a chunk."""
        return bisect_right(self.end, chunk), bisect_right(self.first, chunk) - 1

    @property
    def touched(self) -> list[int]:
        """Voxels that each cut reads, in whole chunks."""
        return [len(self.whole(*ends)) for ends in zip(self.first, self.end, strict=True)]

    @property
    def once(self) -> int:
        """Voxels that all of them read, each counted once."""
        return sum(self.touched) - sum(self.again)

    @property
    def again(self) -> list[int]:
        """Voxels, in whole chunks, that each cut but the first reads after the one before it."""
        ends = zip(self.first[1:], self.end[:-1], strict=True)
        return [len(self.whole(first, end)) if first < end else 0 for first, end in ends]


def along_axes(source: Volume, slabs: Slabs) -> tuple[Along, Along, Along]:
    """Of the slabs that read a source."""
    z, y, x = (Along(*of) for of in zip(slabs.axes, source.chunk, source.shape, strict=True))
    return z, y, x


def axes_shared(source: Volume, slabs: Slabs, most_bytes: int) -> int:
    """Along how many axes, of x, y, z in this order, no chunk is read twice by a worker that keeps `most_bytes`."""
    if _layer_bytes(source, slabs, max) * READ_SHARE > most_bytes:
        return 0
    return bisect_right(_wanted_bytes(source, slabs), most_bytes)


def kept_bytes(source: Volume, slabs: Slabs, most_bytes: int) -> int:
    """Memory that a worker takes which keeps chunks, at most: what it keeps, and what it reads at a time, twice."""
    if _layer_bytes(source, slabs, min) * READ_SHARE > most_bytes:
        return 0  # no slab's chunks are small enough
    slab, *_, layer = _wanted_bytes(source, slabs)
    return min(most_bytes, layer) + 2 * min(most_bytes // READ_SHARE, slab)


def _layer_bytes(source: Volume, slabs: Slabs, of: Callable[[list[int]], int]) -> int:
    """Of one layer of the chunks that a slab reads, of the largest slab or the smallest."""
    _, *sides = along_axes(source, slabs)
    return min(source.chunk[0], source.shape[0]) * prod(of(axis.touched) for axis in sides) * source.itemsize


def _wanted_bytes(source: Volume, slabs: Slabs) -> list[int]:
    """At most, to read no chunk twice along x; y too; z too. All of it is of what one layer of slabs reads."""
    z, y, x = along_axes(source, slabs)
    deep, high, wide = (max(axis.touched) for axis in (z, y, x))
    of_z, of_y = (max(axis.again, default=0) for axis in (z, y))
    slab = deep * high * wide
    most = deep * y.once * x.once
    row = min(slab + deep * of_y * x.once, most)
    layer = min(row + of_z * (y.once + high) * x.once, most)
    return [voxels * source.itemsize for voxels in (slab, row, layer)]


def fetched_by(source: Volume, slabs: Slabs, most_bytes: int, workers: int = 1) -> int:
    """Voxels that storage gives to workers that keep so much each, in whole chunks, each as often as it comes: at most.

    Of several workers each has neighbouring slabs, as many as the others: where two meet, both read, at most what lies
    between two layers, two rows and two slabs. What the faster take over from the slower, at the end, is not counted.
    """
    axes = along_axes(source, slabs)
    shared = axes_shared(source, slabs, most_bytes)
    alone = prod(sum(axis.touched) for axis in axes)
    kept = prod(axis.once if 3 - shared <= number else sum(axis.touched) for number, axis in enumerate(axes))
    return min(alone, kept + (workers - 1) * _seam(*axes))


def _seam(z: Along, y: Along, x: Along) -> int:
    deep, high = (max(axis.touched) for axis in (z, y))
    of_z, of_y, of_x = (max(axis.again, default=0) for axis in (z, y, x))
    return of_z * y.once * x.once + deep * of_y * x.once + deep * high * of_x


class Shelf:
    """The chunks of a source that its next slabs want, and the reading of slabs with them, one at a time.

    Voxels are those of read_box, whatever was read before, in any order.
    """

    def __init__(self, source: Volume, slabs: Slabs, keeping: Keeping) -> None:
        self.source, self.keeping = source, keeping
        self.axes = along_axes(source, slabs)
        self.held_bytes = 0
        self._kept: dict[Place, NDArray[Any]] = {}
        self._by_last_reader: list[tuple[Place, Place]] = []  # a heap of slabs and chunks
        self._latest: Place = (0, 0, 0)  # slab
        self._reading = threading.Lock()

    def read(self, slab: Slab) -> NDArray[Any]:
        """The voxels of `slab.read`. Raises what read_box raises."""
        waiting = perf_counter()
        with self._reading:
            note("wait", perf_counter() - waiting)
            found = self._read(slab)
        return read_box(self.source, slab.read) if found is None else found

    def _read(self, slab: Slab) -> NDArray[Any] | None:
        """None: its chunks are too large to be read with all that is in them."""
        now = self._place_of(slab)
        if self._number(now) + AGAIN < self._number(self._latest):
            self._clear()  # what is wanted after the latest is not wanted here
        self._latest = now
        parts = {self._chunk_of(part): part for part in cells_of(slab.read, self.source.chunk)}
        lacking = {chunk: part for chunk, part in parts.items() if chunk not in self._kept}
        voxels = np.empty(slab.read.shape, self.source.dtype)
        for chunk in parts.keys() - lacking.keys():
            voxels[parts[chunk].within(slab.read)] = self._kept[chunk][parts[chunk].within(self._whole(chunk))]
        while self._by_last_reader and self._by_last_reader[0][0] <= now:
            self._drop(heappop(self._by_last_reader)[1])
        room = self.keeping.room(self.held_bytes, _held_for_others(self))
        bands = self._bands([self._whole(chunk) for chunk in lacking], room // READ_SHARE)
        for band in bands or []:
            fetched = read_box(self.source, band)
            for chunk, part in lacking.items():
                if part.z.meets(band.z):
                    voxels[part.within(slab.read)] = fetched[part.within(band)]
                    self._keep(chunk, fetched[self._whole(chunk).within(band)], now)
            self._make_room(now, room)
        return None if bands is None else voxels

    def _bands(self, chunks: list[Box], most_bytes: int) -> list[Box] | None:
        """Boxes that hold some whole chunks, each small enough to be read at a time; None: no layer of them is."""
        if not chunks:
            return []
        hull = hull_of(chunks)
        deep = min(self.source.chunk[0], self.source.shape[0])
        layers = most_bytes // (deep * len(hull.y) * len(hull.x) * self.source.itemsize)
        return [Box(z, hull.y, hull.x) for z in spans_of(hull.z, layers * deep)] if layers else None

    def _number(self, place: Place) -> int:
        """Of a slab, in storage order."""
        z, y, x = place
        return (z * len(self.axes[1].first) + y) * len(self.axes[2].first) + x

    def _clear(self) -> None:
        self._kept.clear()
        self._by_last_reader.clear()
        self.held_bytes = 0

    def _place_of(self, slab: Slab) -> Place:
        z, y, x = (axis.number[span.start] for axis, span in zip(self.axes, slab.keep.spans, strict=True))
        return z, y, x

    def _chunk_of(self, part: Box) -> Place:
        z, y, x = (span.start // axis.chunk for axis, span in zip(self.axes, part.spans, strict=True))
        return z, y, x

    def _whole(self, chunk: Place) -> Box:
        return Box(*(axis.whole(number) for axis, number in zip(self.axes, chunk, strict=True)))

    def _keep(self, chunk: Place, voxels: NDArray[Any], now: Place) -> None:
        z, y, x = (axis.readers(number)[1] for axis, number in zip(self.axes, chunk, strict=True))
        if (z, y, x) > now:
            self._kept[chunk] = voxels.copy()  # not a part of what was read, which would stay whole
            self.held_bytes += voxels.nbytes
            heappush(self._by_last_reader, ((z, y, x), chunk))

    def _drop(self, chunk: Place) -> None:
        if (voxels := self._kept.pop(chunk, None)) is not None:
            self.held_bytes -= voxels.nbytes

    def _make_room(self, now: Place, most_bytes: int) -> None:
        """Drop what is wanted the latest, until no more is held."""
        if self.held_bytes <= most_bytes:
            return
        for chunk in sorted(self._kept, key=lambda chunk: self._next_reader(chunk, now), reverse=True):
            if self.held_bytes <= most_bytes:
                return
            self._drop(chunk)

    def _next_reader(self, chunk: Place, now: Place) -> Place:
        """The first slab after `now` that reads a chunk which some slab after it reads."""
        (z0, z1), (y0, y1), (x0, x1) = (axis.readers(i) for axis, i in zip(self.axes, chunk, strict=True))
        z, y, x = now
        if z0 <= z <= z1:
            if y0 <= y <= y1 and x < x1:
                return z, y, max(x + 1, x0)
            if y < y1:
                return z, max(y + 1, y0), x0
        return max(z + 1, z0), y0, x0


@dataclass
class _Used:
    """A run's shelf; how many slabs are being done with it, and since there is none, what will let go of it."""

    shelf: Shelf
    slabs: int = 0
    timer: threading.Timer | None = None


_shelves: dict[str, _Used] = {}  # of runs
_choosing = threading.Lock()


@contextmanager
def using_shelf(source: Volume, slabs: Slabs, keeping: Keeping) -> Iterator[Shelf]:
    """This process's for a run, while one of its slabs is done.

    Each run has its own, as the source may have changed since the last. One with which no slab is done goes when
    another run's is made, or after IDLE_S, whatever became of the driver.
    """
    with _choosing:
        if keeping.run not in _shelves:
            for run in [run for run, used in _shelves.items() if not used.slabs]:
                _let_go(run)
            _shelves[keeping.run] = _Used(Shelf(source, slabs, keeping))
        used = _shelves[keeping.run]
        used.slabs += 1
        if used.timer is not None:
            used.timer.cancel()
    try:
        yield used.shelf
    finally:
        with _choosing:
            used.slabs -= 1
            if not used.slabs and _shelves.get(keeping.run) is used:
                used.timer = threading.Timer(IDLE_S, _drop_unused, [keeping.run])
                used.timer.daemon = True
                used.timer.start()


def drop_shelf(run: str | None = None) -> None:
    """Let go of what this process keeps for a run, or for any."""
    with _choosing:
        for each in list(_shelves) if run is None else [run]:
            _let_go(each)


def _drop_unused(run: str) -> None:
    with _choosing:
        if run in _shelves and not _shelves[run].slabs:
            _let_go(run)


def _let_go(run: str) -> None:
    used = _shelves.pop(run, None)
    if used is not None and used.timer is not None:
        used.timer.cancel()


def _held_for_others(shelf: Shelf) -> int:
    with _choosing:
        return sum(used.shelf.held_bytes for used in _shelves.values() if used.shelf is not shelf)
