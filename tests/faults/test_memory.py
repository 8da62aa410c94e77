"""The plan's memory figure holds, and has nothing to do with how large the volume is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from nrrn_pipeline import Layout, Method, Options, denoise
from nrrn_pipeline.cost import cost_of
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.slabs import Plan
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
    return planned_bytes(summary.plan, options), summary.peak_memory_bytes


def planned_bytes(plan: Plan, options: Options) -> int:
    """Of a worker, with what it keeps."""
    assert isinstance(plan, DenoisePlan)
    return cost_of(plan, options.slabs_each, keep_bytes=int(options.keep_gb * 1e9)).worker_bytes


@pytest.mark.timeout(900)
def test_a_volume_of_2_gb_runs_in_the_planned_memory_and_no_more_than_a_small_one(tmp_path: Path) -> None:
    options = Options(method=Method(images=1), workers=2, device="cpu", keep_gb=0)
    large, small = (128, 2048, 2048), (64, 2048, 2048)  # of 8 slabs a worker, until its allocator holds its most
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


def test_what_a_worker_keeps_is_in_the_plan_and_in_no_more_than_is_asked_for(tmp_path: Path) -> None:
    found = {}
    for keep_gb in (0.0, 0.6, 3.2):
        (tmp_path / f"{keep_gb}").mkdir()
        options = Options(method=Method(images=1), workers=1, device="cpu", keep_gb=keep_gb)
        found[keep_gb] = planned_and_measured(tmp_path / f"{keep_gb}", (128, 1024, 1024), options)
        print(f"keep {keep_gb} GB: planned {found[keep_gb][0] / 1e6:.0f} MB, peak {found[keep_gb][1] / 1e6:.0f} MB")
    assert found[0.0][0] < found[0.6][0] < found[3.2][0]
    assert found[3.2][1] > found[0.0][1] + 100e6
    assert all(peak <= 1.25 * planned for planned, peak in found.values())


@pytest.mark.parametrize(("units", "channels", "tile", "images"), [(2, 16, 256, 3), (4, 32, 128, 3), (2, 32, 192, 1)])
def test_networks_of_many_maps_stay_within_the_plan(
    units: int, channels: int, tile: int, images: int, tmp_path: Path
) -> None:
    noise_volume(tmp_path / "in.zarr", (3, tile, tile))
    tiny_weights(tmp_path / "w.safetensors", units, channels)
    options = Options(layout=Layout(tile=tile), method=Method(images=images), workers=1, device="cpu")
    summary = denoise(tmp_path / "in.zarr", tmp_path / "out.zarr", tmp_path / "w.safetensors", options)
    planned = planned_bytes(summary.plan, options)
    print(f"planned {planned / 1e6:.0f} MB, peak {summary.peak_memory_bytes / 1e6:.0f} MB")
    assert 0.75 * planned <= summary.peak_memory_bytes <= 1.25 * planned


def test_source_chunks_far_deeper_than_a_slab_stay_within_the_plan(tmp_path: Path) -> None:
    noise_volume(tmp_path / "in.zarr", (128, 512, 512), chunks=(128, 256, 256))
    tiny_weights(tmp_path / "w.safetensors", channels=1)
    layout = Layout(chunk=(8, 256, 256), shard=(32, 512, 512))
    options = Options(layout=layout, method=Method(images=1), workers=1, device="cpu", keep_gb=0)
    summary = denoise(tmp_path / "in.zarr", tmp_path / "out.zarr", tmp_path / "w.safetensors", options)
    planned = planned_bytes(summary.plan, options)
    print(f"planned {planned / 1e6:.0f} MB, peak {summary.peak_memory_bytes / 1e6:.0f} MB")
    assert 0.75 * planned <= summary.peak_memory_bytes <= 1.25 * planned
