"""The demo's volume: a clean crop that ships with the repository, and the same with seeded noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

CROP = Path(__file__).with_name("fib25_crop.npz")
SIGMA = 30.0  # grey levels of added Gaussian noise; the crop's own standard deviation is about 35
VOXEL_NM = 10.0


def add_noise(clean: NDArray[np.uint8], seed: int, sigma: float = SIGMA) -> NDArray[np.uint8]:
    """The same volume with white Gaussian noise, rounded and clipped to uint8; same seed, same noise."""
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def write_ome_zarr(path: Path, volume: NDArray[Any]) -> None:
    """A new OME-Zarr 0.5 image of one level, as a microscope's software might leave it."""
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    scale = [{"type": "scale", "scale": [VOXEL_NM] * 3}]
    multiscales = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": multiscales}})
    array = group.create_array("0", shape=volume.shape, dtype=volume.dtype, chunks=(8, 128, 128))
    array[:] = volume
