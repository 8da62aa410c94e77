"""The usual way with MONAI: python sliding_window.py SRC DST WEIGHTS

SlidingWindowInferer with its defaults (a quarter of overlap, here windows of 256), each triplet of slices on its own;
"constant" blending averages what overlaps, so outputs agree but for what windows' edges spoil.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import zarr
from common import in_levels, network_of, triplets_of
from monai.inferers import SlidingWindowInferer


def main(source: str, output: str, weights: str) -> None:
    network = network_of(weights)
    noisy = zarr.open_array(source, mode="r")
    kept = zarr.create_array(output, shape=noisy.shape, chunks=noisy.chunks, dtype="uint8")
    voxels = noisy[:]
    mean, std = (of(axis=(1, 2), keepdims=True) for of in (voxels.mean, voxels.std))
    normal = ((voxels - mean) / std).astype(np.float32)
    infer = SlidingWindowInferer(roi_size=(256, 256), sw_batch_size=4)
    denoised = np.empty_like(voxels)
    with torch.inference_mode():
        for z, triplet in enumerate(triplets_of(normal, True, True)):
            estimate = infer(triplet[None], network.estimate)
            denoised[z] = in_levels(estimate[0, 0].numpy(), float(mean[z, 0, 0]), float(std[z, 0, 0]))
    kept[:] = denoised


if __name__ == "__main__":
    main(*sys.argv[1:])
