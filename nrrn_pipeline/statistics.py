"""Mean and standard deviation of every slice, over the whole slice, so that no tile or slab shows in the output.

Each task measures a box; boxes are merged in one fixed order (Chan, Golub & LeVeque 1979), so the result does not
depend on which worker was first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span, boxes_of
from nrrn_pipeline.volume import Volume, read_box

CACHED = 2**18  # voxels that are summed up at a time
MAX_VOXELS = 2**25  # of one task's box: 32 MiB of uint8


@dataclass(frozen=True)
class Moments:
    """Of some voxels of one slice: how many, their mean, and the sum of their squared deviations from it."""

    count: int
    mean: float
    squares: float

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of voxels together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)


MeasuredBox = tuple[Box, tuple[Moments, ...]]  # a box, and the moments of each slice's part in it


@dataclass(frozen=True)
class SliceStatistics:
    """Mean and standard deviation, in grey levels, of slices first_z, first_z + 1, ...; std 0 marks a blank slice."""

    first_z: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, z: Span) -> SliceStatistics:
        """Those of some of the slices. Raises ValueError if not all of them were measured."""
        if not self.z.start <= z.start <= z.stop <= self.z.stop:
            raise ValueError(f"slices {z} are wanted, {self.z} were measured")
        part = slice(z.start - self.first_z, z.stop - self.first_z)
        return SliceStatistics(z.start, self.mean[part], self.std[part])

    @property
    def z(self) -> Span:
        """The slices."""
        return Span(self.first_z, self.first_z + len(self.mean))

    def followed_by(self, later: SliceStatistics) -> SliceStatistics:
        """These and those of the slices right after."""
        return SliceStatistics(self.first_z, self.mean + later.mean, self.std + later.std)

    def pooled(self) -> SliceStatistics:
        """One mean and std, those of all voxels, for every slice; blank slices stay marked.

        All slices have the same number of voxels.
        """
        mean = float(np.mean(self.mean))
        std = float(np.sqrt(np.mean(np.square(self.std) + np.square(np.array(self.mean) - mean))))
        return SliceStatistics(
            self.first_z, (mean,) * len(self.mean), tuple(std if own > 0 else 0.0 for own in self.std)
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of dataclasses.asdict, also by way of JSON, which keeps floats to the last bit."""
        mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
        if len(mean) != len(std):
            raise ValueError(f"{len(mean)} means and {len(std)} standard deviations")
        return cls(int(fields["first_z"]), mean, std)


def statistics_boxes(volume: Volume, z: Span) -> tuple[Box, ...]:
    """Boxes of whole write units that cover the slices `z`, of at most MAX_VOXELS unless one unit is larger."""
    whole, step = statistics_grid(volume, z)
    return tuple(Box(box.z.grown(0, z), box.y, box.x) for box in boxes_of(whole, step))


def statistics_grid(volume: Volume, z: Span) -> tuple[Box, Shape]:
    """What is cut into these boxes, from the start of a write unit on, and their size; clipped to `z`."""
    step = list(volume.write_unit)
    for axis in (2, 1):  # whole rows, then whole slices, as far as memory allows
        while step[axis] < volume.shape[axis] and 2 * int(np.prod(step)) <= MAX_VOXELS:
            step[axis] *= 2
    deep = Span(z.start - z.start % step[0], z.stop)  # on the chunk grid, so that no chunk is read twice
    whole = Box(deep, volume.box.y, volume.box.x)
    return whole, (step[0], step[1], step[2])


def measure_box(volume: Volume, box: Box) -> MeasuredBox:
    """The moments of each slice's part in the box.

    Raises InputError if a voxel is not a finite number.
    """
    return box, tuple(moments_of(read_box(volume, box), box.z.start, volume.url))


def moments_of(voxels: NDArray[Any], first_z: int, url: str) -> Iterator[Moments]:
    """The moments of each of some slices' (z, y, x) voxels, which begin at first_z of `url`.

    Raises InputError if a voxel is not a finite number.
    """
    for z, plane in enumerate(voxels, start=first_z):
        if not np.isfinite(plane).all():
            raise InputError.not_finite(url, z)
        yield _moments(plane)


def _moments(plane: NDArray[Any]) -> Moments:
    """Of integers exact, of floats summed pairwise; never by BLAS, whose sums depend on its number of threads."""
    count = plane.size
    if plane.dtype.kind == "u":
        total = squares = 0
        for rows in np.array_split(plane, -(-count // CACHED)):
            wide = rows.astype(np.int64)
            total, squares = total + int(wide.sum()), squares + int(np.square(wide).sum())
        return Moments(count, total / count, (squares * count - total**2) / count)
    first = float(plane.flat[0])  # a blank slice then has deviations, and so a std, of exactly 0
    values = plane.astype(np.float64) - first
    shift = float(values.mean())
    values -= shift
    return Moments(count, first + shift, float(np.square(values).sum()))


def document_of(part: MeasuredBox) -> dict[str, Any]:
    """A measured box as JSON, which keeps floats to the last bit."""
    box, moments = part
    return {"box": str(box), "moments": [[each.count, each.mean, each.squares] for each in moments]}


def measured_box(document: dict[str, Any]) -> MeasuredBox:
    """The inverse of document_of. Raises ValueError and its like for anything else."""
    box = Box.parse(document["box"])
    moments = tuple(Moments(int(count), float(mean), float(squares)) for count, mean, squares in document["moments"])
    if len(moments) != len(box.z):
        raise ValueError(f"{len(moments)} slices measured in {box}")
    return box, moments


def merge_boxes(parts: Iterable[MeasuredBox]) -> SliceStatistics:
    """The statistics of all slices that the measured boxes cover."""
    slices: dict[int, Moments] = {}
    for box, moments in sorted(parts, key=lambda part: part[0]):
        for z, found in enumerate(moments, start=box.z.start):
            slices[z] = slices[z].merged(found) if z in slices else found
    order = sorted(slices)
    return SliceStatistics(
        first_z=order[0],
        mean=tuple(slices[z].mean for z in order),
        std=tuple(float(np.sqrt(slices[z].squares / slices[z].count)) for z in order),
    )
