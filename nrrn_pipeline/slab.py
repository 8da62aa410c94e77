"""One slab, from noisy to denoised voxels: read once with its halo, normalise, tile, run, crop, write, record.

Source of the stitching: Giannios et al., crop-and-discard: tiles overlap by the halo, and every voxel comes from the
one tile that keeps it. With a halo no smaller than the network's reach this equals the network on whole slices.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter, time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.filters import Filter
from nrrn_pipeline.geometry import Box, Cut, Span
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.machine import peak_memory_bytes
from nrrn_pipeline.network import Network, bytes_hash, in_slot, parse_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.planning import DenoisePlan, Slab
from nrrn_pipeline.shipped import read_weights
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.stitching import blended, cropped
from nrrn_pipeline.volume import read_box, write_box

# one slab computes at a time: with two in a process, the other is read, or written, meanwhile
_computing, _loading = threading.Lock(), threading.Lock()


@dataclass(frozen=True)
class SlabTask:
    """What a worker is sent: a slab and the statistics of the slices it reads."""

    slab: Slab
    statistics: SliceStatistics

    def __str__(self) -> str:
        return f"slab {self.slab.key}"


def denoise_slab(plan: DenoisePlan, device: str, task: SlabTask) -> Record:
    """Denoise one slab from storage to storage, then record it; safe to do twice, anywhere, in any order.

    Raises InputError if the weights, the device or the output are not the planned ones, RunError if the network gives
    numbers that are not finite, and whatever storage raises.
    """
    started = perf_counter()
    slab = task.slab
    if isinstance(plan.denoiser, Noise):
        denoised = plan.denoiser.added(read_box(plan.source, slab.keep), slab.keep)
    else:
        network = load_network(plan.denoiser, device, plan.method.images)
        noisy = read_box(plan.source, slab.read)
        with _computing:
            denoised = denoise_voxels(noisy, task, network, plan)
        del noisy  # the next slab may be on its way
    ledger = Ledger(plan.target.url)
    ledger.refuse_others(plan)  # as late as can be: a task may outlive the run that sent it
    objects = write_box(plan.target, plan.target_box(slab), denoised)
    record = Record(
        key=slab.key,
        voxels=slab.keep.size,
        seconds=perf_counter() - started,
        finished=time(),
        worker=f"{socket.gethostname()}:{os.getpid()}",
        peak_memory_bytes=peak_memory_bytes(),
        objects=objects,
    )
    ledger.put(record)  # last: a slab is done when, and only when, it is recorded
    return record


def read_weights_of(weights: Weights) -> bytes:
    """The weights file of a plan. Raises InputError if there is none, or another one than it was planned with."""
    data = read_weights(weights.path)
    if (found := bytes_hash(data)) != weights.sha256:
        raise InputError(
            f"weights {weights.path} have hash {found[:12]} here, but the run was planned with {weights.sha256[:12]}"
        )
    return data


def load_network(denoiser: Weights | Filter, device: str, images: int) -> Network:
    """The filter itself, or the network of the weights, loaded once a process.

    Raises InputError if the file is not the one that was planned with: a worker that sees another file under the same
    path would otherwise write slabs that do not fit the rest.
    """
    if isinstance(denoiser, Filter):
        return denoiser
    with _loading:  # once, though two slabs may begin at a time
        return _loaded(denoiser, device, images)


@lru_cache(maxsize=1)
def _loaded(weights: Weights, device: str, images: int) -> Network:
    return in_slot(parse_weights(read_weights_of(weights), weights.path), device, images)


def denoise_voxels(noisy: NDArray[Any], task: SlabTask, network: Network, plan: DenoisePlan) -> NDArray[Any]:
    """The noisy voxels of `slab.read` -> the denoised voxels of `slab.keep`, in the same dtype.

    A blank slice passes through unchanged. Raises RunError if the network gives numbers that are not finite.
    """
    slab, statistics = task.slab, task.statistics
    stitched = cropped if plan.method.stitch == "crop" else blended
    denoised = noisy[slab.keep.within(slab.read)].copy()
    for stack_z in stacks_of(slab.keep.z, _not_blank(statistics)):
        rows = [z - slab.read.z.start for z in stack_z]
        # float voxels may lie far from 0, or close together: there float32 would lose what distinguishes them
        accurate = np.dtype("float64" if noisy.dtype.kind == "f" else "float32")
        mean, std = (_of_slices(values, rows, accurate) for values in (statistics.mean, statistics.std))
        first, last = stack_z[1] - slab.keep.z.start, stack_z[-2] - slab.keep.z.start
        stack_of = partial(_normal_stack, noisy, slab.read, rows, (mean, std))
        tiles = ((y, x, network(stack_of(y, x))) for y, x in plan.tiles(slab))
        for place, estimate in stitched(tiles, slab.keep):
            in_levels = estimate * std[1:-1] + mean[1:-1]
            denoised[first : last + 1, *place] = _as_dtype(in_levels, noisy.dtype)
    return denoised


def _normal_stack(
    noisy: NDArray[Any], read: Box, rows: list[int], levels: tuple[NDArray[Any], NDArray[Any]], y: Cut, x: Cut
) -> NDArray[np.float32]:
    """What the network sees of a tile: some slices of the voxels of `read`, less their mean, by their std."""
    mean, std = levels
    stack = noisy[:, y.read.within(read.y), x.read.within(read.x)][rows]
    normal: NDArray[np.float32] = ((stack - mean) / std).astype(np.float32, copy=False)
    return normal


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


def _of_slices(values: tuple[float, ...], rows: list[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.array(values, dtype)[rows, None, None]


def _as_dtype(estimate: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounded and clipped to the range of an integer dtype."""
    if not np.isfinite(estimate).all():
        raise RunError("the network gave voxels that are not finite numbers: its weights are damaged or did not train")
    if dtype.kind == "f":
        return estimate.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    rounded: NDArray[Any] = np.clip(np.rint(estimate), limits.min, limits.max).astype(dtype)
    return rounded
