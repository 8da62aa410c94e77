"""Where a mask leaves something to learn from: by blocks, so that slices of any size are remembered in little room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.geometry import Box, cells_of
from nrrn_pipeline.volume import Volume, read_box

BLOCK = 16  # voxels along y and x
LEAST_READ = 1024  # voxels along y and x, of storage units that are smaller

Blocks = NDArray[np.bool_]  # (y, x) whether a block has a voxel of the mask; counted from voxel 0 of the volume


def blocks_of(mask: Volume, box: Box) -> NDArray[np.bool_]:
    """(z, y, x) the Blocks of each slice of the box; those outside it are False."""
    found = np.zeros((len(box.z), -(-box.y.stop // BLOCK), -(-box.x.stop // BLOCK)), np.bool_)
    depth, *sides = mask.write_unit
    height, width = (-(-LEAST_READ // side) * side for side in sides)
    for cell in cells_of(box, (depth, height, width)):
        there = read_box(mask, cell) != 0
        for axis, span in ((1, cell.y), (2, cell.x)):
            edges = np.arange(span.start // BLOCK * BLOCK, span.stop, BLOCK).clip(span.start) - span.start
            there = np.logical_or.reduceat(there, edges, axis=axis)
        y, x = (slice(span.start // BLOCK, -(-span.stop // BLOCK)) for span in (cell.y, cell.x))
        found[cell.z.within(box.z), y, x] |= there
    return found
