"""The plan's memory figure holds, and has nothing to do with how large the volume is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from nrrn_pipeline import Layout, Method, Options, denoise
from nrrn_pipeline.cost import worker_bytes
from tests.support import tiny_weights

GB = 10**9


def noise_volume(path: Path, shape: tuple[int, int, int], chunks: tuple[int, int, int] = (16, 512, 512)) -> None:
    """float32 noise, written chunk layer by chunk layer; never whole in memory."""
    array = zarr.create_array(path, shape=shape, dtype="float32", chunks=chunks)
    layer = np.random.default_rng(0).standard_normal((16, *shape[1:]), dtype=np.float32)
    for z in range(0, shape[0], 16):
        array[z : z + 16] = layer[: shape[0] - z]


def planned_and_measured(folder: Path, shape: tuple[int, int, int], options: Options) -> tuple[int, int]:
    noise_volume(folder / "in.zarr", shape)
    tiny_weights(folder / "w.safetensors", units=1, channels=1)
    summary = denoise(folder / "in.zarr", folder / "out.zarr", folder / "w.safetensors", options)
    assert summary.resumed == 0
    return worker_bytes(summary.plan, options.slabs_each), summary.peak_memory_bytes


@pytest.mark.timeout(900)
def test_a_volume_of_2_gb_runs_in_the_planned_memory_and_no_more_than_a_small_one(tmp_path: Path) -> None:
    options = Options(method=Method(images=1), workers=2, device="cpu")
    large, small = (128, 2048, 2048), (64, 1024, 2048)
    assert 4 * np.prod(large) > 2 * GB
    results = []
    for name, shape in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        results.append(planned_and_measured(tmp_path / name, shape, options))
    (_, small_peak), (planned, large_peak) = results
    print(
        f"planned {planned / 1e6:.0f} MB, peak {large_peak / 1e6:.0f} MB, of the small volume {small_peak / 1e6:.0f} MB"
    )
    assert 0.75 * planned <= large_peak <= 1.25 * planned
    assert large_peak <= 1.1 * small_peak


@pytest.mark.parametrize(("units", "channels", "tile", "images"), [(2, 16, 256, 3), (4, 32, 128, 3), (2, 32, 192, 1)])
def test_networks_of_many_maps_stay_within_the_plan(
    units: int, channels: int, tile: int, images: int, tmp_path: Path
) -> None:
    noise_volume(tmp_path / "in.zarr", (3, tile, tile))
    tiny_weights(tmp_path / "w.safetensors", units, channels)
    options = Options(layout=Layout(tile=tile), method=Method(images=images), workers=1, device="cpu")
    summary = denoise(tmp_path / "in.zarr", tmp_path / "out.zarr", tmp_path / "w.safetensors", options)
    planned = worker_bytes(summary.plan, options.slabs_each)
    print(f"planned {planned / 1e6:.0f} MB, peak {summary.peak_memory_bytes / 1e6:.0f} MB")
    assert 0.75 * planned <= summary.peak_memory_bytes <= 1.25 * planned


def test_source_chunks_far_deeper_than_a_slab_stay_within_the_plan(tmp_path: Path) -> None:
    noise_volume(tmp_path / "in.zarr", (128, 512, 512), chunks=(128, 256, 256))
    tiny_weights(tmp_path / "w.safetensors", channels=1)
    layout = Layout(chunk=(8, 256, 256), shard=(32, 512, 512))
    options = Options(layout=layout, method=Method(images=1), workers=1, device="cpu")
    summary = denoise(tmp_path / "in.zarr", tmp_path / "out.zarr", tmp_path / "w.safetensors", options)
    planned = worker_bytes(summary.plan, options.slabs_each)
    print(f"planned {planned / 1e6:.0f} MB, peak {summary.peak_memory_bytes / 1e6:.0f} MB")
    assert 0.75 * planned <= summary.peak_memory_bytes <= 1.25 * planned
