"""Where a slice is flat: the parts in which what varies is noise, found without a person who points at them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nrrn_pipeline.geometry import Box, Span

SIDE = 16  # voxels along y and x
MOST = 32  # of one slice
SHARE = 8  # one of so many windows is taken, at most
BEHIND = 3.0  # sigma of the Gaussian behind which the signal is looked for, as noise has slopes too


def flat_windows(plane: NDArray[Any]) -> list[Box]:
    """Windows of SIDE x SIDE voxels of a (y, x) slice, as boxes of slice 0, with the least slope of signal in them.

    Those that are constant, as what is saturated, are not among them; there may be none.
    """
    rows, columns = (length // SIDE for length in plane.shape)
    smooth = gaussian_filter(plane.astype(np.float64), BEHIND)
    slope = _cells(np.hypot(*np.gradient(smooth)), rows, columns).mean(axis=(1, 3))
    slope[np.ptp(_cells(plane, rows, columns), axis=(1, 3)) == 0] = np.inf
    wanted = max(1, min(MOST, rows * columns // SHARE))
    found = []
    for cell in np.argsort(slope, axis=None, kind="stable")[:wanted]:
        y, x = divmod(int(cell), columns)
        if np.isfinite(slope[y, x]):
            found.append(Box(Span(0, 1), *(Span(at * SIDE, (at + 1) * SIDE) for at in (y, x))))
    return found


def flat_deviations(planes: NDArray[Any], windows: list[list[Box]]) -> NDArray[np.float64]:
    """(n,) grey levels by which voxels of (z, y, x) slices differ from the median of their flat window."""
    parts = [
        part - np.median(part)
        for plane, own in zip(planes, windows, strict=True)
        for part in (plane[window.y.start : window.y.stop, window.x.start : window.x.stop].ravel() for window in own)
    ]
    return np.concatenate(parts, dtype=np.float64) if parts else np.empty(0)


def _cells(plane: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """(rows, SIDE, columns, SIDE) of what whole windows there are."""
    whole: NDArray[Any] = plane[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE)
    return whole
