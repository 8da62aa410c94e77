"""Some places of a volume before and after denoising, as the full run will give them, and what that will take."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar

from numpy.typing import NDArray

from nrrn_pipeline.api import Forecast, RunWatch, forecast_of, open_runner
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.noise_details import LEAST_SIDE, slice_sigma
from nrrn_pipeline.options import Options
from nrrn_pipeline.preparing import Location, make_plan
from nrrn_pipeline.previewing.excerpt import denoised_boxes
from nrrn_pipeline.previewing.picking import pick_regions, window_at
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.volume import read_box

REGIONS, MOST_REGIONS = 3, 24  # that are shown: by default, and at most, as all of them lie on one page

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """(y, x) voxels of one slice; noise: its standard deviation in grey levels, None where it cannot be measured."""

    box: Box
    noisy: NDArray[Any] = field(repr=False)
    denoised: NDArray[Any] = field(repr=False)

    @property
    def name(self) -> str:
        """For people."""
        return f"z={self.box.z.start}, y={self.box.y}, x={self.box.x}"

    @property
    def noise_before(self) -> float | None:
        """As nrrn noise measures it."""
        return _noise_of(self.noisy)

    @property
    def noise_after(self) -> float | None:
        """The same of what is left of it."""
        return _noise_of(self.denoised)


@dataclass(frozen=True)
class Preview:
    """What nrrn preview shows. forecast: of the full run; seconds: that it took itself; precision: "" of a filter."""

    forecast: Forecast
    regions: tuple[Region, ...]
    precision: str
    seconds: float


def preview(
    source: Location,
    weights: Location | None = None,
    options: Options | None = None,
    places: Sequence[Shape] = (),
    count: int = REGIONS,
    watch: RunWatch | None = None,
) -> Preview:
    """Windows of single slices as denoise with the same options would write them, to the byte; writes nothing.

    places: (z, y, x) that windows lie around; without any, `count` windows are picked where there is most to be seen,
    one in each of as many parts along z. Reads these windows, what is looked at to pick them, and the slices around
    each, whole, if their mean and std are not known.

    Raises InputError where denoise would, for a place outside the volume, and if there is nothing to be seen; RunError
    if it broke off.
    """
    options, watch, started = options or Options(), watch or RunWatch(), perf_counter()
    if not 1 <= (shown := len(places) or count) <= MOST_REGIONS:
        raise InputError(f"{shown} regions cannot be shown: ask for 1 to {MOST_REGIONS}")
    if not options.here:
        raise InputError("a preview is made on this machine: use the cluster local or serial")
    with TemporaryDirectory(prefix="nrrn-") as folder:  # that the plan has an output; it is not made
        made = make_plan(source, f"{folder}/preview.zarr", weights, options)
    boxes = [*dict.fromkeys(window_at(place, made.box) for place in places)]
    boxes = boxes or pick_regions(made.source, made.box, count, made.slab)
    forecast = forecast_of(made, options)
    with open_runner([made], options) as (runner, _):
        excerpt = _followed(denoised_boxes(made, runner, boxes, options.device), watch)
    regions = [Region(box, read_box(made.source, box)[0], excerpt.voxels[box][0]) for box in boxes]
    return Preview(forecast, tuple(regions), excerpt.precision, perf_counter() - started)


def _followed(steps: Generator[Progress, None, T], watch: RunWatch) -> T:
    """What steps give in the end."""
    while True:
        try:
            watch.progressed(next(steps))
        except StopIteration as end:
            found: T = end.value
            return found


def _noise_of(plane: NDArray[Any]) -> float | None:
    return (slice_sigma(plane) or None) if min(plane.shape) >= LEAST_SIDE else None
