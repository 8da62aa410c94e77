"""The drift of a volume's slices, measured on a bounded part of each: all of them, or a few pairs at a glance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.drift import LEAST_SIDE, Drift, drift_of
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, cells_along
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.volume import Volume, read_ahead, read_box

SIDE = 512  # of a crop, in voxels along y and x
PLACES = (0.25, 0.75)  # where crops lie along an axis that is long enough for two
BAND_BYTES = 2**26  # of crops that are read at a time, as far as chunks are not deeper

GLANCES, GLANCE_SIDE = 8, 256  # pairs of slices along z, and their crops
GLANCE_BYTES = 2**28  # of chunks that are decoded for all of them, at most


def measure_volume_drift(
    volume: Volume, part: Box | None = None, progressed: Callable[[int, int], None] | None = None
) -> Drift:
    """The drift of a volume, or a part of it, by up to four crops of 512 x 512 voxels of every slice.

    progressed: is told how many slices are measured, of how many. Raises InputError for a single slice, for less than
    LEAST_SIDE voxels along y or x, and for NaN or infinite voxels.
    """
    part = part or volume.box
    refuse_outside(part, volume.box)
    if len(part.z) < 2:
        raise InputError(f"{volume.url} is a single slice here: drift is measured between two or more")
    if min(part.shape[1:]) < LEAST_SIDE:
        raise InputError(
            f"{volume.url} has slices of {part.shape[1]} x {part.shape[2]} voxels here, too small to measure drift on: "
            f"{LEAST_SIDE} a side are needed"
        )

    def slices() -> Iterator[list[NDArray[np.generic]]]:
        for done, crops in enumerate(_crops(volume, part), start=1):
            if not all(np.isfinite(crop).all() for crop in crops):
                raise InputError.not_finite(volume.url, part.z.start + done - 1)
            yield crops
            if progressed is not None:
                progressed(done, len(part.z))

    return drift_of(slices(), part.z.start)


def glance(volume: Volume) -> tuple[float, int] | None:
    """The largest shift of a slice against the one before, in voxels, and its z, of a few looked at.

    Reads the middle of GLANCES pairs of slices. None if none of them can tell, or chunks are so large that it would
    take long.
    """
    y, x = (span.middle(GLANCE_SIDE) for span in volume.box.spans[1:])
    cells = prod(len(span) // size + 2 for span, size in zip((y, x), volume.chunk[1:], strict=True))
    if GLANCES * cells * prod(volume.chunk) * volume.itemsize > GLANCE_BYTES:
        return None
    if min(len(y), len(x)) < LEAST_SIDE or volume.shape[0] < 2:
        return None
    found = []
    for z in sorted({round(along) for along in np.linspace(0, volume.shape[0] - 2, GLANCES)}):
        planes = read_box(volume, Box(Span(z, z + 2), y, x))
        if np.isfinite(planes).all() and (pair := drift_of([plane] for plane in planes)).told:
            found.append((float(np.hypot(*pair.position[1])), z + 1))
    return max(found, default=None)


def _crops(volume: Volume, part: Box) -> Iterator[list[NDArray[np.generic]]]:
    """Of every slice the same places; while one band of slices is measured, the next is read."""
    places = [Box(part.z, y, x) for y, x in product(*map(_places, part.spans[1:]))]
    row = sum(prod(place.shape[1:]) for place in places) * volume.itemsize
    depth = max(1, min(volume.chunk[0], BAND_BYTES // row))

    def read(z: Span) -> list[NDArray[np.generic]]:
        return [read_box(volume, Box(z, place.y, place.x)) for place in places]

    for crops in read_ahead(read, cells_along(part.z, depth)):
        yield from map(list, zip(*crops, strict=True))


def _places(span: Span) -> list[Span]:
    """Where crops lie along an axis: two of them if it is long enough, else one in the middle."""
    if len(span) < 2 * SIDE:
        return [span.middle(SIDE)]
    return [span.around(span.start + round(along * len(span)), SIDE) for along in PLACES]
