"""Two noisy images from one, of the same clean slice and next to independent: one to see, and one to ask for.

Source: Pang, Zheng, Quan & Ji, "Recorrupted-to-Recorrupted: Unsupervised deep learning for image denoising" (CVPR
2021), for normal noise; for counts, thinning (Monroy, Bacca & Tachella, "Generalized Recorrupted-to-Recorrupted", CVPR
2025). No clean data, one noisy image of each slice, noise of known strength.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import poisson

from nrrn_pipeline.noise_model import SIGNAL, NoiseModel, local_means

Floats = NDArray[np.float64]

ALPHA = 0.5  # Pang et al.'s: noise added to what is seen, in standard deviations of the noise that is there
SEEN = 1 / (1 + ALPHA**2)  # share of all counts that is seen: what is asked for is then as noisy as with normal noise
LEAST_CHANCE = 1e-300
MOST_CHANCE = 1 - 1e-12


def recorrupted(triplets: NDArray[Any], noise: NoiseModel, random: np.random.Generator) -> tuple[Floats, Floats]:
    """(..., 3, y, x) noisy triplets, in grey levels -> (..., y, x) twice: what to see, and to ask for, at the centre.

    Both are the clean slices with noise added: of variance 1 + ALPHA^2 times, and 1 + 1 / ALPHA^2 times what they
    had; of counts, what is seen has as much as there was. The noise of one tells next to nothing of the other's, so the
    network learns what it would from clean slices, whose expected loss is this one's less a constant. Where voxels
    were cut off, what they may have been before is drawn: what is seen is cut off again, what is asked for is not.

    Of counts, what is taken away to be asked for is replaced by as many drawn at the local mean of what is left and of
    the slices around: so the network sees as many counts as it will, and white cuts off as many.
    """
    noisy, (before, own, after) = triplets[..., 1, :, :], _signals(triplets, noise)
    signal = (before + own + after) / 3
    if noise.counts:
        counts = _counts(noisy, signal, noise, random)
        thinned = random.binomial(counts, SEEN)
        left = (before + local_means(thinned) / SEEN * noise.gain + after) / 3
        filled = thinned + random.poisson((1 - SEEN) * np.maximum(left, 0) / noise.gain)
        seen = filled.astype(np.float64) * noise.gain
        asked = (counts - thinned) / (1 - SEEN) * noise.gain
    else:
        sigma = noise.sigma(signal)
        whole = _drawn_beyond(noisy.astype(np.float64), signal, sigma, noise, random)
        added = sigma * random.standard_normal(noisy.shape)
        seen, asked = whole + ALPHA * added, whole - added / ALPHA
    if noise.cut:
        seen = np.clip(seen, noise.black, noise.white)
    return seen, asked


def _signals(triplets: NDArray[Any], noise: NoiseModel) -> Floats:
    """(3, ..., y, x) the slices' signals, made as bright in the mean as the centre's: charging changes it."""
    signals = np.moveaxis(noise.signal_in(triplets), -3, 0)
    means = signals.mean(axis=(-2, -1), keepdims=True)
    found: Floats = signals - means + means[1]
    return found


def _counts(noisy: NDArray[Any], signal: Floats, noise: NoiseModel, random: np.random.Generator) -> NDArray[np.int64]:
    """How many there were; beyond white, drawn."""
    counts = np.maximum(np.rint(noisy / noise.gain), 0).astype(np.int64)
    if noise.white is not None:
        cut = _among_others(counts >= noise.counts_at_white)
        rate = np.maximum(signal[cut], 0) / noise.gain
        least = poisson.cdf(noise.counts_at_white - 1, rate)
        chance = np.minimum(least + (1 - least) * random.random(rate.shape), MOST_CHANCE)
        counts[cut] = np.maximum(poisson.ppf(chance, rate), noise.counts_at_white)
    return counts


def _drawn_beyond(
    noisy: Floats, signal: Floats, sigma: Floats, noise: NoiseModel, random: np.random.Generator
) -> Floats:
    """The same, with what lay at black or white drawn from the part of the normal distribution beyond."""
    for limit, sign in ((noise.black, -1), (noise.white, 1)):
        if limit is not None:
            cut = _among_others(sign * noisy >= sign * limit)
            beyond = ndtr(sign * (signal[cut] - limit) / sigma[cut])
            chance = np.maximum(beyond * random.random(beyond.shape), LEAST_CHANCE)
            drawn = signal[cut] - sign * sigma[cut] * ndtri(chance)
            noisy[cut] = limit + sign * np.maximum(sign * (drawn - limit), 0)
    return noisy


def _among_others(cut: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without those that have none but such around: a frame without image, or a part of which nothing is left."""
    return cut & (local_means(cut) < 1 - 0.5 / SIGNAL**2)
