"""Time NRRN.denoise in a thread, as a Dask worker runs it: python tests/benchmarks/denoise_in_thread.py UNITS CHANNELS

Run it under the environment that is to be measured, such as OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=65536 (Dask's own)
or the settings of nrrn_pipeline/cluster/local.py. Prints; gates nothing.
"""

from __future__ import annotations

import sys
from threading import Thread
from time import perf_counter

import torch

from nrrn_pipeline.machine import peak_memory_bytes
from nrrn_pipeline.network import NRRN, flop_per_voxel


def measure(units: int, channels: int) -> None:
    """Four slices of 256 x 256, after a first call that chooses algorithms."""
    torch.manual_seed(0)
    network = NRRN(units, channels).eval().to(memory_format=torch.channels_last)
    stack = torch.randn(6, 256, 256)
    network.denoise(stack[:3])
    started = perf_counter()
    network.denoise(stack)
    seconds = perf_counter() - started
    voxels = 4 * 256 * 256
    gflops = flop_per_voxel(units, channels) * voxels / seconds / 1e9
    print(f"{seconds:.3f} s, {voxels / seconds / 1e6:.3f} million voxels/s, {gflops:.0f} GFLOP/s", end=", ")
    print(f"peak {peak_memory_bytes() / 1e6:.0f} MB")


if __name__ == "__main__":
    thread = Thread(target=measure, args=(int(sys.argv[1]), int(sys.argv[2])))
    thread.start()
    thread.join()
