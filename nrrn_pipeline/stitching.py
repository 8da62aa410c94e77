"""One slab's plane from its tiles, each with an estimate of all that it reads.

    tile i     |halo|====keep====|halo|
    tile i+1             |halo|====keep====|halo|

Crop-and-discard (Giannios et al.) takes every voxel from the tile that keeps it, which is exact if the halo is no
smaller than the reach. Blending (as chunkflow does; the paper argues against it) averages what overlaps, with weights
that fall towards a tile's edges: what the edges spoil is damped, not discarded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.geometry import Box, Cut, Span

Tile = tuple[Cut, Cut, NDArray[np.float32]]  # its cuts of y and x, and the (z, y, x) estimate of what they read

LEAST = 1e-6  # weight; none is 0, as at a slice's own border there is no other tile


def blended(tiles: Iterator[Tile], keep: Box) -> Iterator[tuple[tuple[slice, slice], NDArray[np.float32]]]:
    """The whole plane of `keep`, and its estimate: the mean of all tiles, weighted by a bump function.

    Tiles of other slabs have no part in it.
    """
    total, weights = None, np.zeros((len(keep.y), len(keep.x)), np.float32)
    for y, x, estimate in tiles:
        total = np.zeros((len(estimate), *weights.shape), np.float32) if total is None else total
        part_y, part_x = _common(y.read, keep.y), _common(x.read, keep.x)
        place = part_y.within(keep.y), part_x.within(keep.x)
        inside = part_y.within(y.read), part_x.within(x.read)
        weight = np.outer(bump(len(y.read))[inside[0]], bump(len(x.read))[inside[1]])
        total[:, *place] += weight * estimate[:, *inside]
        weights[place] += weight
    if total is not None:
        yield (slice(None), slice(None)), total / weights


def bump(length: int) -> NDArray[np.float32]:
    """exp(-1 / (1 - t^2)), t from -1 to 1 over a tile's side: smooth, highest in the middle, LEAST at least."""
    t = (2 * np.arange(length) + 1) / length - 1
    return np.maximum(np.exp(1 - 1 / (1 - t**2)), LEAST).astype(np.float32)


def _common(a: Span, b: Span) -> Span:
    return Span(max(a.start, b.start), min(a.stop, b.stop))
