"""How wide edges are, with no clean volume and no line drawn by hand: the mean profile across many of them.

Edges of slice z are found on the mean of slices z-2 and z+2, whose noise is not that of z-1, z, z+1. So whatever sees
those three alone is measured at places that its noise did not choose: found on slice z itself, edges would seem steeper
in the input than they are, as noise helped to find them. Profiles are averaged as they are, which is linear: noise
averages out and moves no rise, so a noisy volume and its clean copy have the same width.

Widths are for comparison on the same edges: places are off by parts of a voxel, and edges move between slices, which
widens all methods alike, and makes their differences look smaller. The idea is that of Giannios et al., Fig. 3D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.feature import peak_local_max

from nrrn_pipeline.evaluation.signal import has_edge, rise_distance

Floats = NDArray[np.float64]

APART = 2  # slices from one that is measured to those that its edges are found on
SMOOTHED = 2.0  # voxels, sigma: edges are found despite the noise, membranes' two sides not as one
REACH, FINENESS = 8, 2  # voxels a profile goes to both sides, and values a voxel
ACROSS = np.arange(-REACH * FINENESS, REACH * FINENESS + 1) / FINENESS  # from dark to bright
ALONG, MIDDLE = np.arange(-2, 3), np.zeros(1)  # voxels along the edge that each value is the mean of
EVEN = 0.35  # of an edge's step: as much may the signal vary at either end, else it is no edge between two levels
LEAST = 50  # edges that a width is told of
MOST_SLICES, MOST_A_SLICE = 16, 1000  # that are looked at: more make nothing much surer
RESAMPLINGS = 200


@dataclass(frozen=True)
class Edges:
    """n edges. places: (n, 3) of z, y, x in voxels; normals: (n, 2) of y, x, of length 1, from dark to bright."""

    places: Floats
    normals: Floats

    def profiles(self, volume: NDArray[Any]) -> Floats:
        """(n, 33) grey levels across each edge, from 8 voxels on its dark side to 8 on the bright one, by half voxels.

        Each is the mean over 5 voxels along the edge; cubic splines between voxels. `volume` is (z, y, x), of the shape
        that the edges were found in.
        """
        found = np.empty((len(self.places), len(ACROSS)))
        for z in np.unique(self.places[:, 0]):
            here = self.places[:, 0] == z
            found[here] = _sampled(volume[int(z)], self.places[here, 1:], self.normals[here], ALONG)
        return found


@dataclass(frozen=True)
class Width:
    """Voxels, and the standard error by resampling edges: too small where slices show the same edges again."""

    voxels: float
    error: float


def find_edges(volume: NDArray[Any]) -> Edges:
    """Strong edges between two even levels, 8 voxels apart or more, in 16 slices at most; none in fewer than 5 slices.

    Where one side is a single grey level, such as a frame, there is none. `volume` is (z, y, x) and may be noisy.
    """
    usable = np.arange(APART, len(volume) - APART)
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, MOST_SLICES).astype(int))] if usable.size else usable
    places, normals = [np.empty((0, 3))], [np.empty((0, 2))]
    for z in chosen:
        aside = (volume[z - APART].astype(np.float64) + volume[z + APART]) / 2
        at, normal = _edges_of(aside)
        places.append(np.insert(at, 0, z, axis=1))
        normals.append(normal)
    return Edges(np.concatenate(places), np.concatenate(normals))


def width_of(profiles: Floats) -> Width | None:
    """Voxels over which the mean of Edges.profiles rises from 10 to 90 %; 2.563 sigma of a Gaussian blur.

    Up to a sigma of 2: wider edges leave the profile. None for fewer than 50 profiles, or where their mean, of any
    resampling, has no rise from dark to bright.
    """
    widths = _widths(profiles)
    return None if widths is None else Width(float(widths[0]), float(widths[1:].std()))


def wider_by(profiles: Floats, than: Floats) -> Width | None:
    """How much wider the first are than the second, profiles of the same edges, in voxels; None where width_of is.

    Its error is that of the difference, in which much of what the two have in common cancels.
    """
    if profiles.shape != than.shape:
        raise ValueError(f"profiles of shape {profiles.shape} and {than.shape} are not of the same edges")
    widths, others = _widths(profiles), _widths(than)
    if widths is None or others is None:
        return None
    return Width(float(widths[0] - others[0]), float((widths[1:] - others[1:]).std()))


def _widths(profiles: Floats) -> Floats | None:
    """Of all of them, then of each resampling: the same ones whenever there are as many profiles."""
    count = len(profiles)
    if count < LEAST:
        return None
    often = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), RESAMPLINGS)
    means = np.concatenate([profiles.mean(0, keepdims=True), often @ profiles / count])
    if not all(has_edge(mean) and mean[0] < mean[-1] for mean in means):
        return None
    return np.array([rise_distance(mean) for mean in means]) / FINENESS


def _edges_of(image: Floats) -> tuple[Floats, Floats]:
    """(n, 2) places and normals in a (y, x) image: where its gradient, smoothed, is largest."""
    away = REACH + len(ALONG) // 2 + 1  # from borders, so that no profile leaves the image
    if min(image.shape) <= 2 * away:
        return np.empty((0, 2)), np.empty((0, 2))
    gradient = np.stack([gaussian_filter(image, SMOOTHED, order) for order in ((1, 0), (0, 1))])
    strength = np.hypot(*gradient)
    tops = peak_local_max(strength, min_distance=REACH, exclude_border=away, num_peaks=MOST_A_SLICE)
    tops = tops[strength[tuple(tops.T)] > 0]
    normals = (gradient[:, tops[:, 0], tops[:, 1]] / strength[tuple(tops.T)]).T
    places = tops + _summit(strength, tops, normals)[:, None] * normals
    dark, bright = ACROSS <= -REACH / 2, ACROSS >= REACH / 2
    smooth = _sampled(gaussian_filter(image, SMOOTHED), places, normals, MIDDLE)
    step = smooth[:, bright].mean(1) - smooth[:, dark].mean(1)
    rough = _sampled(image, places, normals, MIDDLE, order=1)
    ends = [np.ptp(smooth[:, end], axis=1) < EVEN * step for end in (dark, bright)]
    ends += [np.ptp(rough[:, end], axis=1) > 0 for end in (dark, bright)]  # a frame's is 0, and noise never
    kept = np.all(ends, axis=0)
    return places[kept], normals[kept]


def _summit(strength: Floats, tops: NDArray[Any], normals: Floats) -> Floats:
    """(n,) voxels along the normals from the strongest voxel to the top of a parabola through three values."""
    before, top, after = (
        map_coordinates(strength, (tops + away * normals).T, order=3, mode="nearest") for away in (-1, 0, 1)
    )
    bend = before - 2 * top + after
    summit: Floats = np.divide(before - after, 2 * bend, out=np.zeros_like(bend), where=bend < 0)
    return summit.clip(-1, 1)


def _sampled(image: NDArray[Any], places: Floats, normals: Floats, along: NDArray[Any], order: int = 3) -> Floats:
    """(n, 33) values across each edge, each the mean over those `along` it."""
    y, x = (
        places[:, axis, None, None] + ACROSS[:, None] * normals[:, axis, None, None] + sideways[:, None, None] * along
        for axis, sideways in ((0, -normals[:, 1]), (1, normals[:, 0]))
    )
    values: Floats = map_coordinates(image.astype(np.float64), [y, x], order=order, mode="nearest").mean(-1)
    return values
