"""Where a volume has most to be seen, found by reading little of it: always the same places of the same volume.

Of each of several parts along z one slice is looked at, in windows spread over it; the window is taken whose middle has
most structure. That is the median of how far smoothed voxels differ from their surroundings: strong where there are
membranes, little more than nothing in resin, and nothing in a frame or where voxels are cut off at black or white.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nrrn_pipeline.cost import fetched_voxels
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span, hull_of
from nrrn_pipeline.volume import Volume, read_box

SIDE = 512  # voxels along y and x of a window, where there are so many
MIDDLE = 128  # of these are looked at
PLACES = 5  # along y and x, at most, where windows are looked at
DEPTHS = (1 / 2, 1 / 4, 3 / 4)  # of a part: the next slice is looked at if there is nothing in the one before
ROUNDING = 1e-9  # of an image's std: less is arithmetic's own
FINE, COARSE = 2.0, 8.0  # voxels: sigmas of the Gaussians between which structure lies


def pick_regions(volume: Volume, part: Box, wanted: int, slab: Shape) -> list[Box]:
    """Windows of one slice each, one in each of so many parts along z, or fewer where there is nothing in some.

    slab: voxels that are denoised together, on whose borders windows begin where they can. Raises InputError if there
    is nothing to be seen in any slice that was looked at, or NaN.
    """
    edges = np.linspace(part.z.start, part.z.stop, min(wanted, len(part.z)) + 1).round().astype(int)
    found, seen = [], []
    for start, stop in pairwise(edges):
        for z in dict.fromkeys(int(start + depth * (stop - start)) for depth in DEPTHS):
            seen.append(z)
            windows = [*_windows(Box(Span(z, z + 1), part.y, part.x), slab)]
            best, box = max(zip(_structures(volume, windows), windows, strict=True), key=lambda pair: pair[0])
            if best > 0:
                found.append(box)
                break
    if not found:
        raise InputError(
            f"{volume.url} is blank, or cut off at black or white, wherever it was looked at (slices "
            f"{', '.join(map(str, sorted(seen)))}): name places with --at Z,Y,X"
        )
    return found


def window_at(place: tuple[int, int, int], part: Box) -> Box:
    """The window around a place, within a part. Raises InputError for a place outside it."""
    if not all(span.start <= at < span.stop for at, span in zip(place, part.spans, strict=True)):
        raise InputError(
            f"place {','.join(map(str, place))} is not inside {part} (z,y,x): choose one that is, in the level's voxels"
        )
    y, x = (span.around(at, SIDE) for at, span in zip(place[1:], part.spans[1:], strict=True))
    return Box(Span(place[0], place[0] + 1), y, x)


def _windows(plane: Box, slab: Shape) -> Iterator[Box]:
    """Windows spread over a slice; the last along an axis ends where it does."""
    ways = []
    for span, step in zip(plane.spans[1:], slab[1:], strict=True):
        side = min(SIDE, len(span))
        starts = [*range(span.start, span.stop - side, step), span.stop - side]
        chosen = np.linspace(0, len(starts) - 1, min(PLACES, len(starts))).round().astype(int)
        ways.append([Span(starts[i], starts[i] + side) for i in chosen])
    return (Box(plane.z, y, x) for y in ways[0] for x in ways[1])


def _structures(volume: Volume, windows: list[Box]) -> list[float]:
    """How much there is to be seen in the middle of each of a slice's windows; the slice is read whole if that is less.

    As where each of its chunks is a whole slice.
    """
    middles = [Box(box.z, box.y.middle(MIDDLE), box.x.middle(MIDDLE)) for box in windows]
    whole = hull_of(windows)
    if fetched_voxels(volume, whole) <= sum(fetched_voxels(volume, middle) for middle in middles):
        voxels = _read(volume, whole)
        return [_structure(voxels[middle.within(whole)][0]) for middle in middles]
    return [_structure(_read(volume, middle)[0]) for middle in middles]


def _read(volume: Volume, box: Box) -> NDArray[Any]:
    voxels = read_box(volume, box)
    if not np.isfinite(voxels).all():
        raise InputError.not_finite(volume.url, box.z.start)
    return voxels


def _structure(plane: NDArray[Any]) -> float:
    """Of a (y, x) image, in grey levels; 0 if it is flat for the most part."""
    values = plane.astype(np.float64) - float(plane.flat[0])
    found = float(np.median(np.abs(gaussian_filter(values, FINE) - gaussian_filter(values, COARSE))))
    return found if found > ROUNDING * values.std() else 0.0
