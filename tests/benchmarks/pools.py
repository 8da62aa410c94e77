"""Voxels a second by workers, threads and tiles at a time: python tests/benchmarks/pools.py [UNITS CHANNELS [TURNS]]

First a slab's tiles in this process: one after the other, each with all threads; two at a time; or all of it as one.
Then a volume of four slabs, on workers that have started and share the cores. In turns, the best counts. Prints; gates
nothing. Its process has the allocator of our workers if it gets their environment:

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 \\
        GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python tests/benchmarks/pools.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from nrrn_pipeline import Layout, Options, RunWatch
from nrrn_pipeline.api import carry_out, open_runner
from nrrn_pipeline.benchmark import make_volume
from nrrn_pipeline.machine import cores, threads_each
from nrrn_pipeline.network import NRRN, in_lanes, in_slot, save_weights
from nrrn_pipeline.preparing import make_plan

SIDE, PIECE, HALO = 512, 256, 7  # of a slab, and of its tiles
SLICES = 4
SHAPE, SHARD = (16, 1024, 1024), (16, 512, 512)


def tiles_at_a_time(units: int, channels: int, turns: int) -> None:
    torch.set_num_threads(cores())
    network = in_slot(NRRN(units, channels), "cpu", 3)
    rng = np.random.default_rng(0)
    tile, whole = (
        rng.standard_normal((SLICES + 2, side + 2 * HALO, side + 2 * HALO), dtype=np.float32) for side in (PIECE, SIDE)
    )
    ways: dict[str, Callable[[], object]] = {
        "four tiles, one at a time": lambda: in_lanes(1, network, [tile] * 4),
        "four tiles, two at a time": lambda: in_lanes(2, network, [tile] * 4),
        "one tile": lambda: network(whole),
    }
    best = dict.fromkeys(ways, 0.0)
    for turn in range(turns + 1):
        for name, way in ways.items():
            started = perf_counter()
            way()
            if turn:  # the first takes memory
                best[name] = max(best[name], SLICES * SIDE**2 / (perf_counter() - started))
    for name, speed in best.items():
        print(f"{name}, {cores()} threads: {speed / 1e6:.4f} million voxels/s", flush=True)


def workers(units: int, channels: int, turns: int) -> None:
    best = dict.fromkeys(sorted({1, 2, cores(), 2 * cores()}), 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_weights(NRRN(units, channels), folder / "w.safetensors", {"note": "random, for speed alone"})
        source = make_volume(folder / "in.ome.zarr", SHAPE)
        for _ in range(turns):
            for count in best:
                options = Options(workers=count, layout=Layout(shard=SHARD), overwrite=True)
                plan = make_plan(source.group_url, folder / "out.zarr", folder / "w.safetensors", options)
                with open_runner([plan], options) as (runner, _):
                    for _ in range(2):  # the first loads the network
                        found = carry_out(plan, options, runner, RunWatch())
                best[count] = max(best[count], found.voxels / found.seconds)
    for count, speed in best.items():
        print(f"workers x threads, {count} x {threads_each(count)}: {speed / 1e6:.4f} million voxels/s")


if __name__ == "__main__":
    given = [*map(int, sys.argv[1:])]
    sizes = (*given, *(2, 16, 3)[len(given) :])
    tiles_at_a_time(*sizes)
    workers(*sizes)
