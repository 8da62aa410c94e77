"""One slab, from noisy to denoised voxels: read once with its halo, normalise, tile, run, crop, write, record.

Source of the stitching: Giannios et al., crop-and-discard: tiles overlap by the halo, and every voxel comes from the
one tile that keeps it. With a halo no smaller than the network's reach this equals the network on whole slices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.filters import Filter
from nrrn_pipeline.geometry import Box, Cut, Span
from nrrn_pipeline.keeping import Keeping, Shelf, using_shelf
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.network import (
    Network,
    bytes_hash,
    choose_device,
    fastest_in_slot,
    in_lanes,
    in_slot,
    parse_weights,
)
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.shipped import read_weights
from nrrn_pipeline.slabs import Slab, Slabs
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.stitching import blended
from nrrn_pipeline.stopwatch import Busy, Stopwatch
from nrrn_pipeline.volume import read_box
from nrrn_pipeline.writing import store_slab

WORST_LEVELS = 0.5  # grey levels, root mean square, by which a faster precision may differ from float32 for uint8
WORST_OF_STD = 1 / 64  # for any dtype, of a slice's standard deviation: half a level of 32
SAMPLES = 8  # slabs that are looked at for an image
GROUPED = 2  # slices apart, at most, that a network computes as one batch, whose size changes how numbers are rounded

# one slab computes at a time: with two in a process, the other is read, or written, meanwhile
computing, _loading = threading.Lock(), threading.Lock()


@dataclass(frozen=True)
class SlabTask:
    """What a worker is sent: a slab and the statistics of the slices it reads; what `part` is wanted, None: all."""

    slab: Slab
    statistics: SliceStatistics
    part: Box | None = None

    def __str__(self) -> str:
        return f"slab {self.slab.key}"


def denoise_slab(plan: DenoisePlan, device: str, task: SlabTask, keeping: Keeping | None = None) -> Record:
    """Denoise one slab from storage to storage, then record it; safe to do twice, anywhere, in any order.

    keeping: chunks that were read are kept for the slabs that come next.

    Raises InputError if the weights, the device or the output are not the planned ones, RunError if the network gives
    numbers that are not finite, and whatever storage raises.
    """
    slab, watch = task.slab, Stopwatch()
    with using_shelf(plan.source, plan.slabs, keeping) if keeping else nullcontext() as shelf:
        if isinstance(plan.denoiser, Noise):
            with watch.during("decode"):
                noisy = read_box(plan.source, slab.keep)
            with watch.during("prepare"):
                denoised, arithmetic = plan.denoiser.added(noisy, slab.keep), ""
        else:
            denoised, arithmetic = _denoised(plan, device, task, watch, shelf)
        return store_slab(plan, slab, denoised, watch, arithmetic)


def denoise_part(plan: DenoisePlan, device: str, task: SlabTask) -> tuple[NDArray[Any], str]:
    """The denoised voxels of a slab's part, which are not written, and the precision, for people.

    Raises what denoise_slab does when it reads and computes.
    """
    assert task.part is not None
    denoised, arithmetic = _denoised(plan, device, task, Stopwatch())
    return denoised[task.part.within(task.slab.keep)], arithmetic


def part_slabs(plan: DenoisePlan, part: Box) -> Slabs:
    """Those of a plan's slabs that hold a part, of each only the slices that its voxels there depend on.

    To the last bit: in y and x they are whole, so that tiles are those of the plan, and along z they have GROUPED
    slices more on either side.
    """
    of_z, *of_yx = (
        [cut for cut in cuts if cut.keep.meets(span)] for cuts, span in zip(plan.slabs.axes, part.spans, strict=True)
    )
    keeps = [part.z.grown(GROUPED, cut.keep) for cut in of_z]
    return Slabs([Cut(keep, keep.grown(1, plan.source.box.z)) for keep in keeps], *of_yx)


def _denoised(
    plan: DenoisePlan, device: str, task: SlabTask, watch: Stopwatch, shelf: Shelf | None = None
) -> tuple[NDArray[Any], str]:
    """The denoised voxels of a slab, or what of them is wanted, and the precision; one slab computes at a time."""
    with watch.during("load"):
        network, arithmetic = load_network(plan, device)
    with watch.during("decode"):
        noisy = read_box(plan.source, task.slab.read) if shelf is None else shelf.read(task.slab)
    with watch.during("wait"):
        computing.acquire()
    try:
        return denoise_voxels(noisy, task, network, plan, watch), arithmetic
    finally:
        computing.release()


def read_weights_of(weights: Weights) -> bytes:
    """The weights file of a plan. Raises InputError if there is none, or another one than it was planned with."""
    data = read_weights(weights.path)
    if (found := bytes_hash(data)) != weights.sha256:
        raise InputError(
            f"weights {weights.path} have hash {found[:12]} here, but the run was planned with {weights.sha256[:12]}"
        )
    return data


def load_network(plan: DenoisePlan, device: str) -> tuple[Network, str]:
    """The plan's filter, or the network of its weights, loaded once a process; and its precision, for people.

    Raises InputError if the weights are not those that were planned with: a worker that sees another file under the
    same path would otherwise write slabs that do not fit the rest.
    """
    if isinstance(plan.denoiser, Filter):
        return plan.denoiser, ""
    with _loading:  # once, though two slabs may begin at a time
        return _loaded(plan, device)


@lru_cache(maxsize=1)
def _loaded(plan: DenoisePlan, device: str) -> tuple[Network, str]:
    weights, images, precision = plan.denoiser, plan.method.images, plan.method.precision
    assert isinstance(weights, Weights)
    network = parse_weights(read_weights_of(weights), weights.path)
    if precision != "auto" or choose_device(device).type == "cpu":
        precision = "float32" if precision == "auto" else precision
        return in_slot(network, device, images, precision), precision
    sample = sample_of(plan)
    if sample is None:
        return in_slot(network, device, images), "float32, as no image was found to try others on"
    levels = sample.std(axis=(1, 2), dtype=np.float64, keepdims=True)
    normal = ((sample - sample.mean(axis=(1, 2), keepdims=True)) / levels).astype(np.float32)
    std, allowed = float(levels[1, 0, 0]), float(levels[1, 0, 0]) * WORST_OF_STD
    allowed = min(allowed, WORST_LEVELS) if plan.source.dtype == "uint8" else allowed
    found, precision, off = fastest_in_slot(network, device, images, normal, allowed / std)
    told = ", ".join(f"{name} {apart * std:.3g}" for name, apart in off.items())
    return found, f"{precision}; grey levels from float32, {allowed:.3g} allowed: {told}"


def sample_of(plan: DenoisePlan) -> NDArray[Any] | None:
    """(3, y, x) voxels of one tile in a slab in the middle, or the next that has an image there; None: none has.

    The same for every worker, so that all with the same GPU decide alike.
    """
    middle = len(plan.slabs) // 2
    for slab in plan.slabs[middle : middle + SAMPLES]:
        y, x = next(plan.tiles(slab))
        z = min(max(1, (slab.keep.z.start + slab.keep.z.stop) // 2), plan.source.shape[0] - 2)
        voxels = read_box(plan.source, Box(Span(z, z + 1).grown(1, plan.source.box.z), y.read, x.read))
        if len(voxels) == 3 and voxels.std(axis=(1, 2)).min() > 0:
            return voxels
    return None


def denoise_voxels(
    noisy: NDArray[Any], task: SlabTask, network: Network, plan: DenoisePlan, watch: Stopwatch | None = None
) -> NDArray[Any]:
    """The noisy voxels of `slab.read` -> the denoised voxels of `slab.keep`, in the same dtype.

    If the task has a part, tiles that keep nothing of it may stay as they are. A blank slice passes through unchanged.
    `watch` is told how long the network took, and how long all else.

    Raises RunError if the network gives numbers that are not finite.
    """
    slab, statistics, started, timed = task.slab, task.statistics, perf_counter(), _Timed(network)
    all_tiles = list(plan.tiles(slab))
    denoised = noisy[slab.keep.within(slab.read)].copy()
    for stack_z in stacks_of(slab.keep.z, _not_blank(statistics)):
        rows = [z - slab.read.z.start for z in stack_z]
        # float voxels may lie far from 0, or close together: there float32 would lose what distinguishes them
        accurate = np.dtype("float64" if noisy.dtype.kind == "f" else "float32")
        mean, std = (np.array(values, accurate)[rows] for values in (statistics.mean, statistics.std))
        stack = _Stack(noisy, slab.read, rows, mean, std)
        to = denoised[stack_z[1] - slab.keep.z.start : stack_z[-2] - slab.keep.z.start + 1]
        if plan.method.stitch == "blend":
            tiles = ((y, x, timed(stack.normal(y, x))) for y, x in all_tiles)
            for (y, x), estimate in blended(tiles, slab.keep):
                stack.in_levels(estimate, to[:, y, x])
        else:
            lanes = network.lanes(len(all_tiles))  # not of those wanted alone: to the last bit
            in_lanes(lanes, partial(_denoise_tile, stack, timed, slab.keep, to), _wanted(all_tiles, task))
    if watch is not None:
        watch.add("network", timed.busy.seconds)
        watch.add("prepare", perf_counter() - started - timed.busy.seconds)
    return denoised


def _wanted(tiles: Iterable[tuple[Cut, Cut]], task: SlabTask) -> Iterator[tuple[Cut, Cut]]:
    """The tiles that keep something of what is wanted."""
    part = task.part or task.slab.keep
    return ((y, x) for y, x in tiles if y.keep.meets(part.y) and x.keep.meets(part.x))


@dataclass(frozen=True)
class _Stack:
    """Slices of a slab between their outer neighbours: some `rows` of the voxels of `read`, their means and stds.

    Slice by slice, so that what lies between voxels and what the network sees takes a slice's memory.
    """

    noisy: NDArray[Any]
    read: Box
    rows: list[int]
    mean: NDArray[Any]
    std: NDArray[Any]

    def normal(self, y: Cut, x: Cut) -> NDArray[np.float32]:
        """What the network sees of a tile."""
        tile = self.noisy[:, y.read.within(self.read.y), x.read.within(self.read.x)]
        stack = np.empty((len(self.rows), *tile.shape[1:]), np.float32)
        for place, (row, mean, std) in enumerate(zip(self.rows, self.mean, self.std, strict=True)):
            stack[place] = (tile[row] - mean) / std
        return stack

    def in_levels(self, estimate: NDArray[np.float32], to: NDArray[Any]) -> None:
        """An estimate of all but the outer two, as voxels."""
        for place, (mean, std) in enumerate(zip(self.mean[1:-1], self.std[1:-1], strict=True)):
            to[place] = _as_dtype(estimate[place] * std + mean, to.dtype)


def _denoise_tile(stack: _Stack, network: _Timed, keep: Box, to: NDArray[Any], cuts: tuple[Cut, Cut]) -> None:
    """Into its place among the voxels of `keep`."""
    y, x = cuts
    estimate = network(stack.normal(y, x))[:, y.crop, x.crop]
    stack.in_levels(estimate, to[:, y.keep.within(keep.y), x.keep.within(keep.x)])


class _Timed:
    """A network, and the seconds in which a call of it was under way."""

    def __init__(self, network: Network) -> None:
        self.network, self.busy = network, Busy()

    def __call__(self, stack: NDArray[np.float32]) -> NDArray[np.float32]:
        with self.busy:
            return self.network(stack)


def stacks_of(keep: Span, not_blank: set[int]) -> Iterator[list[int]]:
    """The slices of `keep` that are `not_blank`, in stacks of consecutive ones between their two outer neighbours.

    Where a neighbour is missing, at the volume's end or because it is blank, the existing one takes its place; a
    slice without any is its own neighbour.
    """

    def neighbour(z: int, step: int) -> int:
        return next((near for near in (z + step, z - step) if near in not_blank), z)

    run: list[int] = []
    for z in range(keep.start, keep.stop + 1):
        if z < keep.stop and z in not_blank:
            run.append(z)
        elif run:
            yield [neighbour(run[0], -1), *run, neighbour(run[-1], +1)]
            run = []


def _not_blank(statistics: SliceStatistics) -> set[int]:
    return {z for z, std in enumerate(statistics.std, start=statistics.first_z) if std > 0}


def _as_dtype(estimate: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounded and clipped to the range of an integer dtype."""
    if not np.isfinite(estimate).all():
        raise RunError(
            "the network gave voxels that are not finite numbers: its weights are damaged or did not train; or it "
            "needs precision float32"
        )
    if dtype.kind == "f":
        return estimate.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    rounded: NDArray[Any] = np.clip(np.rint(estimate), limits.min, limits.max).astype(dtype)
    return rounded
