"""Parts of what a run would write, to the byte, without the run: computed where it would be, and not written."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import RunError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.runners import Runner
from nrrn_pipeline.slab import SlabTask, denoise_part, part_slabs
from nrrn_pipeline.statistics_pass import statistics_of


@dataclass(frozen=True)
class Excerpt:
    """Denoised voxels of some boxes, each (z, y, x); precision: the network's, for people, "" of a filter."""

    voxels: dict[Box, NDArray[Any]]
    precision: str


def denoised_boxes(
    plan: DenoisePlan, runner: Runner, boxes: Sequence[Box], device: str = "auto"
) -> Generator[Progress, None, Excerpt]:
    """What run_plan on the same runner would write for boxes of the source; yields how far it is.

    Work is cut as in the run: its tiles, as many slices as it computes together, in its workers. Each of these changes
    how numbers are rounded.

    Raises InputError if a slice that is needed holds NaN, RunError if storage or the network fails.
    """
    wanted = [(box, slab) for box in boxes for slab in part_slabs(plan, box)]
    statistics = yield from statistics_of(plan, runner, [slab.read.z for _, slab in wanted])
    tasks: dict[SlabTask, list[Box]] = {}  # boxes that overlap may share one
    for (box, slab), own in zip(wanted, statistics, strict=True):
        part = Box(*(span.grown(0, keep) for span, keep in zip(box.spans, slab.keep.spans, strict=True)))
        tasks.setdefault(SlabTask(slab, own, part), []).append(box)
    voxels, precision = {box: np.empty(box.shape, plan.source.dtype) for box in boxes}, ""
    yield Progress("denoising", 0, len(tasks))
    for done, outcome in enumerate(runner(partial(denoise_part, plan, device), tasks), start=1):
        if outcome.error is not None:
            raise RunError(f"{outcome.item} failed every time: {reason_of(outcome.error)}") from outcome.error
        found, precision = outcome.result
        for box in tasks[outcome.item]:
            voxels[box][outcome.item.part.within(box)] = found
        yield Progress("denoising", done, len(tasks))
    return Excerpt(voxels, precision)
