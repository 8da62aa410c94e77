"""Slices moved back by whole voxels, cut to what all of them have.

Each voxel of the output is one of the source: a voxel between voxels would be made of several, whose noise then
correlates, and training on noisy volumes rests on noise that does not. What only some slices have is cut off, not
filled: a frame would be no image, and count in slices' mean and std.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span, hull_of
from nrrn_pipeline.places import absolute
from nrrn_pipeline.slabs import Layout, Slab, VolumeCopyPlan, cut, refuse_outside
from nrrn_pipeline.volume import Volume, read_box

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before
LEAST_LEFT = 0.5  # of a slice that all slices have, or they are not to be one volume

Moves = tuple[tuple[int, int], ...]  # of each slice, along y and x


@dataclass(frozen=True)
class AlignPlan(VolumeCopyPlan):
    """Voxel (z, y, x) of the target is (z, y + move, x + move) of `part` of the source, by the move of each slice."""

    source: Volume
    target: Volume
    slab: Shape
    part: Box
    moves: Moves
    undo_trend: bool
    measures: bool = True
    stage: ClassVar[str] = "aligning"  # type: ignore[misc]

    @property
    def settings(self) -> dict[str, Any]:
        """See Plan."""
        return {
            "algorithm": ALGORITHM,
            "aligned": self.source.url,
            "source shape": list(self.source.shape),
            "part": str(self.part),
            "trend": "undone" if self.undo_trend else "kept",
            "moves": moves_text(self.moves),
            **self.target_settings,
        }

    @property
    def slab_bytes(self) -> int:
        """A slab, what is read for it, and a slice of floats that is measured."""
        largest = self.slabs.largest().keep
        read = max(self._covered(Box(z.keep, largest.y, largest.x)).size for z in self.slabs.axes[0])
        return (largest.size + read) * self.target.itemsize + 16 * prod(largest.shape[1:])

    def voxels(self, slab: Slab) -> NDArray[Any]:
        """The slab's voxels, from one box that holds them wherever its slices lie."""
        covered = self._covered(slab.keep)
        stored, found = read_box(self.source, covered), np.empty(slab.keep.shape, self.target.dtype)
        for i, z in enumerate(range(slab.keep.z.start, slab.keep.z.stop)):
            found[i] = stored[(i, *self._place(slab.keep, z).within(covered)[1:])]
        return found

    def _place(self, keep: Box, z: int) -> Box:
        """Where voxels `keep` of the target's slice z lie in the source."""
        (down, right), part = self.moves[z], self.part
        return Box(Span(z, z + 1), keep.y, keep.x).moved((part.z.start, part.y.start + down, part.x.start + right))

    def _covered(self, keep: Box) -> Box:
        """The smallest box of the source that holds all of these."""
        return hull_of([self._place(keep, z) for z in range(keep.z.start, keep.z.stop)])


def plan_align(
    source: Volume, output: str, part: Box | None, moves: Moves, undo_trend: bool = False, layout: Layout = Layout()
) -> AlignPlan:
    """The plan that moves the slices of a part of a volume back, in a new OME-Zarr group at `output`.

    What some slices lack of the part is cut off, and the origin tells. Raises InputError if less than half would be
    left, or it cannot be as `cut` says; reads and writes nothing.
    """
    part = part or source.box
    refuse_outside(part, source.box)
    common = common_part(source, part, moves)
    target, slab = cut(source, absolute(output), common, layout)
    return AlignPlan(source, target, slab, common, moves, undo_trend)


def common_part(source: Volume, part: Box, moves: Moves) -> Box:
    """What of a part all of its slices have once they are moved back, counted where none is moved.

    Raises InputError if that is less than half of it.
    """
    along = np.array(moves, int).reshape(-1, 2)
    y, x = (
        Span(max(span.start, -int(own.min())), min(span.stop, length - int(own.max())))
        for span, length, own in zip((part.y, part.x), source.shape[1:], along.T, strict=True)
    )
    left = max(0, y.stop - y.start) * max(0, x.stop - x.start) / (len(part.y) * len(part.x))
    if left < LEAST_LEFT:
        z = part.z.start + int(np.abs(along).max(axis=1).argmax())
        raise InputError(
            f"{source.url}: once its slices are moved back, {left:.0%} of their area is common to all (slice z={z} "
            "lies farthest off): align the parts between jumps one by one, with --roi"
        )
    return Box(part.z, y, x)


def moves_text(moves: Moves) -> str:
    """As short as can be read: "40x0,0 2x-5,3" is forty slices that stay, and two that move."""
    return " ".join(f"{len(list(alike))}x{y},{x}" for (y, x), alike in groupby(moves))


def parse_moves(text: str, slices: int) -> Moves:
    """The inverse of moves_text. Raises ValueError for any other text, or if it is not of so many slices."""
    found: list[tuple[int, int]] = []
    for word in text.split():
        count, _, move = word.partition("x")
        y, x = map(int, move.split(","))
        if len(found) + int(count) > slices:
            break
        found += [(y, x)] * int(count)
    else:
        if len(found) == slices:
            return tuple(found)
    raise ValueError(f"not the moves of {slices} slices")
