"""Levels of lower resolution, for viewers: each voxel the mean of those that it covers; made slab by slab.

    level 0      |--|--|--|--|--|--|--|        voxels of 5 nm
    level 1      |-----|-----|-----|-----|     10 nm; the last covers what there is

Axes are halved that are finest by now, so that voxels become as long in z as in y and x where they are not; until the
whole volume is one chunk. A mean over whole voxels does not depend on how the volume is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span, box_of
from nrrn_pipeline.slabs import SHARD, Slab, VolumeCopyPlan, fitted
from nrrn_pipeline.volume import Volume, get_provenance, open_volume, read_box

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before
ALIKE = 2**0.5  # an axis is halved with the finest if its voxels are less than so many times as long


@dataclass(frozen=True)
class PyramidPlan(VolumeCopyPlan):
    """One level of a volume's group out of the level before."""

    source: Volume
    target: Volume
    factors: Shape
    is_level = True

    @property
    def stage(self) -> str:  # type: ignore[override]
        """Each level has its own."""
        return f"level {self.target.level_path}"

    @property
    def slab(self) -> Shape:  # type: ignore[override]
        """A shard; of Zarr 2, which has none, as many chunks."""
        unit = self.target.write_unit
        return unit if self.target.zarr_format == 3 else fitted(SHARD, self.target.shape, unit)

    @property
    def settings(self) -> dict[str, Any]:
        """See Plan."""
        return {
            "algorithm": ALGORITHM,
            "level of": self.source.level_path,
            "factors": list(self.factors),
            "source shape": list(self.source.shape),
            **self.target_settings,
        }

    @property
    def slab_bytes(self) -> int:
        """What a slab is made of, itself, and the sums of one of its slices."""
        shape = self.slabs.largest().keep.shape
        covered = self.covered(box_of(shape)).size
        return (covered + self.slabs.largest().keep.size) * self.target.itemsize + 8 * covered // shape[0]

    def voxels(self, slab: Slab) -> NDArray[Any]:
        """The means of what the slab's voxels cover."""
        covered = self.covered(slab.keep)
        fine = read_box(self.source, covered)
        found = np.empty(slab.keep.shape, self.target.dtype)
        for z in range(len(found)):
            found[z] = _means(fine[z * self.factors[0] : (z + 1) * self.factors[0]], self.factors)[0]
        return found

    def covered(self, box: Box) -> Box:
        """What of the level before a box covers."""
        spans = zip(box.spans, self.factors, self.source.shape, strict=True)
        return Box(*(Span(span.start * factor, min(span.stop * factor, length)) for span, factor, length in spans))


def covering(plan: PyramidPlan, boxes: Iterable[Box]) -> set[Box]:
    """What the slabs of a level write that cover voxels of these boxes of the level before."""
    found = set[Box]()
    for box in boxes:
        rows = []
        for span, factor, size, whole in zip(box.spans, plan.factors, plan.slab, plan.target.box.spans, strict=True):
            first, last = span.start // factor // size, (span.stop - 1) // factor // size
            rows.append([Span(at * size, min((at + 1) * size, whole.stop)) for at in range(first, last + 1)])
        found |= {Box(*spans) for spans in product(*rows)}
    return found


def plans_above(level: Volume) -> list[PyramidPlan]:
    """The plans of the levels that are made of a level of a group, one out of the other."""
    if not level.level_path.isdecimal():
        return []
    number = int(level.level_path)
    return plan_pyramid(open_volume(level.group_url) if number else level)[number:]


def plan_pyramid(base: Volume) -> list[PyramidPlan]:
    """The plans of all levels below a volume, to be carried out in their order.

    For volumes of ours, whose first level is 0: see refuse_foreign.
    """
    return list(_levels(base))


def refuse_foreign(base: Volume) -> None:
    """Raises InputError if the volume is not one of ours, or not complete: levels are added to no other."""
    if base.level_path != "0" or "fingerprint" not in (made := get_provenance(base.group_url) or {}):
        raise InputError(f"{base.group_url} was not made by nrrn: bring it in with nrrn ingest, and add levels to that")
    if made.get("state") != "complete":
        raise InputError(f"{base.group_url} is {made.get('state')}: levels are added to what is complete")


def _levels(level: Volume) -> Iterator[PyramidPlan]:
    base = level
    for number in range(1, 64):
        factors = _factors(level)
        if max(factors) == 1:
            return
        depth, height, width = (-(-length // factor) for length, factor in zip(level.shape, factors, strict=True))
        shape = (depth, height, width)
        chunk = fitted(base.chunk, shape, (1, 1, 1))
        size = tuple(length * factor for length, factor in zip(level.voxel_size, factors, strict=True))
        origin = tuple(  # of the first voxel's centre
            start + (factor - 1) / 2 * length
            for start, factor, length in zip(level.origin, factors, level.voxel_size, strict=True)
        )
        made = replace(
            base,
            url=f"{base.group_url}/{number}",
            shape=shape,
            chunk=chunk,
            write_unit=fitted(base.write_unit, shape, chunk),
            voxel_size=(size[0], size[1], size[2]),
            origin=(origin[0], origin[1], origin[2]),
            level_path=f"{number}",
            metadata="",
        )
        yield PyramidPlan(level, made, factors)
        level = made


def _factors(level: Volume) -> Shape:
    """2 for axes that are longer than a chunk and have the finest voxels of these, or nearly; else 1."""
    axes = list(zip(level.shape, level.chunk, level.voxel_size, strict=True))
    finest = min((size for length, chunk, size in axes if length > chunk), default=0.0)
    z, y, x = (2 if length > chunk and size < finest * ALIKE else 1 for length, chunk, size in axes)
    return z, y, x


def _means(voxels: NDArray[Any], factors: Shape) -> NDArray[Any]:
    """Means over cells of `factors` voxels, at the end of what there is; integers are rounded half up."""
    integer = voxels.dtype.kind in "iu"
    sums = reduce(_paired, (axis for axis in (2, 1, 0) if factors[axis] == 2), voxels.astype("u4" if integer else "f8"))
    count = factors[0] * factors[1] * factors[2]
    return (sums + count // 2) // count if integer else sums / count


def _paired(voxels: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums of two along an axis; of a last one without another, twice itself: the mean is then its own."""
    voxels = np.moveaxis(voxels, axis, 0)
    first, second = voxels[0::2], voxels[1::2]
    sums = first.copy()
    sums[: len(second)] += second
    sums[len(second) :] *= 2
    return np.moveaxis(sums, 0, axis)
