"""One slab's voxels into storage, and its record after them; all of it, where nothing is computed from neighbours."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from math import prod
from time import time
from typing import Any

from numpy.typing import NDArray

from nrrn_pipeline.geometry import Shape, boxes_of
from nrrn_pipeline.keeping import drop_shelf
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.machine import peak_memory_bytes
from nrrn_pipeline.slabs import CopyPlan, Plan, Slab
from nrrn_pipeline.statistics import moments_of
from nrrn_pipeline.stopwatch import Stopwatch
from nrrn_pipeline.volume import Volume, write_box

ENCODED_BYTES = 2**25  # of voxels: their chunks, shards and what is sent take as much again, each


@dataclass(frozen=True)
class CopyTask:
    """What a worker is sent."""

    slab: Slab

    def __str__(self) -> str:
        return f"slab {self.slab.key}"


def copy_slab(plan: CopyPlan, task: CopyTask) -> Record:
    """Bring one slab to where it belongs, measure it, then record it; safe to do twice, anywhere, in any order.

    Raises InputError if the output is not the planned one, or voxels are not finite, and whatever storage raises.
    """
    drop_shelf()  # what was denoised before is over, and its memory is not in this plan
    watch, slab = Stopwatch(), task.slab
    with watch.during("decode"):
        voxels = plan.voxels(slab)
    if plan.measures:
        with watch.during("prepare"):
            moments = tuple(moments_of(voxels, slab.keep.z.start, plan.source_url))
        Ledger(plan.target.url).put_measured((plan.target_box(slab), moments))
    return store_slab(plan, slab, voxels, watch)


def encoded_at_once(target: Volume, slab: Shape) -> Shape:
    """Voxels of a slab that are encoded together: whole write units of ENCODED_BYTES at most, unless one is larger."""
    step = list(target.write_unit)
    for axis in (2, 1, 0):
        while step[axis] < slab[axis] and 2 * prod(step) * target.itemsize <= ENCODED_BYTES:
            step[axis] *= 2
    return step[0], step[1], step[2]


def store_slab(plan: Plan, slab: Slab, voxels: NDArray[Any], watch: Stopwatch, arithmetic: str = "") -> Record:
    """Write the slab's kept voxels, then its record. Raises InputError if the output is not the planned one."""
    ledger = Ledger(plan.target.url)
    ledger.refuse_others(plan)  # as late as can be: a task may outlive the run that sent it
    with watch.during("encode"):
        objects, box = dict[str, tuple[int, str]](), plan.target_box(slab)
        for part in boxes_of(box, encoded_at_once(plan.target, box.shape)):
            objects |= write_box(plan.target, part, voxels[part.within(box)])
    record = Record(
        key=slab.key,
        voxels=slab.keep.size,
        seconds=watch.age(),
        finished=time(),
        worker=f"{socket.gethostname()}:{os.getpid()}",
        peak_memory_bytes=peak_memory_bytes(),
        objects=objects,
        spent={stage: round(seconds, 6) for stage, seconds in watch.seconds.items()},
        arithmetic=arithmetic,
    )
    ledger.put(record)  # last: a slab is done when, and only when, it is recorded
    return record
