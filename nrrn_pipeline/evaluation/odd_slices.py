"""Slices that look wrong, by every slice's mean and standard deviation alone: no voxel is read.

Charging, a beam that was refocused, or a shutter that stayed closed changes a whole slice; a specimen does not, from
one slice to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLANK, BRIGHTNESS, CONTRAST, STEP = "blank", "brightness", "contrast", "brightness from there on"

AROUND = 5  # slices on either side
UNLIKELY = 6.0  # robust standard deviations
LEAST_BRIGHTNESS = 0.1  # of the slices' contrast: less is no fault, however alike all others are
LEAST_CONTRAST = 0.15  # of the contrast around
MAD = 1.4826  # standard deviations of normal values in a median absolute deviation


def odd_slices(mean: Sequence[float], std: Sequence[float]) -> dict[str, list[int]]:
    """What is wrong -> numbers of the slices, counted from the first; of slices' means and stds in grey levels.

    A std of 0 marks a blank slice. Brightness and contrast are held against the median of AROUND slices on either
    side, so that a step for good is no oddity of all that follow; only the first slice after it is named.
    """
    there = np.flatnonzero(np.asarray(std) > 0)
    levels, contrasts = np.asarray(mean, float)[there], np.asarray(std, float)[there]
    found = {BLANK: sorted(set(range(len(mean))) - set(there.tolist()))}
    if len(there) >= 3:
        least = LEAST_BRIGHTNESS * float(np.median(contrasts))
        bright = _unlike(levels, lambda own, around: own - around, least)
        contrast = _unlike(contrasts, lambda own, around: np.log(own / around), np.log1p(LEAST_CONTRAST))
        found[BRIGHTNESS] = there[bright].tolist()
        found[CONTRAST] = there[contrast & ~bright].tolist()
        found[STEP] = there[~bright][_steps(levels[~bright], least)].tolist()
    return {reason: slices for reason, slices in found.items() if slices}


def _unlike(values: Floats, apart: Callable[[Floats, Floats], Floats], least: float) -> NDArray[np.bool_]:
    """Which values are farther from the median around than `least`, and than others are."""
    padded = np.pad(values, AROUND, constant_values=np.nan)
    around = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1), axis=1)
    distance = apart(values, around)
    usual = MAD * float(np.median(np.abs(distance)))
    found: NDArray[np.bool_] = np.abs(distance) > max(least, UNLIKELY * usual)
    return found


def _steps(levels: Floats, least: float) -> list[int]:
    """Where the level changes for good: AROUND slices, or what there are, before and after differ in their medians."""
    if len(levels) < 2:
        return []
    steps = np.diff(levels)
    usual = MAD * float(np.median(np.abs(steps - np.median(steps))))
    limit = max(least, UNLIKELY * usual)
    return [
        at
        for at in range(1, len(levels))
        if abs(steps[at - 1]) > limit
        and abs(np.median(levels[at : at + AROUND]) - np.median(levels[max(0, at - AROUND) : at])) > limit
    ]
