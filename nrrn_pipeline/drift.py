"""How slices are shifted against each other: measured on crops of them, and what of that to undo.

A shift is where the structure of a slice lies, (y, x) in voxels, against another slice's. It is measured by phase
correlation (Kuglin & Hines 1975), refined by a DFT that is sampled finely around the peak (Guizar-Sicairos et al. 2008,
doi:10.1364/OL.33.000156). Only coarse structure counts, as noise covers what is fine; and nothing on the axes of the
spectrum, where stripes lie (curtaining, scan lines). Each slice is compared with the two before it that are not blank;
positions are those that fit all of that best, whatever a few comparisons say.

What is undone: jitter and jumps. What is kept: the trend, a line fitted to TREND slices around. Slow drift of the
stage and structure that slants look alike, and whoever undoes all that slices seem to have moved straightens the
structure ("banana problem"); a pair of neighbours is aligned either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.linalg import solveh_banded
from scipy.ndimage import median_filter

LEAST_SIDE = 32  # voxels; in less there is too little to compare
FINEST = 0.1  # cycles per voxel; by then weights have fallen to 1/e
BACK = 2  # slices that each one is compared with
SURE = 2.25  # times as high a peak as the highest that noise makes, typically
DOUBTED = 0.25  # voxels from the others that halve a comparison's weight
UNSURE = 1e-4  # weight of "not shifted", where nothing can be measured
ROUNDS = 20  # of weighing comparisons anew

JUMP = 2.0  # voxels from one slice to the next, at least, that stay
SPREADS = 4.0  # times the common jitter that make a jump
AROUND = 15  # slices on either side, whose median is the step to expect
PERSISTS = 5  # slices before and after that are looked at
TREND = 101  # slices that slow drift is fitted to
STIFF = 0.02  # weight of what is left of a shift, against its changes between neighbours
LARGEST = 1.5  # voxels between neighbours that are called aligned: whole voxels leave 1 along each axis at most

Floats = NDArray[np.float64]
Spectrum = NDArray[np.complex64]
Pair = tuple[int, int, Floats | None]  # a slice, one before it, and the shift of one against the other if it shows


@dataclass(frozen=True, eq=False)
class Drift:
    """Where the structure of each slice from first_z on lies.

    position: (n, 2) y and x in voxels, against the first slice that is known. Where `known` (n,) is False it is that of
    the slice before: the slice is blank, or its structure is not found in its neighbours.
    """

    first_z: int
    position: Floats
    known: NDArray[np.bool_]

    @property
    def told(self) -> bool:
        """Whether most slices could be compared with a neighbour."""
        return len(self.known) > 1 and float(self.known.mean()) > 0.5

    @property
    def compared(self) -> NDArray[np.bool_]:
        """(n,) whether a slice and the one before are known."""
        found: NDArray[np.bool_] = self.known & np.concatenate([[False], self.known[:-1]])
        return found

    @cached_property
    def jumps(self) -> tuple[int, ...]:
        """Slices (z) that are shifted far against the one before, as are all after them."""
        if not self.told:
            return ()
        steps = np.diff(self.position, axis=0)
        sudden = steps - median_filter(steps, (2 * AROUND + 1, 1), mode="nearest")
        size, flat = np.hypot(*sudden.T), np.concatenate([np.zeros((1, 2)), np.cumsum(sudden, axis=0)])
        least = max(JUMP, SPREADS * float(np.median(size)))
        return tuple(self.first_z + i for i in (np.flatnonzero(size > least) + 1).tolist() if _stays(flat, i))

    @cached_property
    def trend(self) -> Floats:
        """(n, 2) slow drift: a line fitted to TREND slices around each one, without jumps."""
        from scipy.signal import savgol_filter  # slow to import, for none but this

        count = len(self.position)
        window = min(TREND, count - 1 + count % 2)
        if window < 3:
            return np.zeros_like(self.position)
        steady = self.position.copy()
        for z in self.jumps:
            i = z - self.first_z
            steady[i:] -= self.position[i] - self.position[i - 1]
        steady = median_filter(steady, (min(PERSISTS, window), 1), mode="nearest")
        found: Floats = savgol_filter(steady, window, 1, axis=0)
        return found

    @cached_property
    def steps(self) -> Floats:
        """(n,) how far each slice is shifted against the one before, in voxels, but for the trend; 0 if not known."""
        found = np.hypot(*np.diff(self.position - self.trend, axis=0, prepend=np.zeros((1, 2))).T)
        return np.where(self.compared, found, 0.0)

    @property
    def worst_z(self) -> int:
        """The slice that is shifted most against the one before."""
        return self.first_z + int(self.steps.argmax())

    @property
    def aligned(self) -> bool:
        """Whether neighbours lie as near to each other as whole voxels can bring them."""
        return self.told and float(self.steps.max()) <= LARGEST

    @property
    def slope(self) -> float:
        """The fastest slow drift, in voxels a slice."""
        return float(np.hypot(*np.diff(self.trend, axis=0).T).max(initial=0.0))

    def moves(self, undo_trend: bool = False) -> NDArray[np.int64]:
        """(n, 2) whole voxels along y and x by which each slice is to be moved back."""
        wanted = self.position if undo_trend else self.position - self.trend
        return np.stack([_whole(along) for along in wanted.T], axis=1)


def _stays(position: Floats, i: int) -> bool:
    """Whether slices from i on lie elsewhere than those before."""
    before, after = position[max(0, i - PERSISTS) : i], position[i : i + PERSISTS]
    return float(np.hypot(*(np.median(after, axis=0) - np.median(before, axis=0)))) > JUMP


def _whole(wanted: Floats) -> NDArray[np.int64]:
    """(n,) whole numbers near (n,) wanted ones, so that what is left changes least from one to the next.

    Plainly rounded, what wavers around a half would be moved to and fro. Found by dynamic programming.
    """
    near = np.rint(wanted)[:, None] + np.array([0, -1, 1])
    left = wanted[:, None] - near
    cost, best = STIFF * np.square(left[0]), []
    for before, now in pairwise(left):
        ways = cost[:, None] + np.square(now[None] - before[:, None])
        best.append(ways.argmin(axis=0))
        cost = ways.min(axis=0) + STIFF * np.square(now)
    chosen = [int(cost.argmin())]
    for came_from in reversed(best):
        chosen.append(int(came_from[chosen[-1]]))
    found: NDArray[np.int64] = near[np.arange(len(near)), chosen[::-1]].astype(np.int64)
    return found


class DriftMeter:
    """Is given one slice after the other, each as (y, x) crops at the same places; then tells their drift.

    All crops are of one shape, of LEAST_SIDE or more.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seen: list[tuple[int, list[Spectrum]]] = []  # the last that were not blank
        self._pairs: list[Pair] = []

    def add(self, crops: Sequence[NDArray[Any]]) -> None:
        """The next slice. A blank one is passed over: those around it are compared with each other."""
        z, shape = self._count, crops[0].shape
        self._count += 1
        if all(crop.min() == crop.max() for crop in crops):
            return
        spectra = [_spectrum(crop) for crop in crops]
        self._pairs += [(z, before, _shift(known, spectra, shape)) for before, known in self._seen]
        self._seen = [*self._seen, (z, spectra)][-BACK:]

    def drift(self, first_z: int = 0) -> Drift:
        """The drift of the slices so far, the first of which is first_z."""
        known = np.zeros(self._count, bool)
        known[[z for *both, shift in self._pairs if shift is not None for z in both]] = True
        return Drift(first_z, _positions(self._pairs, known), known)


def drift_of(slices: Iterable[Sequence[NDArray[Any]]], first_z: int = 0) -> Drift:
    """The drift of slices, each given as DriftMeter takes it."""
    meter = DriftMeter()
    for crops in slices:
        meter.add(crops)
    return meter.drift(first_z)


def _spectrum(crop: NDArray[Any]) -> Spectrum:
    """The spectrum of a (y, x) crop, in units of its std, that fades out towards its borders."""
    values = crop - crop.mean(dtype=np.float64)
    values /= values.std() or 1.0
    found: Spectrum = fft.rfft2(values.astype(np.float32) * _window(crop.shape))
    return found


def _shift(before: list[Spectrum], after: list[Spectrum], shape: tuple[int, ...]) -> Floats | None:
    """How far `after` is shifted against `before`, (y, x) in voxels; None if they share no structure that shows.

    Both are spectra of crops of this shape; all crops are taken to be shifted alike.
    """
    weights, noise = _weights(shape)
    product = np.zeros(weights.shape, np.complex64)
    for first, second in zip(before, after, strict=True):
        cross = np.conj(first) * second
        product += cross / np.maximum(np.abs(cross), np.finfo(np.float32).tiny)
    product *= weights
    surface = fft.irfft2(product, shape)
    if not surface.max() >= SURE * noise * len(before) ** 0.5:  # nor if it is no number
        return None
    peak = np.array(np.unravel_index(int(surface.argmax()), shape), float)
    peak -= np.where(peak > np.array(shape) // 2, shape, 0)
    for step in (0.1, 0.01):
        peak = _refined(product, peak, step, shape)
    return peak


def _refined(product: Spectrum, peak: Floats, step: float, shape: tuple[int, ...]) -> Floats:
    """The highest of 21 x 21 points around a peak."""
    y, x = (place + step * np.arange(-10, 11) for place in peak)
    along_y = np.exp(2j * np.pi * np.outer(y, fft.fftfreq(shape[0]))).astype(np.complex64)
    along_x = np.exp(2j * np.pi * np.outer(fft.rfftfreq(shape[1]), x)).astype(np.complex64)
    fine = (along_y @ product @ along_x).real  # of a spectrum without what is its own mirror image: see _weights
    i, j = np.unravel_index(int(fine.argmax()), fine.shape)
    return np.array([y[i], x[j]])


@lru_cache(maxsize=4)
def _window(shape: tuple[int, ...]) -> NDArray[np.float32]:
    y, x = (np.hanning(length + 2)[1:-1] for length in shape)
    return np.outer(y, x).astype(np.float32)


@lru_cache(maxsize=4)
def _weights(shape: tuple[int, ...]) -> tuple[NDArray[np.float32], float]:
    """What counts of a spectrum; and the highest peak that one crop of noise makes of that, typically."""
    y, x = np.abs(fft.fftfreq(shape[0]))[:, None], fft.rfftfreq(shape[1])[None]
    found = np.exp(-(np.square(y) + np.square(x)) / FINEST**2)
    found[(y < 1.5 / shape[0]) | (x < 1.5 / shape[1])] = 0  # the window smears the axes by 1
    spread = float(np.sqrt(2 * np.square(found).sum())) / (shape[0] * shape[1])
    cells = np.pi * FINEST**2 * shape[0] * shape[1]  # about as many heights that differ
    return found.astype(np.float32), spread * float(np.sqrt(2 * np.log(cells)))


def _positions(pairs: list[Pair], known: NDArray[np.bool_]) -> Floats:
    """(n, 2) the positions that fit shifts between pairs of slices (z, before, shift) best.

    By least squares, in which each comparison counts the less, the farther it is from what the others say.
    """
    if not known.any():
        return np.zeros((len(known), 2))
    ends = np.array([(z, before) for z, before, _ in pairs])
    compared = np.unique(ends)
    later, before = np.searchsorted(compared, ends).T
    shifts = np.array([np.zeros(2) if shift is None else shift for _, _, shift in pairs])
    sure = np.array([UNSURE if shift is None else 1.0 for _, _, shift in pairs])
    weights = sure
    for _ in range(ROUNDS):
        fitted = _fitted(later, before, shifts, weights)
        off = np.hypot(*(fitted[later] - fitted[before] - shifts).T)
        weights = sure / (1 + np.square(off / DOUBTED))
    there = np.flatnonzero(known)
    found = fitted[np.searchsorted(compared, there)]
    last = np.searchsorted(there, np.arange(len(known)), side="right") - 1
    placed: Floats = (found - found[0])[last.clip(min=0)]
    return placed


def _fitted(later: NDArray[Any], before: NDArray[Any], shifts: Floats, weights: Floats) -> Floats:
    """(n, 2) the weighted least squares of later - before = shift; the first lies at 0."""
    size = int(later.max()) + 1
    banded, right = np.zeros((BACK + 1, size)), np.zeros((size, 2))
    np.add.at(banded[0], later, weights)
    np.add.at(banded[0], before, weights)
    np.add.at(banded, (later - before, before), -weights)
    np.add.at(right, later, weights[:, None] * shifts)
    np.add.at(right, before, -weights[:, None] * shifts)
    banded[0, 0] += 1.0  # holds the first
    found: Floats = solveh_banded(banded, right, lower=True)
    found -= found[0]
    return found
