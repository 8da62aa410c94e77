"""The usual way with Dask: python map_overlap.py [--theirs] SRC DST WEIGHTS

dask.array.map_overlap calls the network on every block, with all of its triplets as one batch, in Dask's threads. It is
our network, as it trains; or, --theirs, the one that the authors have released, with the same weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import torch
import zarr
from common import network_of, triplets_of
from numpy.typing import NDArray
from vemden import renamed


def of_the_authors(weights: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Triplets to estimates by their network, which takes a neighbour and the centre as two channels."""
    from FiReTiTiPyLib.PyTorch_Models.Denoising.NRRN import NRRN

    named, units, channels = renamed(weights)
    network = NRRN(units, channels)
    network.load_state_dict(named)
    network.eval()
    return lambda triplets: (network(triplets[:, :2]) + network(triplets[:, 1:].flip(1))) / 2


def main(source: str, output: str, weights: str, theirs: bool) -> None:
    network = network_of(weights)
    estimate_of = of_the_authors(weights) if theirs else network.estimate
    torch.set_num_threads(1)  # Dask has a thread for each core
    halo = network.reach
    noisy = da.from_zarr(source)
    mean = noisy.mean(axis=(1, 2), keepdims=True, dtype=np.float64).compute()
    std = noisy.std(axis=(1, 2), keepdims=True, dtype=np.float64).compute()

    def denoise(block: NDArray[np.float32], block_info: Any = None) -> NDArray[np.float32]:
        at, of = block_info[0]["chunk-location"][0], block_info[0]["num-chunks"][0]
        first, last = at == 0, at == of - 1
        with torch.inference_mode():
            estimate = estimate_of(triplets_of(block, first, last))[:, 0].numpy()
        return np.pad(estimate, ((0 if first else 1, 0 if last else 1), (0, 0), (0, 0)))  # to be trimmed

    normal = ((noisy - mean) / std).astype(np.float32)
    meta = {"dtype": np.float32, "meta": np.empty((0, 0, 0), np.float32)}
    estimate = normal.map_overlap(denoise, depth=(1, halo, halo), boundary="none", **meta)
    levels = da.clip(da.rint(estimate * std.astype(np.float32) + mean.astype(np.float32)), 0, 255).astype(np.uint8)
    kept = zarr.create_array(output, shape=noisy.shape, chunks=noisy.chunksize, dtype="uint8")
    da.store(levels, kept, lock=False)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(*words[-3:], theirs=words[0] == "--theirs")
