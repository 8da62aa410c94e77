"""The noise of a volume as a model: its strength by the signal, and the levels beyond which voxels are cut off.

    variance(signal) = gain * signal + offset        in grey levels, squared

Counting noise has a gain, noise of the electronics an offset. What exceeds the darkest or brightest level that a file
holds is cut off there, which makes noise look weaker, and the mean of voxels wrong. Source: Foi, "Clipped noisy images:
heteroskedastic modeling and practical denoising" (Signal Processing 2009).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.optimize import least_squares
from scipy.special import ndtr

from nrrn_pipeline.errors import InputError

Floats = NDArray[np.float64]

SIGNAL = 7  # the signal at a voxel is a mean over 7 x 7
GRID = 256  # signals, between which what a camera makes of them is interpolated
FAR = 40.0  # standard deviations: no voxel of normal noise lies there
SURELY_CUT = 1e-3  # share of the voxels at an extreme level: where noise ends by itself there are fewer
LEAST_CUT, LEAST_CUT_VOXELS = 1e-5, 16  # share and number of them that count if the next level has less
INSIDE = 0.7  # of a signal at a cut the mean lies 0.68 of its standard deviations inside, which are 0.58 of others
LEAST_LEVELS = 3  # that are not
WRONG = 0.05  # median relative error of the standard deviations that voxels have which are counts
MOST_COUNTS = 128  # at white: with more, counting noise is as good as normal
LEAST_SPACING = 3  # grey levels between counts: those of integers are rounded
IRREGULAR = 0.02  # of the spacing of counts, beside what rounding does


@dataclass(frozen=True)
class NoiseModel:
    """Noise whose variance is gain * signal + offset, and `least` where that is less; grey levels squared.

    It is normal; or with `counts` the voxels are Poisson counts, each of `gain` grey levels, which have no `black`.
    black, white: levels beyond which voxels were cut off; None: nothing was.
    """

    gain: float
    offset: float
    least: float
    counts: bool = False
    black: float | None = None
    white: float | None = None

    @property
    def cut(self) -> bool:
        """Whether any voxels were cut off."""
        return self.black is not None or self.white is not None

    def sigma(self, signal: NDArray[Any]) -> Floats:
        """Standard deviation of the noise on voxels of that signal, both in grey levels, before any cut."""
        return np.sqrt(np.maximum(self.gain * np.asarray(signal, np.float64) + self.offset, self.least))

    def as_seen(self, signal: NDArray[Any]) -> tuple[Floats, Floats]:
        """(n,) signals -> mean and standard deviation of voxels of that signal, with what was cut off."""
        signal = np.asarray(signal, np.float64)
        if not self.cut:
            return signal, self.sigma(signal)
        if self.counts:
            from scipy.stats import poisson  # slow to import, for none but this

            most = self.counts_at_white
            counts = np.arange(most + 1)
            chances = poisson.pmf(counts, np.maximum(signal, 0)[:, None] / self.gain)
            chances[:, -1] += poisson.sf(most, np.maximum(signal, 0) / self.gain)
            mean = chances @ counts
            return mean * self.gain, np.sqrt(np.maximum(chances @ counts**2 - mean**2, 0)) * self.gain
        sigma = self.sigma(signal)
        low = -FAR if self.black is None else np.clip((self.black - signal) / sigma, -FAR, FAR)
        high = FAR if self.white is None else np.clip((self.white - signal) / sigma, -FAR, FAR)
        below, above = ndtr(low), ndtr(-high)
        at_low, at_high = (np.exp(-np.square(at) / 2) / np.sqrt(2 * np.pi) for at in (low, high))
        mean = low * below + at_low - at_high + high * above
        power = low**2 * below + (1 - below - above) + low * at_low - high * at_high + high**2 * above
        return signal + sigma * mean, sigma * np.sqrt(np.maximum(power - mean**2, 0))

    def signal_in(self, noisy: NDArray[Any]) -> Floats:
        """(..., y, x) noisy slices -> their signal as far as noise depends on it, in grey levels.

        The mean of SIGNAL x SIGNAL voxels; where some of these were cut off, of what they were before.
        """
        means = local_means(noisy)
        if not self.cut:
            return means
        signals, seen, _ = on_grid(self, *self.ends(means))
        found: Floats = np.interp(means, seen, signals)
        return found

    def ends(self, means: Floats) -> tuple[float, float]:
        """The darkest and the brightest signal that can be behind voxels with such means."""
        darkest = 0.0 if self.counts else float(means.min()) if self.black is None else self.black
        return darkest, float(means.max()) if self.white is None else self.white

    @property
    def counts_at_white(self) -> int:
        """The most that a voxel of counts can show, where anything is cut off."""
        return 0 if self.white is None else round(self.white / self.gain)


@lru_cache(maxsize=8)
def on_grid(model: NoiseModel, start: float, stop: float) -> tuple[Floats, Floats, Floats]:
    """(GRID,) signals, and the mean, ascending, and the standard deviation of voxels of these, as seen."""
    signals = np.linspace(start, stop, GRID)
    means, spreads = model.as_seen(signals)
    return signals, np.maximum.accumulate(means), spreads


def local_means(noisy: NDArray[Any]) -> Floats:
    """(..., y, x) -> the mean of the SIGNAL x SIGNAL voxels around each."""
    found: Floats = uniform_filter(noisy.astype(np.float64), SIGNAL, axes=(-2, -1))
    return found


def fitted(signal: Floats, sigma: Floats, voxels: NDArray[Any]) -> NoiseModel:
    """The model of the (n,) standard deviations measured on (n,) mean levels of `voxels`; in any unit.

    It is of counts if the voxels take few levels, evenly spaced, and are as strong as counts are. Raises InputError if
    most voxels are cut off.
    """
    levels, held = np.unique(voxels, return_counts=True)
    black, white = (_limit(levels[order], held[order]) for order in (np.s_[:], np.s_[::-1]))
    below_white = _inside(signal, sigma, white)
    inside = below_white & _inside(-signal, sigma, None if black is None else -black)
    model = _counts(levels[held >= LEAST_CUT_VOXELS], black, white)
    if model is None or not below_white.any() or _misfit(model, signal[below_white], sigma[below_white]) > WRONG:
        if inside.sum() < LEAST_LEVELS:
            raise InputError("noise cannot be measured: on most levels nearly all voxels are cut off at black or white")
        model = replace(_linear(signal[inside], sigma[inside]), black=black, white=white)
        if model.cut:
            model = _behind_cuts(model, signal[inside], sigma[inside])
    gain, offset, least = (float(f"{value:.9g}") for value in (model.gain, model.offset, model.least))
    return replace(model, gain=gain, offset=offset, least=least)  # the last bits differ between machines


def _inside(signal: Floats, sigma: Floats, white: float | None) -> NDArray[np.bool_]:
    """Which means are of signals below white; of others the noise looks weak, or their mean lies next to it."""
    if white is None:
        return np.ones(len(signal), bool)
    weak = (sigma < INSIDE * np.percentile(sigma, 75)) & (signal > signal[sigma.argmax()])
    found: NDArray[np.bool_] = ~weak & (white - signal > INSIDE * sigma)
    return found


def _limit(levels: NDArray[Any], held: NDArray[np.int_]) -> float | None:
    """The first level, if as many voxels lie on it as only a cut can bring there."""
    if len(levels) < 2 or held[0] < LEAST_CUT_VOXELS:
        return None
    share, to_next = held[0] / held.sum(), held[0] / held[1]
    cut = (share >= LEAST_CUT and to_next > 1) or (share >= SURELY_CUT and to_next > 0.5)
    return float(levels[0]) if cut else None


def _counts(levels: NDArray[Any], black: float | None, white: float | None) -> NoiseModel | None:
    """The model of Poisson counts, if these levels are successive counts, each of so many grey levels."""
    if not 2 <= len(levels) <= MOST_COUNTS or (black is not None and black > 0) or levels[0] < 0:
        return None
    counts = np.rint(levels[0] / np.ptp(levels) * (len(levels) - 1)) + np.arange(len(levels))
    gain = float(levels @ counts / (counts @ counts))
    rounded = bool((levels % 1 == 0).all())
    off = np.abs(levels - gain * counts).max()
    if gain <= LEAST_SPACING * rounded or off > IRREGULAR * gain + 0.5 * rounded:
        return None
    return NoiseModel(gain, 0.0, 0.0, True, None, white)


def _linear(signal: Floats, sigma: Floats) -> NoiseModel:
    """By least squares of relative errors, as the spread of a variance grows with it."""
    unit, level = _units(signal, sigma)
    weight = np.square(level / sigma)
    terms = np.stack([signal / unit * weight, weight], axis=1)
    gain, offset = np.linalg.lstsq(terms, np.ones_like(signal), rcond=None)[0]
    return NoiseModel(float(gain) * level**2 / unit, float(offset) * level**2, float(np.square(sigma).min()))


def _behind_cuts(start: NoiseModel, signal: Floats, sigma: Floats) -> NoiseModel:
    """The model that, behind its cuts, looks most like what was measured; looked for from `start`."""
    unit, level = _units(signal, sigma)

    def model(found: Floats) -> NoiseModel:
        return replace(start, gain=float(found[0]) * level**2 / unit, offset=float(found[1]) * level**2)

    def errors(found: Floats) -> Floats:
        return _errors(model(found), signal, sigma)

    first = np.array([start.gain * unit, start.offset]) / level**2
    return model(least_squares(errors, first, loss="soft_l1", f_scale=0.1).x)


def _units(signal: Floats, sigma: Floats) -> tuple[float, float]:
    """In which signals and standard deviations are about 1."""
    return float(np.abs(signal).max()) or 1.0, float(np.median(sigma))


def _errors(model: NoiseModel, signal: Floats, sigma: Floats) -> Floats:
    """Of each standard deviation that the model would show, relative to the one measured on that mean level."""
    _, seen, spreads = on_grid(model, *model.ends(signal))
    return np.interp(signal, seen, spreads) / sigma - 1


def _misfit(model: NoiseModel, signal: Floats, sigma: Floats) -> float:
    return float(np.median(np.abs(_errors(model, signal, sigma))))
