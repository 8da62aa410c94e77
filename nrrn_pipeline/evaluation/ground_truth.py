"""A clean image of one surface, from scans of it that were repeated (Giannios et al., NRRN).

    scans -> subset -> coarse shift -> affine (TurboReg) -> resample -> per pixel: sort, drop two at each end, average

A stage that drifts, or a beam that is refocused, shifts, turns and stretches a scan by a little; a charging streak or a
flash is in one or two of them. What is left of the noise of n scans falls about with the square root of n - 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.registration import phase_cross_correlation
from skimage.transform import downscale_local_mean, warp

from nrrn_pipeline.errors import InputError

DROPPED = 2  # extremes on each side, per pixel
FEWEST = 2 * DROPPED + 1  # scans
SHORTEST = 32  # pixels along an axis of a scan
COARSE = 4  # pixels that are averaged along each axis before the shift is looked for
LARGEST_STRETCH = 0.1  # of one surface scanned twice; more is a registration that has failed
LEAST_LIKENESS = 0.4  # correlation of coarse pixels, whose noise is less; of unlike surfaces it is 0.2 or so

Image = NDArray[Any]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What scans of one surface have in common.

    image: (y, x) float32, in grey levels, on the first scan's pixels. scans: the numbers of those used, from 0.
    transforms: (scan, 3, 3); each leads from the homogeneous pixel (x, y, 1) of `image` to that of its scan.
    """

    image: NDArray[np.float32]
    scans: tuple[int, ...]
    transforms: Matrix

    @property
    def shifts(self) -> Matrix:
        """(scan, 2): how far, in pixels along y and x, each scan lies off at the middle of the image."""
        height, width = self.image.shape
        middle = np.array([(width - 1) / 2, (height - 1) / 2, 1.0])
        off: Matrix = self.transforms @ middle - middle
        return off[:, 1::-1]


def reference_image(scans: Sequence[Image], use: int | None = None, seed: int = 0) -> Reference:
    """The mean of registered (y, x) scans without the two darkest and the two brightest values of each pixel.

    `use`: how many scans, drawn at random by `seed`; the first is always among them, as the others are registered to
    it. Where a scan does not reach after registration it does not count; a pixel that fewer than five scans reach (the
    first always does) is their plain mean.

    Raises InputError for fewer than five scans, and names the scan that is of another shape or dtype, constant or not
    finite, or that does not fit the first.
    """
    _refuse_unfit(scans)
    used = _subset(len(scans), use, seed)
    first = scans[0].astype(np.float64)
    registered = np.empty((len(used), *first.shape), np.float32)
    registered[0] = first
    transforms = [np.eye(3)]
    for place, number in enumerate(used[1:], start=1):
        scan = scans[number].astype(np.float64)
        found = _register(first, scan)
        registered[place] = warp(scan, found, order=3, cval=np.nan, clip=False, preserve_range=True)
        _refuse_misfit(first, registered[place], found, f"scan {number + 1} of {len(scans)}")
        transforms.append(found)
    # row by row: sorting takes a copy
    image = np.stack([trimmed_mean(registered[:, y]) for y in range(len(first))])
    return Reference(image, used, np.stack(transforms))


def trimmed_mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(scan, x) -> (x): the mean without the two least and the two greatest of what is not NaN.

    Of fewer than five it is the mean of all; of none NaN would be, but one at least is a number.
    """
    rank = np.arange(len(values))[:, None]
    count = np.isfinite(values).sum(0)
    dropped = np.where(count >= FEWEST, DROPPED, 0)
    kept = (rank >= dropped) & (rank < count - dropped)
    mean: NDArray[np.float32] = np.mean(np.sort(values, axis=0), axis=0, where=kept, dtype=np.float64)  # NaN sort last
    return mean.astype(np.float32)


def _register(first: Image, scan: Image) -> Matrix:
    """The affine transform from pixels (x, y, 1) of the first to those of the scan.

    TurboReg has a pyramid of its own, but goes astray at shifts of more than a twentieth or so of the image. So the
    shift comes first, from a coarse pair, whose noise is less, and TurboReg gets what overlaps.
    """
    stackreg = _stackreg()
    # not normalised: phase alone goes astray in noise, and on surfaces that are turned
    coarse, _, _ = phase_cross_correlation(_coarse(first), _coarse(scan), normalization=None)
    y, x = (-COARSE * int(n) for n in coarse)
    height, width = first.shape
    in_first, in_scan = (_overlap(sign * y, sign * x, height, width) for sign in (-1, 1))
    if min(first[in_first].shape) < SHORTEST:  # no shift of a surface scanned twice: let TurboReg's own be judged
        in_first = in_scan = (slice(0, height), slice(0, width))
    found: Matrix = stackreg(stackreg.AFFINE).register(first[in_first], scan[in_scan])
    whole: Matrix = _shift(in_scan) @ found @ np.linalg.inv(_shift(in_first))
    return whole


def _coarse(image: Image) -> Image:
    height, width = (COARSE * (length // COARSE) for length in image.shape)
    means: Image = downscale_local_mean(image[:height, :width], (COARSE, COARSE))
    return means


def _overlap(y: int, x: int, height: int, width: int) -> tuple[slice, slice]:
    """The pixels of an image that another still shows, of which each lies (y, x) pixels before."""
    return slice(max(0, y), height + min(0, y)), slice(max(0, x), width + min(0, x))


def _shift(part: tuple[slice, slice]) -> Matrix:
    """From pixels (x, y, 1) of a part to those of the whole."""
    return np.array([[1.0, 0.0, part[1].start], [0.0, 1.0, part[0].start], [0.0, 0.0, 1.0]])


def _stackreg() -> Any:
    try:
        from pystackreg import StackReg
    except ImportError:
        raise InputError("registration of scans needs pystackreg: pip install nrrn-pipeline[evaluation]") from None
    return StackReg


def _subset(there: int, use: int | None, seed: int) -> tuple[int, ...]:
    """The first scan and others, in their order."""
    if use is None:
        return tuple(range(there))
    if not FEWEST <= use <= there:
        raise InputError(f"{use} scans cannot be used: expected {FEWEST} to {there}, as many as there are")
    if seed < 0:
        raise InputError(f"seed {seed} is not possible: use 0 or more")
    others = np.random.default_rng(seed).choice(np.arange(1, there), use - 1, replace=False)
    return (0, *sorted(int(number) for number in others))


def _refuse_unfit(scans: Sequence[Image]) -> None:
    if len(scans) < FEWEST:
        raise InputError(
            f"{len(scans)} scans are too few: expected {FEWEST} or more of one surface, as the {DROPPED} darkest and "
            f"the {DROPPED} brightest of each pixel are dropped"
        )
    first = scans[0]
    for number, scan in enumerate(scans):
        name = f"scan {number + 1} of {len(scans)}"
        if scan.ndim != 2 or min(scan.shape) < SHORTEST:
            raise InputError(f"{name} has shape {scan.shape}: expected (y, x) of {SHORTEST} pixels or more each")
        if scan.shape != first.shape or scan.dtype != first.dtype:
            raise InputError(
                f"{name} is {scan.dtype} {scan.shape}, the first {first.dtype} {first.shape}: crop or convert them, or "
                "leave it out"
            )
        if not np.isfinite(scan).all():
            raise InputError(f"{name} holds NaN or infinite pixels: leave it out")
        if scan.min() == scan.max():
            raise InputError(f"{name} is {scan.flat[0]} everywhere: leave it out")


def _refuse_misfit(first: Image, registered: Image, transform: Matrix, name: str) -> None:
    stretches = np.linalg.svd(transform[:2, :2], compute_uv=False)
    pair = np.stack([_coarse(first), _coarse(registered)])
    both = pair[:, np.isfinite(pair[1])]
    # of a part that one scan shows blank the correlation is 0 by 0
    likeness = np.corrcoef(both)[0, 1] if both.size and both.std(1).all() else 0.0
    if np.abs(stretches - 1).max() > LARGEST_STRETCH or likeness < LEAST_LIKENESS:
        raise InputError(
            f"{name} does not fit the first, whose surface it should show: registered, it is stretched by "
            f"{stretches[0]:.2f} and {stretches[1]:.2f}, and its correlation is {likeness:.2f}; leave it out"
        )
