"""Synthetic noise that does not depend on how a volume is cut: Gaussian, Poisson, or both (Giannios et al., NRRN).

    u, g     a uniform and a standard normal number for each voxel
    Poisson  k = the least count whose cumulative probability at rate voxel / top * peak reaches u; k / peak * top
    Gaussian voxel + sigma * g

top is the upper end of the grey levels: 255, 65535, or 1 of floats. The numbers of whole cells of a grid anchored at
voxel 0 are drawn, each cell from its own streams, and cropped. One number a voxel serves a count of any size, so the
noise of a voxel depends on its value, its place and the seed alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, cells_of

CELL = 128  # voxels along y and x: what is computed at a time stays in the cache
POISSON, GAUSSIAN = 0, 1  # streams
MOST_SIGMA, LEAST_PEAK, MOST_PEAK = 65535.0, 1e-3, 1e5  # beyond these there is nothing of an image, or of noise
MOST_SEARCHED = 700.0  # the largest rate, whose exp(-rate) a float still holds

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Noise of one volume: Poisson of `peak` expected counts at the top grey level, then Gaussian of `sigma`.

    sigma is in grey levels. The paper's are sigma 10 to 75 of 255, peak 1 to 50. Raises InputError if there is neither.
    """

    reach: ClassVar[int] = 0
    grid: ClassVar[int] = 1

    sigma: float = 0.0
    peak: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= MOST_SIGMA:
            raise InputError(f"sigma {self.sigma} is not possible: use 0 to {MOST_SIGMA:g} grey levels, such as 25")
        if self.peak is not None and not LEAST_PEAK <= self.peak <= MOST_PEAK:
            raise InputError(
                f"peak {self.peak} is not possible: use {LEAST_PEAK:g} to {MOST_PEAK:g} counts, such as 30, or none"
            )
        if self.sigma == 0 and self.peak is None:
            raise InputError("no noise was asked for: give a sigma above 0, a peak, or both")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is not possible: use 0 or more")

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from other noise; JSON."""
        return {"noise": asdict(self)}

    def added(self, voxels: NDArray[Any], box: Box) -> NDArray[Any]:
        """(z, y, x) voxels of a volume, with noise, in their dtype; `box` is their place in the volume.

        Integers are rounded and clipped to their dtype's range. Floats are taken to range from 0 to 1, but not clipped;
        below 0 there are no counts. Raises ValueError if the voxels do not fit the box.
        """
        if voxels.shape != box.shape:
            raise ValueError(f"voxels {voxels.shape} do not fit box {box}")
        noisy = np.empty_like(voxels)
        for part in cells_of(box, (1, CELL, CELL)):
            here = part.within(box)
            noisy[here] = self._added_in_cell(voxels[here], part)
        return noisy

    def _added_in_cell(self, voxels: NDArray[Any], part: Box) -> NDArray[Any]:
        """The same for voxels of one cell."""
        z, y, x = part.z.start, part.y.start // CELL, part.x.start // CELL
        cell = Box(part.z, *(Span(at * CELL, (at + 1) * CELL) for at in (y, x)))
        here = part.within(cell)
        integer = voxels.dtype.kind in "iu"
        top = float(np.iinfo(voxels.dtype).max) if integer else 1.0
        noisy = voxels.astype(np.float64)
        if self.peak is not None:
            uniform = self._generator(POISSON, z, y, x).random(cell.shape)[here]
            noisy = poisson_counts(np.maximum(noisy, 0) * (self.peak / top), uniform) * (top / self.peak)
        if self.sigma > 0:
            noisy += self.sigma * self._generator(GAUSSIAN, z, y, x).standard_normal(cell.shape)[here]
        return np.clip(np.rint(noisy), 0, top).astype(voxels.dtype) if integer else noisy.astype(voxels.dtype)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))


def poisson_counts(rates: Floats, uniform: Floats) -> Floats:
    """The least counts whose cumulative probabilities at `rates` reach `uniform` numbers, 0 <= u < 1.

    By sequential search (Devroye 1986, X.3.3), which at rates of tens is 20 times as fast as scipy's poisson.ppf.
    """
    from scipy.stats import poisson  # slow to import, for none but this

    found = np.empty(rates.shape)
    few = rates <= MOST_SEARCHED
    found[few] = _searched(rates[few], uniform[few])
    found[~few] = np.maximum(poisson.ppf(uniform[~few], rates[~few]), 0)  # of a uniform 0 it is -1
    return found


def _searched(rates: Floats, uniform: Floats) -> Floats:
    counts, chances = np.zeros(rates.shape), np.exp(-rates)
    left = uniform * (1 - 2.0**-40)  # rounded, all chances may add up to a little less than 1
    left -= chances
    step = 0
    while (more := left > 0).any():
        step += 1
        counts += more
        chances *= rates
        chances /= step
        left -= chances
    return counts
