"""What is shown: a volume alone, or noisy, denoised and what was removed, each with its levels of lower resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, floor, isclose, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.api import source_of
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.report.page import display_range
from nrrn_pipeline.volume import Volume, count_levels, get_provenance, open_volume, read_box

PIECE_SIDE = 256  # voxels along y and x: smaller chunks are sent several at a time
PIECE_VOXELS = 2**24  # larger ones in pieces
CROP = 256  # voxels: side of what contrast is measured on
WITHIN = 0.01  # voxels: origins in nm are rounded

Range = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """An array of a layer: a volume's voxels, or what is left of another's, `whole`, once they are subtracted.

    `place` is where in `whole` the volume begins.
    """

    volume: Volume
    whole: Volume | None = None
    place: Shape = (0, 0, 0)

    @property
    def dtype(self) -> str:
        """The voxels' own; of differences one that holds any."""
        if self.whole is None:
            return self.volume.dtype
        types = {self.volume.dtype, self.whole.dtype}
        return "float32" if "float32" in types else "int32" if "uint16" in types else "int16"

    @property
    def piece(self) -> Shape:
        """Voxels read at once: whole chunks, unless they are large."""
        z, *sides = self.volume.chunk
        sides = [side * max(1, PIECE_SIDE // side) for side in sides]
        piece = [min(size, length) for size, length in zip((z, *sides), self.volume.shape, strict=True)]
        while prod(piece) > PIECE_VOXELS:
            longest = piece.index(max(piece))
            piece[longest] = -(-piece[longest] // 2)
        return piece[0], piece[1], piece[2]

    def read(self, part: Box) -> NDArray[Any]:
        """(z, y, x) voxels of a part of the volume. Raises StorageError if storage fails."""
        voxels = read_box(self.volume, part)
        if self.whole is None:
            return voxels
        there = read_box(self.whole, part.moved(self.place))
        with np.errstate(over="ignore", invalid="ignore"):  # of floats that are infinite, or nearly
            removed: NDArray[Any] = np.subtract(there, voxels, dtype=self.dtype)
        return removed


@dataclass(frozen=True)
class Layer:
    """A panel: its levels, finest first, and the grey levels that are black and white in it."""

    name: str
    levels: tuple[Level, ...]
    contrast: Range

    @property
    def volume(self) -> Volume:
        """Of full size."""
        return self.levels[0].volume


def find_layers(source: Location, output: Location | None = None, level: int = 0) -> tuple[Layer, ...]:
    """Noisy, denoised and removed noise, if an output is given or the source is one whose own source is still there.

    Else the volume alone. `level`: of the source. Raises InputError if they cannot be opened, or laid over each other.
    """
    if output is None and level == 0 and (found := _own_source(source)):
        return _side_by_side(_levels(*found), _levels(source))
    if output is not None:
        return _side_by_side(_levels(source, level), _levels(output))
    levels = tuple(map(Level, _levels(source, level)))
    volume = levels[0].volume
    sample = np.concatenate([levels[0].read(part).ravel() for part in _crops(volume)])
    return (Layer(volume.group_url.rpartition("/")[2], levels, _contrast(sample)),)


def _own_source(url: Location) -> tuple[str, int] | None:
    """The volume that an output was denoised from, and its level; None if it is none, or that is gone."""
    made = get_provenance(absolute(url)) or {}
    settings = made.get("settings")
    if not isinstance(settings, dict) or "noise" in settings:
        return None
    try:
        return source_of(settings["source"], made["source group"])
    except (LookupError, TypeError, InputError):
        return None


def _levels(url: Location, level: int = 0) -> list[Volume]:
    """This level, and those of lower resolution."""
    first = open_volume(url, level)
    return [first, *(open_volume(url, number) for number in range(level + 1, count_levels(url)))]


def _side_by_side(noisy: list[Volume], denoised: list[Volume]) -> tuple[Layer, ...]:
    if noisy[0].shape == denoised[0].shape and not _alike(noisy[0], denoised[0]):
        # of two that only differ in what they say of their voxels' size, the source is believed
        first = noisy[0]
        denoised = [replace(denoised[0], voxel_size=first.voxel_size, origin=first.origin, in_nm=first.in_nm)]
    removed: list[Level] = []
    for whole, part in zip(noisy, denoised, strict=False):
        place = _place(whole, part)
        if place is None:  # a region may begin between voxels of lower resolution
            break
        removed.append(Level(part, whole, place))
    if not removed:
        raise InputError(
            f"{denoised[0].url} cannot be laid over {noisy[0].url}: voxels of {denoised[0].voxel_size} from "
            f"{denoised[0].origin} on, {denoised[0].shape} of them, against {noisy[0].voxel_size} from "
            f"{noisy[0].origin}, {noisy[0].shape}; expected a part of it (--level: of which level)"
        )
    crops = list(_crops(denoised[0]))
    differences = np.concatenate([removed[0].read(part).ravel() for part in crops])
    after = np.concatenate([read_box(denoised[0], part).ravel() for part in crops])
    before = differences + after.astype(removed[0].dtype)
    both, strongest = _contrast(np.concatenate([before, after])), max(map(abs, _contrast(differences)))
    return (
        Layer("noisy", tuple(map(Level, noisy)), both),
        Layer("denoised", tuple(map(Level, denoised)), both),
        Layer("removed noise", tuple(removed), (-strongest, strongest)),
    )


def _alike(a: Volume, b: Volume) -> bool:
    return a.in_nm == b.in_nm and all(map(_close, a.voxel_size, b.voxel_size))


def _close(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-6)


def _place(whole: Volume, part: Volume) -> Shape | None:
    """The voxel of `whole` that the first one of `part` is; None if `part` is no part of it, voxel by voxel."""
    if not _alike(whole, part):
        return None
    steps = [(b - a) / size for a, b, size in zip(whole.origin, part.origin, whole.voxel_size, strict=True)]
    z, y, x = map(round, steps)
    place = z, y, x
    ends = zip(place, part.shape, whole.shape, strict=True)
    inside = all(start >= 0 and start + length <= end for start, length, end in ends)
    near = all(abs(step - whole_step) < WITHIN for step, whole_step in zip(steps, place, strict=True))
    return place if inside and near else None


def _crops(volume: Volume) -> Iterator[Box]:
    """Nine of one slice each: along the diagonal, near the first, the middle and the last slice."""
    for at, across in product((1 / 6, 1 / 2, 5 / 6), repeat=2):
        along = zip(volume.box.spans, (at, across, across), (1, CROP, CROP), strict=True)
        yield Box(*(span.around(int(len(span) * share), side) for span, share, side in along))


def _contrast(sample: NDArray[Any]) -> Range:
    """Its 0.5th and 99.5th percentile; whole numbers of integers, and never the same twice."""
    low, high = display_range(sample)
    if sample.dtype.kind == "f":
        return low, high if high > low else low + 1.0
    return floor(low), max(ceil(high), floor(low) + 1)
