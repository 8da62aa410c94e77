"""How strong the noise of a volume is at each level of its signal, and whether it is white; from noisy slices alone.

Source: Foi, Trimeche, Katkovnik & Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting for
single-image raw-data" (IEEE TIP 2008): details that hold next to no signal, sorted by the signal that they lie on, away
from edges. Ours are second differences along y and x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d, gaussian_filter, maximum_filter, minimum_filter

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.noise_model import SIGNAL, NoiseModel, fitted, local_means

Floats = NDArray[np.float64]

DIFFERENCE = np.array([1.0, -2.0, 1.0]) / np.sqrt(6)  # turns white noise into noise of the same variance
EDGE = 3.0  # of the Gaussian behind which edges are looked for
MARGIN = 4  # voxels at a slice's border, which filters see mirrored
LEVELS = 16  # of signal, with as many voxels each
LEAST_SIDE = 4 * MARGIN
LEAST_VOXELS, LEAST_IN_SLICE = 4096, 64  # away from edges
MEDIAN = 0.6745  # of |x|, for a standard normal x
BEYOND = 3.5  # standard deviations: details that are structure


@dataclass(frozen=True)
class NoiseCurve:
    """(n,) mean levels, the standard deviation of voxels there, both in grey levels, and the model fitted to them."""

    signal: tuple[float, ...]
    sigma: tuple[float, ...]
    model: NoiseModel


def measure_curve(slices: Sequence[NDArray[Any]]) -> NoiseCurve:
    """The noise of (y, x) slices by their signal. It is taken for white; see `neighbour_noise`.

    The half of all voxels that is farthest from edges is sorted by signal into LEVELS groups of one size; groups that
    show no noise are left out, as where nearly all was cut off. Raises InputError for fewer than LEAST_VOXELS such
    voxels, or if most groups show none.
    """
    found = [_smooth_half(each) for each in slices]
    signal, details = (np.concatenate(each) for each in zip(*found, strict=True))
    if signal.size < LEAST_VOXELS:
        raise InputError(f"noise cannot be measured on slices of {signal.size} smooth voxels: give {LEAST_VOXELS}")
    groups = np.array_split(np.argsort(signal, kind="stable"), LEVELS)
    levels = np.array([signal[group].mean() for group in groups])
    sigma = np.array([spread(details[group]) for group in groups])
    noisy = sigma > 0
    if noisy.mean() < 0.5:
        raise InputError("no noise can be measured: slices are flat in places, as synthetic ones are")
    levels, sigma = levels[noisy], sigma[noisy]
    return NoiseCurve(
        tuple(levels), tuple(sigma), fitted(levels, sigma, np.concatenate([_with_noise(each) for each in slices]))
    )


def slice_sigma(plane: NDArray[Any]) -> float:
    """Standard deviation of a (y, x) slice's noise, whatever its signal, in grey levels; it is taken for white.

    0 where there are too few voxels to be measured.
    """
    details = _smooth_half(plane)[1]
    return spread(details) if details.size >= LEAST_IN_SLICE else 0.0


def spread(details: Floats) -> float:
    """Standard deviation of all but the few values beyond BEYOND of it, which are structure."""
    found = float(np.median(np.abs(details))) / MEDIAN or float(details.std())  # 0 if most counts are equal
    for _ in range(3):
        found = float(details[np.abs(details) <= BEYOND * found].std())
    return found


def neighbour_noise(plane: NDArray[Any]) -> tuple[float, float]:
    """How far the noise of voxels beside each other along y, and along x, correlates: 0 for white noise.

    From the correlation c of successive details, which is -2/3 for white noise, as if voxels farther apart shared
    nothing: c = (7 r - 4) / (6 - 8 r). Stripes, the same offset for a whole scan line, are not seen. 0 where nothing
    can be measured.
    """
    _, details, smooth = _parts(plane)
    found = []
    for along, counts in ((details, smooth), (details.T, smooth.T)):
        pairs = counts[1:] & counts[:-1]
        first, second = along[:-1][pairs], along[1:][pairs]
        limit = BEYOND * spread(along[counts]) if pairs.any() else 0.0
        inside = (np.abs(first) <= limit) & (np.abs(second) <= limit)
        power = float(np.square(first[inside]).sum() + np.square(second[inside]).sum()) / 2
        c = float((first[inside] * second[inside]).sum()) / power if power > 0 else -2 / 3
        found.append((6 * c + 4) / (7 + 8 * c))
    return found[0], found[1]


def _parts(plane: NDArray[Any]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """(y, x) signal, details, and which voxels are farther from edges than the other half; no borders.

    What is exactly flat, as the frame around an aligned slice or a saturated part, holds no noise, and is not counted.
    Raises InputError for a slice that is too small.
    """
    if min(plane.shape) < LEAST_SIDE:
        raise InputError(f"noise cannot be measured on slices of {plane.shape} voxels: {LEAST_SIDE} a side are needed")
    values = plane.astype(np.float64)
    inside = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    details = convolve1d(convolve1d(values, DIFFERENCE, axis=0), DIFFERENCE, axis=1)
    slope = np.hypot(*np.gradient(gaussian_filter(values, EDGE)))
    rough = ~_flat(values)[inside]
    limit = np.median(slope[inside][rough]) if rough.any() else 0.0
    return local_means(values)[inside], details[inside], rough & (slope[inside] <= limit)


def _with_noise(plane: NDArray[Any]) -> NDArray[Any]:
    """(n,) voxels but for those of what is exactly flat."""
    found: NDArray[Any] = plane[~maximum_filter(_flat(plane), SIGNAL)]
    return found


def _flat(plane: NDArray[Any]) -> NDArray[np.bool_]:
    """(y, x) which voxels have but their equals around."""
    found: NDArray[np.bool_] = maximum_filter(plane, SIGNAL) == minimum_filter(plane, SIGNAL)
    return found


def _smooth_half(plane: NDArray[Any]) -> tuple[Floats, Floats]:
    """Signal and details of the voxels that are farther from edges than the other half."""
    signal, details, smooth = _parts(plane)
    return signal[smooth], details[smooth]
