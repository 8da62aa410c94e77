"""The usual way with Dask: python map_overlap.py SRC DST WEIGHTS

dask.array.map_overlap calls the network on every block, with all of its triplets as one batch, in Dask's threads.
"""

from __future__ import annotations

import sys
from typing import Any

import dask.array as da
import numpy as np
import torch
import zarr
from common import network_of, triplets_of
from numpy.typing import NDArray


def main(source: str, output: str, weights: str) -> None:
    network = network_of(weights)
    torch.set_num_threads(1)  # Dask has a thread for each core
    halo = network.reach
    noisy = da.from_zarr(source)
    mean = noisy.mean(axis=(1, 2), keepdims=True, dtype=np.float64).compute()
    std = noisy.std(axis=(1, 2), keepdims=True, dtype=np.float64).compute()

    def denoise(block: NDArray[np.float32], block_info: Any = None) -> NDArray[np.float32]:
        at, of = block_info[0]["chunk-location"][0], block_info[0]["num-chunks"][0]
        first, last = at == 0, at == of - 1
        with torch.inference_mode():
            estimate = network.estimate(triplets_of(block, first, last))[:, 0].numpy()
        return np.pad(estimate, ((0 if first else 1, 0 if last else 1), (0, 0), (0, 0)))  # to be trimmed

    normal = ((noisy - mean) / std).astype(np.float32)
    meta = {"dtype": np.float32, "meta": np.empty((0, 0, 0), np.float32)}
    estimate = normal.map_overlap(denoise, depth=(1, halo, halo), boundary="none", **meta)
    levels = da.clip(da.rint(estimate * std.astype(np.float32) + mean.astype(np.float32)), 0, 255).astype(np.uint8)
    kept = zarr.create_array(output, shape=noisy.shape, chunks=noisy.chunksize, dtype="uint8")
    da.store(levels, kept, lock=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
