"""How much noise denoising took, and whether it took structure too, where no clean reference exists.

Volumes are (z, y, x), grey levels; residual = noisy - denoised. Of good denoising the residual is like the noise of
FIB-SEM: white within a slice and independent from slice to slice. What it has of structure was lost. All measures of
the residual are 0 if it is all zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError

Floats = NDArray[np.float64]

LAG = 8  # voxels: most structure lost by smoothing shows nearer than that


def noise_sigma(volume: NDArray[Any]) -> Floats:
    """(z,) standard deviation of each slice's noise in grey levels, from its finest wavelet details.

    The median absolute deviation of Donoho & Johnstone 1994, by scikit-image, which leaves out details of exactly 0:
    of a volume rounded to integers, flat but for a few steps, it says too much. 0 for a slice without details.
    Raises InputError if PyWavelets is missing or slices are smaller than 5 voxels.
    """
    if find_spec("pywt") is None:
        raise InputError("noise_sigma needs PyWavelets: pip install nrrn-pipeline[evaluation]")
    from skimage.restoration import estimate_sigma

    _refuse_small(volume, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the median of no details at all
        sigmas = [estimate_sigma(plane, channel_axis=None) for plane in volume]
    return np.nan_to_num(np.array(sigmas, np.float64))


def autocorrelation(residual: NDArray[Any], lag: int = LAG) -> Floats:
    """(2 lag + 1, 2 lag + 1) correlation of voxels that lie (dy, dx) apart, lag 0 in the centre, where it is 1.

    Each slice's mean is removed; covariances are averaged over slices. By FFT, padded with zeros so that opposite
    borders do not meet, and unbiased: each sum is divided by the number of voxel pairs in it. All 0 for a residual
    that is constant in every slice. Raises InputError for slices not larger than `lag`.
    """
    _refuse_small(residual, lag + 1)
    height, width = residual.shape[1:]
    padded = height + lag, width + lag
    power = sum(np.square(np.abs(np.fft.rfft2(plane, padded))) for plane in _centred(residual))
    lags = np.arange(-lag, lag + 1)
    sums = np.fft.irfft2(power, padded)[np.ix_(lags, lags)]
    covariance: Floats = sums / np.outer(height - np.abs(lags), width - np.abs(lags))
    return covariance / covariance[lag, lag] if covariance[lag, lag] > 0 else np.zeros_like(covariance)


def whiteness(correlation: Floats) -> float:
    """The largest |value| of an autocorrelation off its centre: about 0, a few / sqrt(voxels), for white noise."""
    strength = np.abs(correlation)
    strength[tuple(length // 2 for length in strength.shape)] = 0
    return float(strength.max())


def neighbour_correlation(residual: NDArray[Any]) -> float:
    """Mean Pearson correlation of the residuals of slices z and z+1; a pair with a constant slice counts as 0.

    Raises InputError for fewer than 2 slices.
    """
    if len(residual) < 2:
        raise InputError(f"{len(residual)} slices were given: the correlation of neighbours needs at least 2")
    found = []
    for here, after in pairwise(_centred(residual)):
        spread = np.sqrt(np.square(here).sum() * np.square(after).sum())
        found.append((here * after).sum() / spread if spread > 0 else 0.0)
    return float(np.mean(found))


def low_frequency_share(residual: NDArray[Any], below: float = 0.2) -> float:
    """Share of the residual's power, each slice's mean removed, at less than `below` cycles a voxel in any direction.

    White noise has about pi below^2, 0.126; more says that structure was lost, less that noise of low frequency was
    left in. 0 for a residual that is constant in every slice.
    """
    _refuse_small(residual, 1)
    frequency, power = _power(residual)
    total = power.sum()
    return float(power[frequency < below].sum() / total) if total > 0 else 0.0


def radial_spectrum(residual: NDArray[Any], bins: int = 32) -> tuple[Floats, Floats]:
    """(n,) frequencies up to 0.5 cycles a voxel, and the residual's mean power at each, whatever its direction.

    In units of the mean of all of them, so that white noise has 1 everywhere. Each slice's mean is removed; rings that
    hold no frequency of so small a slice are left out. All 0 for a residual that is constant in every slice.
    """
    _refuse_small(residual, 2)
    frequency, power = _power(residual)
    inside = (frequency > 0) & (frequency <= 0.5)
    ring = np.minimum(frequency[inside] * 2 * bins, bins - 1).astype(np.intp)
    counts, total, middles = (np.bincount(ring, weights, bins) for weights in (None, power[inside], frequency[inside]))
    there = counts > 0
    found = total[there] / counts[there]
    mean = float(total.sum() / counts.sum())
    return middles[there] / counts[there], found / mean if mean > 0 else found


def brightness_steps(volume: NDArray[Any]) -> Floats:
    """(z-1,) |difference of mean brightness| of successive slices, grey levels."""
    return np.abs(np.diff([plane.mean(dtype=np.float64) for plane in volume]))


def seam_energy(volume: NDArray[Any], borders_y: Iterable[int], borders_x: Iterable[int]) -> float:
    """How much larger steps at tile borders are than elsewhere; 1 if no seam shows, infinite if all else is flat.

    The mean |difference of the two voxels across| of all borders, over what the means of the same axes away from
    borders let expect: an image that changes faster along one axis has no seams for that. Border b lies between
    voxels b-1 and b; those outside or at the ends are ignored. 1 also if nothing differs anywhere.
    Raises InputError if no border lies inside, or if all voxels of an axis lie at borders.
    """
    _refuse_small(volume, 1)
    inside = {
        axis: sorted({b - 1 for b in borders if 0 < b < volume.shape[axis]})  # step i goes from voxel i to i+1
        for axis, borders in ((1, borders_y), (2, borders_x))
    }
    if not any(inside.values()):
        raise InputError(
            f"no tile border lies inside slices of {volume.shape[1:]} voxels: "
            "give the positions at which one tile ends and the next begins"
        )
    at_borders = expected = 0.0
    for axis, borders in inside.items():
        if not borders:
            continue
        steps = _mean_steps(volume, axis)
        elsewhere = np.delete(steps, borders)
        if not elsewhere.size:
            raise InputError(
                f"there are tile borders between all {volume.shape[axis]} voxels of axis {'zyx'[axis]}: "
                "seams need other voxels to be compared with; give the borders of larger tiles"
            )
        across = volume.size // volume.shape[axis]  # voxel pairs across one border
        at_borders += across * float(steps[borders].sum())
        expected += across * len(borders) * float(elsewhere.mean())
    if expected == 0:
        return float("inf") if at_borders > 0 else 1.0
    return at_borders / expected


def _mean_steps(volume: NDArray[Any], axis: int) -> Floats:
    """Mean |difference| of voxels i and i+1 of an axis (1: y, 2: x), over all else."""
    planes = (plane.astype(np.float64) for plane in volume)  # unsigned differences would wrap around
    total: Floats = sum(np.abs(np.diff(plane, axis=axis - 1)).mean(axis=2 - axis) for plane in planes)
    return total / len(volume)


def _power(residual: NDArray[Any]) -> tuple[Floats, Floats]:
    """(y, x) frequencies in cycles a voxel, and the power at each, summed over slices, each slice's mean removed."""
    y, x = (np.fft.fftfreq(length) for length in residual.shape[1:])
    power: Floats = np.asarray(sum(np.square(np.abs(np.fft.fft2(plane))) for plane in _centred(residual)))
    return np.hypot(y[:, None], x), power


def _centred(residual: NDArray[Any]) -> Iterator[Floats]:
    """Each slice less its mean; a constant slice is exactly 0, because its first voxel goes before the mean does."""
    for plane in residual:
        values = plane.astype(np.float64)
        values -= values.flat[0]
        yield values - values.mean()


def _refuse_small(volume: NDArray[Any], side: int) -> None:
    """Raises InputError unless there are slices of at least `side` voxels in y and x."""
    if volume.ndim != 3 or not len(volume) or min(volume.shape[1:]) < side:
        raise InputError(
            f"shape {volume.shape} was given: (z, y, x) slices of at least {side} voxels in y and x are needed; "
            "measure a larger volume"
        )
