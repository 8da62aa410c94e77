"""Likeness to a clean reference; volumes are (z, y, x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Span

WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # as in Wang et al. 2004
SSIM_WINDOW = 11  # voxels in y and x: the Gaussian, cut at 3.5 sigma


@dataclass(frozen=True)
class PatchLikeness:
    """One patch of one slice: its first voxel, and its likeness to the reference."""

    z: int
    y: int
    x: int
    psnr_db: float
    ssim: float


def psnr(reference: NDArray[Any], image: NDArray[Any], data_range: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error); infinite for equal images."""
    if np.array_equal(reference, image):
        return float("inf")  # scikit-image gets there too, through a division by zero
    return float(peak_signal_noise_ratio(reference, image, data_range=data_range))


def ssim(reference: NDArray[Any], image: NDArray[Any], data_range: float) -> float:
    """Mean over z of each (y, x) slice's structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5)."""
    slices = [
        structural_similarity(clean, other, data_range=data_range, **WANG)
        for clean, other in zip(reference, image, strict=True)
    ]
    return float(np.mean(slices))


def patch_likeness(
    reference: NDArray[Any], image: NDArray[Any], data_range: float, side: int = 256
) -> tuple[PatchLikeness, ...]:
    """PSNR and SSIM of every (side, side) patch of every slice, x fastest (Giannios et al., Fig. 3A).

    Patches lie on a grid from 0, the last one flush with the slice's border; an axis shorter than `side` is one patch.
    SSIM is the mean of the whole slice's map over the patch, so no window is cut by a patch. It counts the 5 voxels
    at the slice's border, whose windows are filled by reflection; `ssim` leaves them out.

    Raises InputError for volumes that refuse_unlike refuses, and for slices or patches too small.
    """
    refuse_unlike(reference, image)
    if min(reference.shape[1:]) < SSIM_WINDOW or side < 1:
        raise InputError(
            f"slices of {reference.shape[1:]} voxels in patches of {side}: SSIM needs slices of at least "
            f"{SSIM_WINDOW} voxels in y and x, and patches of at least 1; compare a larger volume"
        )
    found = []
    for z, (clean, other) in enumerate(zip(reference, image, strict=True)):
        _, likeness = structural_similarity(clean, other, data_range=data_range, full=True, **WANG)
        for y in _patches(clean.shape[0], side):
            for x in _patches(clean.shape[1], side):
                part = slice(y.start, y.stop), slice(x.start, x.stop)
                decibel = psnr(clean[part], other[part], data_range)
                found.append(PatchLikeness(z, y.start, x.start, decibel, float(likeness[part].mean())))
    return tuple(found)


def _patches(length: int, side: int) -> tuple[Span, ...]:
    """An axis in whole patches; the last may overlap the one before."""
    last = max(length - side, 0)
    return tuple(Span(start, min(start + side, length)) for start in (*range(0, last, side), last))


def refuse_unlike(
    reference: NDArray[Any], image: NDArray[Any], names: tuple[str, str] = ("reference", "image")
) -> None:
    """Raises InputError for two volumes of which no measure would mean anything; `names` are for its message.

    Floats may stand beside any dtype: nothing says what range they use.
    """
    if reference.shape != image.shape:
        raise InputError(
            f"the {names[0]} has shape {reference.shape}, the {names[1]} {image.shape}: "
            "give two volumes of the same (z, y, x) shape"
        )
    if reference.ndim != 3 or not reference.size:
        raise InputError(f"shape {reference.shape} was given: a volume has voxels along three axes, (z, y, x)")
    ranges = [(np.iinfo(v.dtype).min, np.iinfo(v.dtype).max) for v in (reference, image) if v.dtype.kind in "iu"]
    if len(set(ranges)) > 1:
        raise InputError(
            f"the {names[0]} is {reference.dtype}, the {names[1]} {image.dtype}, whose grey levels mean different "
            "things: convert one to the other's dtype and range"
        )
    for name, volume in zip(names, (reference, image), strict=True):
        if not np.isfinite(volume).all():
            raise InputError(f"the {name} holds NaN or infinite voxels: replace them, or leave their slices out")
        if volume.min() == volume.max():
            raise InputError(
                f"every voxel of the {name} is {volume.flat[0]}: there is nothing to measure; "
                "see whether it was written at all"
            )
