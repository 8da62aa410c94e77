"""What tests share: tiny networks, small volumes, and a whole-slice reference that knows nothing of tiles and slabs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from nrrn_pipeline.network import NRRN, save_weights
from nrrn_pipeline.slabs import CopyPlan, Slab

LEAD = {3: (), 4: ("c",), 5: ("t", "c")}  # axes before z, y, x, by the number of dimensions


def tiny_network(units: int = 1, channels: int = 4, seed: int = 0, gain: float = 1.0) -> NRRN:
    """A network with random weights, all scaled by `gain` so that tests can make it more sensitive."""
    torch.manual_seed(seed)
    network = NRRN(units, channels).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(gain)
    return network


def tiny_weights(path: Path, units: int = 1, channels: int = 4, seed: int = 0) -> Path:
    """The same, as a file."""
    save_weights(tiny_network(units, channels, seed), path, {"note": "random, for tests"})
    return path


def image_like(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Blobs and noise over much of the dtype's range; each slice has its own brightness."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    signal = np.sin(y / 9 + z / 3) + np.cos(x / 7) + 0.3 * np.sin(z * 1.7)
    noisy = 0.5 + 0.12 * signal + 0.08 * rng.standard_normal(shape)
    if dtype == "float32":
        return noisy.astype(np.float32)
    limit = np.iinfo(dtype).max
    return np.clip(np.rint(noisy * limit), 0, limit).astype(dtype)


class Passing:
    """In a network's place: leaves slices as they are."""

    def lanes(self, _: int) -> int:
        return 1

    def __call__(self, stack: NDArray[Any]) -> NDArray[Any]:
        return stack[1:-1]


def breaks_off(monkeypatch: pytest.MonkeyPatch, plan: type[CopyPlan], at: int) -> list[int]:
    """Runs of such plans are interrupted at their `at`-th slab; how many were begun, as the only element."""
    real: Callable[[Any, Slab], NDArray[Any]] = plan.voxels
    begun = [0]

    def voxels(made: Any, slab: Slab) -> NDArray[Any]:
        begun[0] += 1
        if begun[0] == at:
            raise KeyboardInterrupt
        return real(made, slab)

    monkeypatch.setattr(plan, "voxels", voxels)
    return begun


def bare_zarr(path: Path, voxels: NDArray[Any], chunks: tuple[int, ...] = (4, 32, 32), **options: Any) -> Path:
    """A bare Zarr array (v3 unless `zarr_format=2`)."""
    fitted = tuple(min(chunk, length) for chunk, length in zip(chunks, voxels.shape, strict=True))
    array = zarr.create_array(path, shape=voxels.shape, dtype=voxels.dtype, chunks=fitted, **options)
    array[:] = voxels
    return path


def whole_slices(network: NRRN, volume: NDArray[Any], images: int = 3) -> NDArray[Any]:
    """The definition: each whole slice, z-scored, through the branches that `images` asks for; float32, not rounded."""
    float_volume = volume.astype(np.float64)
    mean, std = float_volume.mean((1, 2)), float_volume.std((1, 2))
    normal = [
        torch.from_numpy(((s - m) / d).astype(np.float32))[None, None] if d > 0 else None
        for s, m, d in zip(float_volume, mean, std, strict=True)
    ]
    result = float_volume.astype(np.float32)
    for z, centre in enumerate(normal):
        if centre is None:
            continue
        before = normal[z - 1] if z > 0 else None
        after = normal[z + 1] if z + 1 < len(normal) else None
        exists = next((s for s in (before, after) if s is not None), centre)
        pair = [exists if s is None else s for s in (before, after)]
        neighbours = {3: pair, 2: pair[:1], 1: [centre]}[images]
        with torch.inference_mode():
            estimate = sum(network(neighbour, centre) for neighbour in neighbours) / len(neighbours)
        result[z] = estimate.numpy()[0, 0] * np.float32(std[z]) + np.float32(mean[z])
    return result


def stored_chunks(array: Path) -> dict[str, bytes]:
    """Every chunk or shard file of an array on disk."""
    return {str(file.relative_to(array)): file.read_bytes() for file in sorted(array.glob("c/**/*")) if file.is_file()}


def ome_image(
    path: Path,
    voxels: NDArray[Any],
    zarr_format: int = 3,
    levels: int = 1,
    unit: str | None = "nanometer",
    scale: tuple[float, float, float] = (4.0, 4.0, 4.0),
) -> Path:
    """An OME-Zarr group, 0.5 or 0.4; every level takes every other voxel of the one before, in y and x."""
    axes = [*LEAD[voxels.ndim], "z", "y", "x"]
    spatial = {"type": "space"} | ({"unit": unit} if unit else {})
    datasets = []
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for level in range(levels):
        data = voxels[..., :: 2**level, :: 2**level]
        keys = {"name": "v2", "separator": "/"} if zarr_format == 2 else None
        chunks = (1,) * (data.ndim - 3) + (4, 16, 16)
        group.create_array(str(level), data=data, chunks=chunks, chunk_key_encoding=keys)
        sizes = [1.0] * (data.ndim - 3) + [scale[0], scale[1] * 2**level, scale[2] * 2**level]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": sizes}]})
    image = {
        "axes": [{"name": axis, **(spatial if axis in "zyx" else {})} for axis in axes],
        "datasets": datasets,
    }
    put_multiscales(path, image)
    return path


def put_multiscales(path: Path, image: dict[str, Any]) -> None:
    group = zarr.open_group(path, mode="r+")
    if group.metadata.zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{"version": "0.4", **image}]


def plain_group(path: Path) -> None:
    group = zarr.open_group(path, mode="w")
    for name in ("raw", "labels"):
        group.create_array(name, shape=(4, 8, 8), dtype="uint8")


def array(shape: tuple[int, ...], dtype: str = "uint8", **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        chunks = tuple(max(1, min(8, length)) for length in shape)
        zarr.create_array(path, shape=shape, dtype=dtype, chunks=chunks, **options)

    return make


def other_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no Zarr")
