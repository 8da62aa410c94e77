"""What a plan will take, before it runs: bytes, arithmetic, memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from nrrn_pipeline.denoisers import Weights, stack_bytes, working_bytes
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.keeping import fetched_by, kept_bytes
from nrrn_pipeline.machine import cores, free_memory_bytes, threads_each
from nrrn_pipeline.network import CPU_LANES, Network, cpu_lanes, seconds_per_pixel
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.slabs import CopyPlan, Plan
from nrrn_pipeline.statistics import statistics_grid
from nrrn_pipeline.volume import Volume
from nrrn_pipeline.writing import encoded_at_once

PROCESS_BYTES = 400 * 2**20  # a worker with Python, Dask, zarr and torch loaded, before its first slab
COPYING_BYTES = 180 * 2**20  # the same without torch
AT_ONCE = 10  # chunks that are decoded; zarr's async.concurrency


@dataclass(frozen=True)
class Cost:
    """Of a whole plan. Bytes are of voxels, uncompressed; fetched_bytes counts the whole chunks that storage gives.

    worker_bytes: at a worker's peak, with kept_bytes of chunks of the source that it keeps, as long as its memory
    carries them; with less, more is fetched. flop is 0 where it is not known, as of filters.
    """

    slabs: int
    statistics_tasks: int
    read_bytes: int
    fetched_bytes: int
    written_bytes: int
    flop: float
    worker_bytes: int
    kept_bytes: int
    read_amplification: float
    chunk_amplification: float

    @property
    def tasks(self) -> int:
        """Tasks that the scheduler sees."""
        return self.slabs + self.statistics_tasks


def cost_of(plan: DenoisePlan, at_once: int = 1, measured: bool = False, workers: int = 1, keep_bytes: int = 0) -> Cost:
    """What the plan will take with some workers that have `at_once` slabs in flight each; reads no voxels.

    measured: the slices' mean and std are known. keep_bytes: what each worker may keep of the source.
    """
    slabs, item = plan.slabs, plan.source.itemsize
    read = slabs.total(lambda cut, _: len(cut.read))
    fetched = fetched_by(plan.source, slabs, keep_bytes, workers)
    kept = kept_bytes(plan.source, slabs, keep_bytes)
    whole, step = statistics_grid(plan.source, plan.statistics_z)
    tasks = prod(-(-len(span) // size) for span, size in zip(whole.spans, step, strict=True))
    pass_voxels, pass_fetched = 0, 0
    if not measured:  # each chunk once, as boxes are made of whole ones
        box = Box(plan.statistics_z, whole.y, whole.x)
        pass_voxels, pass_fetched = box.size, fetched_voxels(plan.source, box)
    network = plan.denoiser.architecture if isinstance(plan.denoiser, Weights) else None
    flop = network.flop_per_voxel(plan.method.images) if network else 0
    return Cost(
        slabs=len(slabs),
        statistics_tasks=0 if measured else tasks,
        read_bytes=(read + pass_voxels) * item,
        fetched_bytes=(fetched + pass_fetched) * item,
        written_bytes=plan.box.size * item,
        flop=flop * plan.box.size * _tile_overhead(plan),
        worker_bytes=worker_bytes(plan, at_once, threads_each(workers)) + kept,
        kept_bytes=kept,
        read_amplification=read / plan.box.size,
        chunk_amplification=fetched / plan.box.size,
    )


def fetched_voxels(volume: Volume, box: Box) -> int:
    """Voxels in all chunks that a box touches: what storage delivers and the CPU decodes."""
    return prod(
        min(-(-span.stop // chunk) * chunk, length) - span.start // chunk * chunk
        for span, chunk, length in zip(box.spans, volume.chunk, volume.shape, strict=True)
    )


def worker_bytes(plan: Plan, at_once: int = 1, threads: int = CPU_LANES) -> int:
    """Peak memory of one worker process that has `at_once` slabs in flight, and keeps nothing for the next.

    threads: those that it computes with; where they are not known, as many as take the most.
    """
    if isinstance(plan, DenoisePlan):
        return _denoising_bytes(plan, at_once, threads)
    assert isinstance(plan, CopyPlan)
    slab = plan.slabs[0].keep
    encoding = _encoding_bytes(plan.target, slab.shape)
    return COPYING_BYTES + at_once * (plan.slab_bytes + encoding)


def _denoising_bytes(plan: DenoisePlan, at_once: int, threads: int) -> int:
    """The same of one that denoises, of whose slabs one computes.

    That is itself; a slab in and out with the stacks of the tiles that are estimated at a time, and the network's maps
    of each; and for every other slab the larger of its voxels with the chunks that come and are decoded, and its result
    with the shard that is being encoded. Or, in the pass before, boxes of voxels whose slices are measured in float64.
    """
    slab = plan.slabs.largest()
    item = plan.source.itemsize
    voxels_in, voxels_out = slab.read.size * item, slab.keep.size * item
    fetched = fetched_voxels(plan.source, slab.read)
    decoded = min(AT_ONCE * prod(plan.source.chunk), fetched)
    # as they came, noise being hardly smaller: what is wanted of a shard comes in one piece
    encoded = decoded if plan.source.write_unit == plan.source.chunk else fetched
    decoding = (decoded + encoded) * item
    encoding = _encoding_bytes(plan.target, slab.keep.shape)
    maps = _tiles_bytes(plan, len(slab.read.z), threads)
    if plan.method.stitch == "blend" and not isinstance(plan.denoiser, Noise):
        # the sum, its mean, in grey levels, rounded: of float voxels in float64
        maps += (24 if plan.source.dtype == "float32" else 20) * slab.keep.size
    whole, step = statistics_grid(plan.source, plan.statistics_z)
    depth, *sides = (min(len(span), size) for span, size in zip(whole.spans, step, strict=True))
    measured = (depth * item + 16) * prod(sides)
    computing = voxels_in + voxels_out + maps
    moving = max(voxels_in + decoding, voxels_out + encoding)
    denoising = max(computing + (at_once - 1) * moving, at_once * moving)
    return PROCESS_BYTES + max(denoising, at_once * (measured + min(decoding, measured)))


def _tiles_bytes(plan: DenoisePlan, slices: int, threads: int) -> int:
    """Of the tiles that are estimated at a time: their slices, and what the network makes of them, of any slab."""
    of_y, of_x = (
        {(len(tiles), max(len(tile.read) for tile in tiles)) for tiles in map(plan.tiles_along, cuts)}
        for cuts in plan.slabs.axes[1:]
    )
    most = 0
    for (many_y, high), (many_x, wide) in product(of_y, of_x):
        pixels = high * wide
        one = stack_bytes(slices, pixels) + working_bytes(plan.denoiser, pixels, plan.method.images)
        if isinstance(plan.denoiser, Weights) and plan.method.stitch == "crop":
            one *= cpu_lanes(threads, many_y * many_x)
        most = max(most, one)
    return most


def _encoding_bytes(target: Volume, slab: Shape) -> int:
    """Chunks, shards and bytes to send, of what of a slab is encoded together."""
    return 3 * prod(map(min, encoded_at_once(target, slab), slab)) * target.itemsize


def default_workers(plan: Plan, gpus: int, at_once: int) -> int:
    """As many local workers as cores and memory carry; one a GPU, if there are any.

    There may be fewer slabs than that.
    """
    if gpus:
        return gpus
    return max(1, _fitting(plan, at_once, int(0.8 * free_memory_bytes())))


def _fitting(plan: Plan, at_once: int, free_bytes: int) -> int:
    """The most workers that free memory holds, no more than one a core; 0: not one."""
    counts = range(cores(), 0, -1)
    return next((many for many in counts if many * worker_bytes(plan, at_once, threads_each(many)) <= free_bytes), 0)


def refuse_what_cannot_fit(plan: Plan, workers: int, at_once: int) -> None:
    """Raises InputError if this machine's free memory cannot hold that many workers."""
    one, free = worker_bytes(plan, at_once, threads_each(workers)), free_memory_bytes()
    if workers * one <= free:
        return
    smaller = "a smaller --slab (with --shard) or --tile" + (", or --no-prefetch" if at_once > 1 else "")
    fitting = _fitting(plan, at_once, free)
    setting = f"--workers {fitting}" if fitting else smaller
    wanted = f"{counted(workers, 'worker')} of {bytes_text(one)}"
    raise InputError(f"{wanted} cannot fit: {bytes_text(free)} of memory are free; use {setting}")


def seconds_to_run(plan: DenoisePlan, network: Network, workers: int) -> float:
    """The network's time for the whole plan with that many local workers, from one tile timed here in a few seconds."""
    tiles = list(plan.tiles(plan.slabs[0]))
    y, x = tiles[0]
    each = seconds_per_pixel(network, (len(y.read), len(x.read)), len(tiles), threads_each(workers))
    return each * plan.box.size * _tile_overhead(plan) / min(workers, len(plan.slabs))


def counted(count: int, word: str) -> str:
    """A number of things as people write it."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def bytes_text(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def by_text(values: tuple[Any, ...]) -> str:
    """Sizes such as 64 x 512 x 512."""
    return " x ".join(f"{value:g}" for value in values)


def duration_text(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _tile_overhead(plan: DenoisePlan) -> float:
    """Voxels that the network computes for one that is kept, in y and x."""
    computed = prod(
        sum(len(tile.read) for cut in cuts for tile in plan.tiles_along(cut)) for cuts in plan.slabs.axes[1:]
    )
    return computed / (len(plan.box.y) * len(plan.box.x))
