"""The noise of a volume, measured on parts of it: by its signal, slice by slice, and whether it is white."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.drift import LEAST_SIDE, Drift, DriftMeter
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, cells_along
from nrrn_pipeline.noise_details import NoiseCurve, measure_curve, neighbour_noise, slice_sigma
from nrrn_pipeline.volume import Volume, read_box

CROP = (3, 256, 256)  # voxels along z, y, x
DEPTHS, PLACES = 4, (0.25, 0.75)  # as many crops along z, and where they lie along y and x

AROUND = 15  # slices on either side, of whose noise the median is what to expect of a slice
OUTLYING = 1.3  # times more, or less, than expected
WHITE = 0.15  # the largest correlation of neighbouring voxels' noise that is taken for white

Crops = NDArray[np.float64]


@dataclass(frozen=True)
class VolumeNoise:
    """What is known of a volume's noise without a clean copy.

    curve: by signal. sigma: of each slice from `first_z` on, in grey levels, 0 where there is none to be measured, as
    in a blank one. outliers: slices (z) whose noise is not what slices around have. shared: correlation of the noise of
    voxels beside each other along y and x, median over slices (noise_details.neighbour_noise). likeness: mean
    correlation of successive slices, 1 if they are equal. drift: of the slices' middles; None if it was not asked for,
    or these are too small.
    """

    curve: NoiseCurve
    sigma: tuple[float, ...]
    outliers: tuple[int, ...]
    shared: tuple[float, float]
    likeness: float
    first_z: int = 0
    drift: Drift | None = None

    @property
    def white(self) -> bool:
        """Whether no voxel's noise tells of the one's beside it; stripes are not seen."""
        return self.most_shared <= WHITE

    @property
    def most_shared(self) -> float:
        """The larger correlation of the two, whatever its sign."""
        return max(map(abs, self.shared))


def measure_volume(volume: Volume, part: Box | None = None, with_drift: bool = False) -> VolumeNoise:
    """The noise of a volume, or a part of it: by signal where noise_of measures it, by slice in each slice's middle.

    Reads 256 x 256 voxels of every slice. Raises InputError as noise_of does, and if no two successive slices have
    anything to measure there.
    """
    part = part or volume.box
    curve = noise_of(volume, part)
    sigma, shared, likeness = [], [], []
    before, meter = None, DriftMeter() if with_drift and min(part.shape[1:]) >= LEAST_SIDE else None
    for z, plane in enumerate(_middles(volume, part), start=part.z.start):
        if not np.isfinite(plane).all():
            raise InputError.not_finite(volume.url, z)
        sigma.append(slice_sigma(plane))
        if sigma[-1] > 0:
            shared.append(neighbour_noise(plane))
            if before is not None:
                likeness.append(float(np.corrcoef(before.ravel(), plane.ravel())[0, 1]))
        before = plane if sigma[-1] > 0 else None
        if meter is not None:
            meter.add([plane])
    if not likeness:
        raise InputError(
            f"{volume.url} has no two successive slices with noise to be measured in their middle: it is blank, "
            "saturated or without noise there, or a single slice"
        )
    y, x = np.median(shared, axis=0)
    unlike = tuple(part.z.start + i for i in outliers(sigma))
    return VolumeNoise(
        curve,
        tuple(sigma),
        unlike,
        (float(y), float(x)),
        likeness=float(np.mean(likeness)),
        first_z=part.z.start,
        drift=None if meter is None else meter.drift(part.z.start),
    )


def outliers(sigma: list[float]) -> tuple[int, ...]:
    """Numbers of slices with OUTLYING times more or less noise than those around, their median; but for blank ones."""
    found = []
    for z, own in enumerate(sigma):
        around = [each for each in sigma[max(0, z - AROUND) : z + AROUND + 1] if each > 0]
        if own > 0 and not 1 / OUTLYING <= own / float(np.median(around)) <= OUTLYING:
            found.append(z)
    return tuple(found)


def noise_of(volume: Volume, part: Box | None = None) -> NoiseCurve:
    """The noise of the whole volume, or a part of it, by its signal, in grey levels.

    Raises InputError if the volume is blank there, holds NaN or infinite voxels, or has no noise to be measured.
    """
    crops = noise_samples(volume, part)
    try:
        return measure_curve([*crops.reshape(-1, *crops.shape[-2:])])
    except InputError as error:
        raise InputError(f"{volume.url}: {error}") from error


def noise_samples(volume: Volume, part: Box | None = None) -> Crops:
    """(depth, place, 3, y, x) voxels in grey levels, without depths at which a slice is blank.

    Where there are fewer than 3 slices, one stands for its neighbours. Raises InputError if it is blank at all
    depths, or holds NaN or infinite voxels there.
    """
    found = np.stack([*_crops(volume, part or volume.box)])
    if not np.isfinite(found).all():
        raise InputError(f"{volume.url} holds NaN or infinite voxels: replace them (with 0, say) before denoising")
    there: Crops = found[found.std(axis=(1, 3, 4)).min(axis=1) > 0]
    if not len(there):
        raise InputError(f"{volume.url} is blank where its noise is measured: its strength cannot be known")
    return there


def _crops(volume: Volume, part: Box) -> Iterator[Crops]:
    """(place, 3, y, x) voxels at each depth."""
    sizes = [min(size, length) for size, length in zip(CROP, part.shape, strict=True)]
    room = [length - size for size, length in zip(sizes, part.shape, strict=True)]
    corners = sorted({(round(a * room[1]), round(b * room[2])) for a in PLACES for b in PLACES})
    for z in sorted({round(along * room[0]) for along in np.linspace(0, 1, DEPTHS)}):
        crops = []
        for y, x in corners:
            starts = (of.start + start for of, start in zip(part.spans, (z, y, x), strict=True))
            spans = (Span(start, start + size) for start, size in zip(starts, sizes, strict=True))
            crops.append(read_box(volume, Box(*spans)).astype(np.float64))
        crop = np.stack(crops)
        yield crop if sizes[0] == CROP[0] else crop[:, [-1, 0, -1]]  # what is missing, the other neighbour replaces


def _middles(volume: Volume, part: Box) -> Iterator[Crops]:
    """The middle of every slice, in order; whole chunks deep at a time."""
    y, x = (of.middle(side) for of, side in zip(part.spans[1:], CROP[1:], strict=True))
    for z in cells_along(part.z, volume.chunk[0]):
        yield from read_box(volume, Box(z, y, x)).astype(np.float64)
