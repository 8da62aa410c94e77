"""Structure that changes slowly along z, with slices shifted against each other as a test wants."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter
from scipy.ndimage import shift as shifted

MARGIN = 12


@cache
def structure(slices: int = 24, side: int = 128, seed: int = 0) -> NDArray[np.float64]:
    """(z, y, x) blobs with walls, whose neighbouring slices are much alike; MARGIN voxels more on each side."""
    shape = (slices, side + 2 * MARGIN, side + 2 * MARGIN)
    found = gaussian_filter(np.random.default_rng(seed).normal(size=shape), (8, 4, 4))
    made: NDArray[np.float64] = 128 + 35 * np.tanh(2 * found / found.std())
    made.flags.writeable = False
    return made


def drifting(positions: ArrayLike, sigma: float = 0.0, side: int = 128) -> NDArray[np.uint8]:
    """As many slices as positions (n, 2): y and x where each slice's structure lies; noise of sigma, at 8 bit."""
    places = np.asarray(positions, float)
    whole = structure(len(places), side)
    moved = [
        shifted(plane, place, order=0 if (place == place.round()).all() else 3)
        for plane, place in zip(whole, places, strict=True)
    ]
    seen = np.stack(moved)[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    noisy = seen + np.random.default_rng(7).normal(0, sigma, seen.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def one_by_one(voxels: NDArray[Any]) -> list[list[NDArray[Any]]]:
    """Slices as drift_of takes them."""
    return [[plane] for plane in voxels]
