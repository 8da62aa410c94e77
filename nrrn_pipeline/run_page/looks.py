"""The pictures of a run: slices before and after, in the three planes, and how little of a volume is read for them.

Of a volume of any size: windows of at most SIDE x SIDE voxels in the three planes, one slice as a whole, by bands of
rows, and MIDDLE x MIDDLE voxels of at most SAMPLES slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.cost import fetched_voxels
from nrrn_pipeline.geometry import Box, Span, spans_of
from nrrn_pipeline.report.page import compared
from nrrn_pipeline.run_page.made import Made
from nrrn_pipeline.training.masks import best_window, image_blocks
from nrrn_pipeline.volume import Volume, read_box

SIDE = 768  # pixels of a picture along either side: six views of three stay below 15 MB, however noisy
PLACES = (0.25, 0.5, 0.75)  # of the slices
SAMPLES, MIDDLE = 64, 256
MOST_STRETCHED = 16  # times, of voxels that are longer in z
MOST_FETCHED = 2**31  # voxels, in whole chunks, of a cut across slices
BAND = 256  # rows that are read at a time
LONGEST_STRIP = 8  # times as long as high, of cuts across few slices
LEAST = 64  # voxels of a window, where there are so many

Views = dict[str, dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Looks:
    """What is shown. window: in y and x, the same in all slices; `slices`: (z, y, x) before and after, of these z.

    sampled: other slices' z, whose middles are in `samples`, before and after.
    """

    views: Views
    window: Box
    z: tuple[int, ...]
    slices: tuple[NDArray[Any], NDArray[Any]]
    sampled: tuple[int, ...]
    samples: tuple[NDArray[Any], NDArray[Any]]


def look_at(made: Made) -> Looks:
    """Read what is shown of a run."""
    z = _places(made)
    window = _window(made, z[len(z) // 2])
    pairs = [made.pair(Box(Span(each, each + 1), window.y, window.x)) for each in z]
    before, after = (np.concatenate(each) for each in zip(*pairs, strict=True))
    views = {f"z = {each}": compared(before[i], after[i]) for i, each in enumerate(z)}
    for axis in ("y", "x") if len(made.part.z) > 1 else ():
        name, cut = _across(made, window, axis)
        views[name] = cut
    if window.shape[1:] != made.part.shape[1:]:
        name, whole = _overview(made, z[len(z) // 2])
        views[name] = whole
    sampled = _sampled(made.part.z)
    middle = Box(window.z, window.y.middle(MIDDLE), window.x.middle(MIDDLE))
    samples = [made.pair(Box(Span(each, each + 1), middle.y, middle.x)) for each in sampled]
    first, second = (np.concatenate(each) for each in zip(*samples, strict=True))
    return Looks(views, window, z, (before, after), sampled, (first, second))


def stretched(picture: NDArray[Any], down: float, across: float) -> NDArray[Any]:
    """A (y, x) picture with its rows and columns repeated so many times; nothing is interpolated."""
    rows, columns = (
        np.minimum((np.arange(round(length * factor)) / factor).astype(np.intp), length - 1)
        for length, factor in zip(picture.shape, (down, across), strict=True)
    )
    return picture[np.ix_(rows, columns)]


def _places(made: Made) -> tuple[int, ...]:
    """The slices that are shown: near PLACES, but no blank ones as long as there are others."""
    span = made.part.z
    there = np.array([z for z in range(span.start, span.stop) if not made.is_blank(z)] or [span.start])
    wanted = [span.start + int(place * len(span)) for place in PLACES]
    return tuple(sorted({int(there[np.abs(there - z).argmin()]) for z in wanted}))


def _window(made: Made, z: int) -> Box:
    """Where slice z has most image; reads the slice by pieces."""
    slice_ = Box(Span(z, z + 1), made.part.y, made.part.x)
    blocks = image_blocks(made.source, slice_)
    found = best_window({z: blocks[0]}, slice_, SIDE) if blocks.any() else slice_
    y, x = (
        (span.grown(LEAST // 2, whole) if len(span) < LEAST else span).middle(SIDE)
        for span, whole in zip(found.spans[1:], slice_.spans[1:], strict=True)
    )
    return Box(slice_.z, y, x)


def _across(made: Made, window: Box, axis: str) -> tuple[str, dict[str, NDArray[Any]]]:
    """The name and the pictures of a cut at y, or x, in the window's middle; slices go down, as long as they are thick.

    Of so many slices in the middle as fit, and as can be read without reading much of the volume.
    """
    along = window.x if axis == "y" else window.y
    fixed = (window.y if axis == "y" else window.x).middle(1)
    depth, _, _ = made.output.voxel_size
    width = made.output.voxel_size[2 if axis == "y" else 1]
    down, across = (min(MOST_STRETCHED, size / min(depth, width)) for size in (depth, width))
    z = made.part.z.middle(int(SIDE / down))
    along = along.middle(int(min(SIDE, max(LEAST, LONGEST_STRIP * len(z) * down)) / across))
    while True:
        box = Box(z, fixed, along) if axis == "y" else Box(z, along, fixed)
        if len(z) == 1 or fetched_voxels(made.source, box) <= MOST_FETCHED:
            break
        z = z.middle(len(z) // 2)
    before, after = (stretched(each.squeeze(1 if axis == "y" else 2), down, across) for each in made.pair(box))
    plane = "xz" if axis == "y" else "yz"
    of = "" if z == made.part.z else f", z {z}"
    return f"{plane}, {axis} = {fixed.start}{of}", compared(before, after)


def _overview(made: Made, z: int) -> tuple[str, dict[str, NDArray[Any]]]:
    """The name and the pictures of a whole slice, each pixel the mean of some voxels."""
    slice_ = Box(Span(z, z + 1), made.part.y, made.part.x)
    factor = -(-max(slice_.shape[1:]) // SIDE)
    before = _reduced(made.source, slice_, factor)
    after = _reduced(made.output, slice_.shifted(made.box), factor)
    return f"z = {z}, whole slice, 1:{factor}", compared(before, after)


def _reduced(volume: Volume, slice_: Box, factor: int) -> NDArray[np.float32]:
    """(y, x) means over factor x factor voxels of one slice, without what is left over; read by bands of rows."""
    bands = []
    for rows in spans_of(slice_.y, max(1, BAND // factor) * factor):
        band = read_box(volume, Box(slice_.z, rows, slice_.x))[0].astype(np.float32)
        height, width = (length // factor for length in band.shape)
        cells = band[: height * factor, : width * factor].reshape(height, factor, width, factor)
        bands.append(cells.mean(axis=(1, 3)))
    found: NDArray[np.float32] = np.concatenate(bands)
    return found


def _sampled(span: Span) -> tuple[int, ...]:
    """SAMPLES slices, evenly, or all there are."""
    return tuple(sorted({int(z) for z in np.linspace(span.start, span.stop - 1, min(SAMPLES, len(span))).round()}))
