"""How strong the noise of a volume is at each level of its signal, and whether it is white; from noisy slices alone.

    variance(signal) = gain * signal + offset        in grey levels, squared

Counting noise has a gain, noise of the electronics an offset. Source: Foi, Trimeche, Katkovnik & Egiazarian, "Practical
Poissonian-Gaussian noise modeling and fitting for single-image raw-data" (IEEE TIP 2008): details that hold next to no
signal, sorted by the signal that they lie on, away from edges. Ours are second differences along y and x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d, gaussian_filter, uniform_filter

from nrrn_pipeline.errors import InputError

Floats = NDArray[np.float64]

DIFFERENCE = np.array([1.0, -2.0, 1.0]) / np.sqrt(6)  # turns white noise into noise of the same variance
SIGNAL, EDGE = 7, 3.0  # the signal at a voxel is a mean over 7 x 7; edges are looked for behind a Gaussian of 3
MARGIN = 4  # voxels at a slice's border, which filters see mirrored
LEVELS = 16  # of signal, with as many voxels each
LEAST_SIDE = 4 * MARGIN
LEAST_VOXELS = 4096  # away from edges
MEDIAN = 0.6745  # of |x|, for a standard normal x
BEYOND = 3.5  # standard deviations: details that are structure
FINE, COARSE = (0.4, 0.5), (0.25, 0.35)  # cycles a voxel; structure of EM hardly reaches there


@dataclass(frozen=True)
class NoiseModel:
    """Noise whose variance is gain * signal + offset, and `least` where that is less; grey levels squared."""

    gain: float
    offset: float
    least: float

    def sigma(self, signal: NDArray[Any]) -> Floats:
        """Standard deviation of the noise on voxels of that signal, both in grey levels."""
        return np.sqrt(np.maximum(self.gain * np.asarray(signal, np.float64) + self.offset, self.least))

    def sigma_in(self, noisy: NDArray[Any]) -> Floats:
        """(..., y, x) noisy slices -> the standard deviation of the noise at each of their voxels, in grey levels."""
        return self.sigma(signal_in(noisy))


@dataclass(frozen=True)
class NoiseCurve:
    """(LEVELS,) signal, the noise's standard deviation on it, both in grey levels, and the model fitted to them."""

    signal: tuple[float, ...]
    sigma: tuple[float, ...]
    model: NoiseModel


def measure_curve(slices: Sequence[NDArray[Any]]) -> NoiseCurve:
    """The noise of (y, x) slices by their signal. It is taken for white; see `fineness`.

    The half of all voxels that is farthest from edges is sorted by signal into LEVELS groups of one size. Raises
    InputError for fewer than LEAST_VOXELS such voxels, or if there is no noise.
    """
    found = [_smooth_half(each) for each in slices]
    signal, details = (np.concatenate(each) for each in zip(*found, strict=True))
    if signal.size < LEAST_VOXELS:
        raise InputError(f"noise cannot be measured on slices of {signal.size} smooth voxels: give {LEAST_VOXELS}")
    groups = np.array_split(np.argsort(signal, kind="stable"), LEVELS)
    levels = np.array([signal[group].mean() for group in groups])
    sigma = np.array([spread(details[group]) for group in groups])
    if not sigma.all():
        raise InputError("no noise can be measured: slices are flat in places, as synthetic ones are")
    return NoiseCurve(tuple(levels), tuple(sigma), _fitted(levels, sigma))


def signal_in(noisy: NDArray[Any]) -> Floats:
    """(..., y, x) noisy slices -> their signal as far as noise depends on it: the mean of SIGNAL x SIGNAL voxels."""
    found: Floats = uniform_filter(noisy.astype(np.float64), SIGNAL, axes=(-2, -1))
    return found


def slice_sigma(plane: NDArray[Any]) -> float:
    """Standard deviation of a (y, x) slice's noise, whatever its signal, in grey levels; it is taken for white."""
    return spread(_smooth_half(plane)[1])


def spread(details: Floats) -> float:
    """Standard deviation of all but the few values beyond BEYOND of it, which are structure."""
    found = float(np.median(np.abs(details))) / MEDIAN or float(details.std())  # 0 if most counts are equal
    for _ in range(3):
        found = float(details[np.abs(details) <= BEYOND * found].std())
    return found


def fineness(plane: NDArray[Any]) -> tuple[float, float]:
    """Along y, along x: the power of the finest details over that of coarser ones, among those that are fine across.

    1 for white noise; less for noise that neighbouring voxels share, as along a scan line.
    """
    centred = plane.astype(np.float64) - plane.mean()
    power = np.square(np.abs(np.fft.fft2(centred)))
    y, x = (np.abs(np.fft.fftfreq(length)) for length in plane.shape)
    found = []
    for along, frequency, across in ((power.T, y, x), (power, x, y)):
        rows = along[across >= COARSE[0]]
        fine, coarse = (rows[:, (frequency >= low) & (frequency <= high)].mean() for low, high in (FINE, COARSE))
        found.append(float(fine / coarse) if coarse > 0 else 1.0)
    return found[0], found[1]


def _smooth_half(plane: NDArray[Any]) -> tuple[Floats, Floats]:
    """Signal and details of the voxels that are farther from edges than the other half.

    Raises InputError for a slice that is too small.
    """
    if min(plane.shape) < LEAST_SIDE:
        raise InputError(f"noise cannot be measured on slices of {plane.shape} voxels: {LEAST_SIDE} a side are needed")
    values = plane.astype(np.float64)
    inside = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    signal = signal_in(values)[inside]
    details = convolve1d(convolve1d(values, DIFFERENCE, axis=0), DIFFERENCE, axis=1)[inside]
    slope = np.hypot(*np.gradient(gaussian_filter(values, EDGE)))[inside]
    smooth = slope <= np.median(slope)
    return signal[smooth], details[smooth]


def _fitted(signal: Floats, sigma: Floats) -> NoiseModel:
    """By least squares of relative errors, as the spread of a variance grows with it."""
    weight = 1 / np.square(sigma)
    terms = np.stack([signal * weight, weight], axis=1)
    gain, offset = np.linalg.lstsq(terms, np.ones_like(signal), rcond=None)[0]
    return NoiseModel(float(gain), float(offset), float(np.square(sigma).min()))
