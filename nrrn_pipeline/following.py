"""Denoising a volume that is still being imaged: slabs as they become whole, each once, as one run would at the end.

    slices there     |=========================|....
    slabs            |-------|-------|-------|-------
    done by now      |===============|                  a slab waits for its last slice's neighbour too

Slices that are there: those before the last layer of chunks that storage lists, as its writer may be at work on that
one, once a later look has seen them. A last run without following does what is left: the last slice has no neighbour.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nrrn_pipeline.api import RunWatch, Summary, run_planned
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location, plan_for
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.volume import Volume, open_volume, written_slices


@dataclass(frozen=True)
class Following:
    """When to look for new slices: every so many s, or once (0); they count when they were there `settle_s` before."""

    every_s: float = 60.0
    settle_s: float = 60.0

    def __post_init__(self) -> None:
        """Raises InputError for times that cannot be."""
        for name, value in (("every", self.every_s), ("settle", self.settle_s)):
            if not 0 <= value <= 7 * 86400:
                raise InputError(f"{name} {value:g} is not possible: use 0 s to a week, in s")


def follow(
    source: Location,
    output: Location,
    weights: Location | None,
    options: Options | None = None,
    following: Following = Following(),
    watch: RunWatch | None = None,
) -> Summary | None:
    """Denoise what there is of a volume that grows along z, and more as it comes; a summary of the last run, if any.

    With `following.every_s` 0 it looks once and returns, else it never does. Each slice is denoised once, and the bytes
    are those that denoise, called when the volume is whole, would give; that call is also what ends it.

    Raises what denoise raises, and InputError for options that do not go together with slices to come.
    """
    options, watch = options or Options(), watch or RunWatch()
    _refuse_unfit(options)
    options = replace(options, layout=replace(options.layout, growing=True))
    summary, depth, done, told = None, 0, 0, (-1, -1)
    for volume in _looks(source, output, options.level, following, watch):
        depth = depth or _slab_depth(volume, output, weights, options)
        stop = (volume.shape[0] - 1) // depth * depth  # the last slice of a slab needs a neighbour
        # an output that was whole once waits for its last slab to be whole again
        if stop > done and stop >= Ledger(f"{absolute(output)}/0").denoised_up_to():
            part = Box(Span(0, stop), volume.box.y, volume.box.x)
            summary = run_planned(plan_for(volume, output, weights, replace(options, roi=part)), options, watch)
            done = stop
        if told != (volume.shape[0], done):
            told = volume.shape[0], done
            watch.looked(*told)
    return summary


def _refuse_unfit(options: Options) -> None:
    unfit = {
        "a region (roi)": options.roi is not None,
        "overwriting": options.overwrite,
        "levels (pyramid)": options.pyramid,
        "a share of the work": options.share is not None,
        "statistics of the volume": options.method.statistics == "volume",
        "a filter, whose strength is measured on the whole volume,": options.method.filter,
    }
    for what, asked in unfit.items():
        if asked:
            raise InputError(f"following and {what} do not go together: leave one of them out")


def _looks(source: Location, output: Location, level: int, following: Following, watch: RunWatch) -> Iterator[Volume]:
    """The volume as far as it is surely written, look by look."""
    seen: list[tuple[float, int]] = []  # when, and how many slices were written
    known = Ledger(f"{absolute(output)}/0").surely_there()
    while True:
        try:
            volume = open_volume(source, level)
        except InputError as error:
            if not seen or not following.every_s:
                raise
            watch.progressed(Progress("following", 0, 0, note=f"{error}; looking again"))  # its writer may be at it
            time.sleep(following.every_s)
            continue
        if volume.shape[0] < known:
            raise InputError(
                f"{source} has {volume.shape[0]} slices, and had {known} before: give what {output} was begun with, or "
                "another output"
            )
        now = time.monotonic()
        seen = [*seen, (now, written_slices(volume))]
        settled = [slices for when, slices in seen if now - when >= following.settle_s]
        seen = seen[max(0, len(settled) - 1) :]
        known = max([known, *settled[-1:]])
        if settled or following.every_s > 0:
            yield replace(volume, shape=(known, *volume.shape[1:]))
        if settled and not following.every_s:
            return
        time.sleep(following.every_s or following.settle_s)


def _slab_depth(volume: Volume, output: Location, weights: Location | None, options: Options) -> int:
    """Slices of a slab, however many there are by now. Raises InputError if the volume cannot be denoised so."""
    begun = replace(volume, shape=(max(volume.shape[0], 1), *volume.shape[1:]))
    return plan_for(begun, output, weights, options).slab[0]
