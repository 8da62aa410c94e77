"""The signal along lines and in regions: its spread where it should be flat, its rise across a boundary.

Giannios et al., Figs 2D-E and 3C-D: denoising should narrow the spread and leave the rise as steep as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from skimage.measure import profile_line

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, box_of

Floats = NDArray[np.float64]
Point = tuple[float, float]  # (y, x) in voxels; whole numbers are voxel centres

SHORTEST_PROFILE = 8  # voxels: its first and last quarter then have 2 each


@dataclass(frozen=True)
class BoxPlot:
    """Tukey's box plot, grey levels: whiskers end at the last values within 1.5 IQR of the box; outliers lie beyond."""

    lower_whisker: float
    lower_quartile: float
    median: float
    upper_quartile: float
    upper_whisker: float
    outliers: int

    @property
    def interquartile_range(self) -> float:
        """The box's length."""
        return self.upper_quartile - self.lower_quartile


@dataclass(frozen=True)
class Line:
    """A line in slice z, from `start` to `stop`, `width` voxels wide."""

    z: int
    start: Point
    stop: Point
    width: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of a text such as "16:100,20:100,60" or "16:100,20:100,60:9": z, the ends as y,x, and the width.

        Raises ValueError for any other.
        """
        z, start, stop, *width = text.split(":")
        (y0, x0), (y1, x1) = ((float(part) for part in end.split(",")) for end in (start, stop))
        if len(width) > 1:
            raise ValueError(f"{text!r} has too many parts")
        return cls(int(z), (y0, x0), (y1, x1), *map(int, width))

    def within(self, origin: Box) -> Line:
        """The same, counted from the first voxel of `origin`. Raises InputError if it is not inside that."""
        places = ((self.z, origin.z), *((end[axis], origin.spans[1 + axis]) for end in self.ends for axis in (0, 1)))
        if not all(span.start <= place <= span.stop - 1 for place, span in places):
            raise InputError(f"the line from {self.start} to {self.stop} in slice {self.z} is not inside {origin}")
        z, y, x = (span.start for span in origin.spans)
        start, stop = ((end_y - y, end_x - x) for end_y, end_x in self.ends)
        return Line(self.z - z, start, stop, self.width)

    @property
    def ends(self) -> tuple[Point, Point]:
        """Both, as (y, x)."""
        return self.start, self.stop

    def profile(self, volume: NDArray[Any]) -> Floats:
        """Its values in a (z, y, x) volume, as `line` has them. Raises InputError if its width leaves the volume."""
        return line(volume[self.z], self.start, self.stop, self.width)


def interquartile_range(values: NDArray[Any]) -> float:
    """The 75th less the 25th percentile, grey levels. Raises InputError for no values, NaN or infinity."""
    return box_plot(values).interquartile_range


def box_plot(values: NDArray[Any]) -> BoxPlot:
    """Of all values, whatever their shape. Raises InputError for no values, NaN or infinity."""
    if not values.size or not np.isfinite(values).all():
        raise InputError(f"{values.size} values were given: a box plot needs at least one, all of them finite numbers")
    lower, median, upper = (float(quartile) for quartile in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (upper - lower)
    within = values[(values >= lower - reach) & (values <= upper + reach)]
    # a quartile lies between two values: with few of them, the last one within reach may lie inside the box
    low, high = min(float(within.min()), lower), max(float(within.max()), upper)
    return BoxPlot(low, lower, median, upper, high, values.size - within.size)


def line(image: NDArray[Any], start: Point, stop: Point, width: int = 1) -> Floats:
    """Profile from `start` to `stop`, both included, each value the mean over `width` voxels across the line.

    Bilinear between voxels. Values are 1 voxel apart if the line's length is whole, else slightly less:
    length / ceil(length). Raises InputError if the line, in its full width, leaves the (y, x) image or has no length.
    """
    first, last = np.array(start, np.float64), np.array(stop, np.float64)
    length = float(np.hypot(*(last - first)))
    if image.ndim != 2 or width < 1 or not length > 0:
        raise InputError(
            f"a line from {start} to {stop}, {width} voxels wide, in an image of shape {image.shape}: "
            "give a (y, x) image, two different points and a width of at least 1"
        )
    down, right = (last - first) / length
    aside = np.array([-right, down]) * (width - 1) / 2
    corners = np.array([end + side for end in (first, last) for side in (aside, -aside)])
    tiny = 1e-6  # of a voxel: corners are computed
    if (corners < -tiny).any() or (corners > np.array(image.shape) - 1 + tiny).any():
        raise InputError(
            f"a line from {start} to {stop}, {width} voxels wide, leaves the image of shape {image.shape}: "
            "give points (y, x) inside it, or a smaller width"
        )
    # as float: scikit-image rounds what it interpolates to the image's dtype
    profile: Floats = profile_line(image.astype(np.float64), start, stop, linewidth=width, order=1, mode="nearest")
    return profile


def region(volume: NDArray[Any], box: Box) -> NDArray[Any]:
    """The voxels of the box. Raises InputError if it is empty or leaves the (z, y, x) volume."""
    is_inside = volume.ndim == 3 and all(
        0 <= span.start < span.stop <= length for span, length in zip(box.spans, volume.shape, strict=True)
    )
    if not is_inside:
        raise InputError(f"region {box} of a volume of shape {volume.shape}: give z, y, x spans inside it")
    z, y, x = volume.shape
    return volume[box.within(box_of((z, y, x)))]


def rise_distance(profile: NDArray[Any]) -> float:
    """Voxels over which the profile goes from 10 to 90 % of an edge, rising or falling, interpolated linearly.

    0 and 100 % are the medians of the first and the last quarter. Of several rises, which noise can make, the first
    counts, from where it leaves 10 % for the last time. A perfect step has 0.8. Raises InputError for a profile
    that is shorter than 8, not finite, or without an edge: whose ends differ by no more than twice their own spread
    (the larger of their two interquartile ranges).
    """
    if profile.ndim != 1 or len(profile) < SHORTEST_PROFILE or not np.isfinite(profile).all():
        raise InputError(
            f"a profile of shape {profile.shape} was given: "
            f"a rise needs one line of at least {SHORTEST_PROFILE} finite values; draw a longer line across the edge"
        )
    values = profile.astype(np.float64)
    low_end, step, spread = _step(values)
    if not abs(step) > 2 * spread:
        raise InputError(
            f"the profile has no edge: it goes from {low_end:g} to {low_end + step:g} with a spread of "
            f"{spread:g} at its ends; draw the line across a boundary, or wider"
        )
    rise = (values - low_end) / step  # 0 to 1 for falling edges too
    low, high = rise <= 0.1, rise >= 0.9  # some of the first quarter is low, some of the last quarter high
    begin = int(np.argmax(low))
    top = begin + int(np.argmax(high[begin:]))
    bottom = int(np.flatnonzero(low[:top])[-1])
    return _crossing(rise, top - 1, 0.9) - _crossing(rise, bottom, 0.1)


def has_edge(profile: NDArray[Any]) -> bool:
    """Whether rise_distance finds an edge in a profile that is long enough and finite."""
    _, step, spread = _step(profile.astype(np.float64))
    return len(profile) >= SHORTEST_PROFILE and abs(step) > 2 * spread


def _step(values: Floats) -> tuple[float, float, float]:
    """Where a profile begins, how far it ends from there, and the spread of its ends."""
    ends = [box_plot(values[: max(1, len(values) // 4)]), box_plot(values[-max(1, len(values) // 4) :])]
    return ends[0].median, ends[1].median - ends[0].median, max(end.interquartile_range for end in ends)


def _crossing(values: Floats, before: int, level: float) -> float:
    """Where the straight line between voxels `before` and `before` + 1 reaches the level."""
    here, after = float(values[before]), float(values[before + 1])
    return before + (level - here) / (after - here)
