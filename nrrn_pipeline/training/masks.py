"""Where a mask leaves something to learn from: by blocks, so that slices of any size are remembered in little room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.geometry import Box, Span, cells_of
from nrrn_pipeline.volume import Volume, read_box

BLOCK = 16  # voxels along y and x
LEAST_READ = 1024  # voxels along y and x, of storage units that are smaller
WINDOW = 512  # voxels along y and x, within which noise is measured

Blocks = NDArray[np.bool_]  # (y, x) whether a block has a voxel of the mask; counted from voxel 0 of the volume


def blocks_of(mask: Volume, box: Box) -> NDArray[np.bool_]:
    """(z, y, x) the Blocks of each slice of the box; those outside it are False. NaN counts as 0."""
    return _by_blocks(mask, box, lambda voxels: (voxels != 0) & ~np.isnan(voxels))


def image_blocks(volume: Volume, box: Box) -> NDArray[np.bool_]:
    """(z, y, x) which blocks of each slice of the box have voxels that differ from the next: no frame around it."""

    def differ(voxels: NDArray[Any]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.diff(voxels, axis=-1, prepend=voxels[..., :1]) != 0
        return found

    return _by_blocks(volume, box, differ)


def _by_blocks(volume: Volume, box: Box, wanted: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """(z, y, x) which blocks of the box have a voxel that is `wanted`."""
    found = np.zeros((len(box.z), -(-box.y.stop // BLOCK), -(-box.x.stop // BLOCK)), np.bool_)
    depth, *sides = volume.write_unit
    height, width = (-(-LEAST_READ // side) * side for side in sides)
    for cell in cells_of(box, (depth, height, width)):
        there = wanted(read_box(volume, cell))
        for axis, span in ((1, cell.y), (2, cell.x)):
            edges = np.arange(span.start // BLOCK * BLOCK, span.stop, BLOCK).clip(span.start) - span.start
            there = np.logical_or.reduceat(there, edges, axis=axis)
        y, x = (slice(span.start // BLOCK, -(-span.stop // BLOCK)) for span in (cell.y, cell.x))
        found[cell.z.within(box.z), y, x] |= there
    return found


def best_window(blocks: dict[int, Blocks], part: Box, side: int = WINDOW) -> Box:
    """Where the masks of some slices (z) of a part leave most, within `side` voxels along y and x; some leave some."""
    there = [z for z, own in blocks.items() if own.any()]
    counts = np.sum([blocks[z] for z in there], axis=0, dtype=np.int64)
    spans = [Span(min(there), max(there) + 1)]
    for axis, span in ((0, part.y), (1, part.x)):
        along = counts.sum(axis=1 - axis)
        width = min(side // BLOCK, len(along))
        start = int(np.argmax(np.convolve(along, np.ones(width, np.int64), "valid")))
        left = np.flatnonzero(along[start : start + width]) + start
        first, last = int(left[0]), int(left[-1])
        spans.append(Span(max(first * BLOCK, span.start), min((last + 1) * BLOCK, span.stop)))
        counts = counts.take(range(first, last + 1), axis)
    return Box(*spans)
