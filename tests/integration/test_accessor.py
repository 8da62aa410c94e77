"""array.nrrn.denoise: what nrrn denoise gives, for whichever blocks, and no more read than is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import xarray
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nrrn_pipeline.accessor  # noqa: F401  (it is what gives arrays their .nrrn)
from nrrn_pipeline import InputError, Layout, Options, denoise, open_volume
from tests.support import image_like, ome_image, tiny_network, tiny_weights, whole_slices

DASK = dask.array.ones((2, 8, 8), chunks=1, dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def volume(voxels: NDArray[Any], **how: Any) -> xarray.DataArray:
    return xarray.DataArray(voxels, dims=("z", "y", "x"), **how)


def noted(voxels: NDArray[Any], chunks: tuple[Any, ...]) -> tuple[xarray.DataArray, list[tuple[int, ...]]]:
    """An array in chunks, and the places of those that are read from now on."""
    read: list[tuple[int, ...]] = []

    def block(block_info: Any = None) -> NDArray[Any]:
        where = block_info[None]
        read.append(tuple(where["chunk-location"]))
        return voxels[tuple(slice(*ends) for ends in where["array-location"])]

    chunks = dask.array.core.normalize_chunks(chunks, voxels.shape)
    return volume(dask.array.map_blocks(block, chunks=chunks, dtype=voxels.dtype, meta=voxels[:0])), read


def off(found: xarray.DataArray, voxels: NDArray[Any], images: int = 3) -> float:
    """How far it is from the network on whole slices, at most, within the dtype's range; 0.5 by rounding."""
    exact = whole_slices(tiny_network(), voxels, images).astype(np.float64)
    if voxels.dtype.kind == "u":
        exact = np.clip(exact, 0, np.iinfo(voxels.dtype).max)
    return float(np.abs(found.values - exact).max())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_it_is_what_denoise_gives_to_the_byte_where_blocks_are_its_slabs(
    tmp_path: Path, weights: Path, dtype: str
) -> None:
    source = ome_image(tmp_path / "a.zarr", image_like((9, 40, 50), dtype))
    layout = Layout(chunk=(4, 20, 25), shard=(4, 20, 25))
    denoise(source, tmp_path / "out.zarr", weights, Options(cluster="serial", layout=layout))
    wanted = open_volume(tmp_path / "out.zarr").to_xarray()
    noisy = open_volume(source).to_xarray().chunk(z=4, y=20, x=25)
    found = noisy.nrrn.denoise(weights)
    assert found.dtype == dtype
    assert found.chunks == noisy.chunks
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, noisy)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.tuples(*[st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)] * 3),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    images=st.sampled_from([1, 2, 3]),
)
def test_blocks_of_any_size_give_the_network_on_whole_slices(
    weights: Path, chunks: tuple[Any, ...], dtype: str, images: int
) -> None:
    voxels = image_like(tuple(map(sum, chunks)), dtype)  # type: ignore[arg-type]
    found = noted(voxels, chunks)[0].nrrn.denoise(weights, images=images)
    assert found.data.chunks == chunks
    assert off(found, voxels, images) <= {"uint8": 0.501, "uint16": 0.6, "float32": 1e-5}[dtype]


def test_nothing_is_read_before_it_is_computed_and_then_what_is_asked_for(weights: Path) -> None:
    lazy, read = noted(image_like((12, 64, 64)), (2, 32, 32))
    denoised = lazy.nrrn.denoise(weights)
    assert read == []
    denoised.isel(z=5, y=slice(0, 4), x=slice(0, 4)).compute(scheduler="sync")
    # one block, whose slices 4 and 5 have neighbours in the chunks before and after: these three layers, once
    assert sorted(read) == [(z, y, x) for z in (1, 2, 3) for y in (0, 1) for x in (0, 1)]


def test_a_part_of_the_result_is_that_part_of_the_whole(weights: Path) -> None:
    lazy, _ = noted(image_like((12, 40, 40)), (3, 16, 16))
    denoised = lazy.nrrn.denoise(weights)
    part = {"z": slice(4, 8), "y": slice(10, 30), "x": slice(0, 17)}
    assert np.array_equal(denoised.isel(part), denoised.compute().isel(part))


def test_coordinates_attributes_and_names_stay(tmp_path: Path, weights: Path) -> None:
    noisy = open_volume(ome_image(tmp_path / "a.zarr", image_like((4, 20, 30)))).to_xarray()
    noisy.attrs["microscope"] = "Crossbeam"
    found = noisy.nrrn.denoise(weights)
    assert found.attrs == noisy.attrs
    assert found.name == noisy.name
    assert all(found[axis].identical(noisy[axis]) for axis in "zyx")
    assert found.x.attrs["units"] == "nm"


def test_voxels_in_memory_are_cut_into_blocks(weights: Path) -> None:
    voxels = image_like((20, 30, 300))
    found = volume(voxels).nrrn.denoise(weights)
    assert found.chunks == ((16, 4), (30,), (256, 44))
    assert off(found, voxels) < 0.501


def test_blocks_with_nothing_in_them_are_left_out(weights: Path) -> None:
    voxels = image_like((4, 20, 24))
    found = volume(dask.array.from_array(voxels, chunks=((0, 1, 0, 3), (20, 0), (24,)))).nrrn.denoise(weights)
    assert found.chunks == ((1, 3), (20,), (24,))
    assert off(found, voxels) <= 0.51


def test_a_blank_slice_passes_through(weights: Path) -> None:
    voxels = image_like((5, 20, 20))
    voxels[2] = 0
    found = volume(voxels).chunk(z=1).nrrn.denoise(weights)
    assert not found[2].any()
    assert off(found, voxels) < 0.501


@pytest.mark.parametrize("schedule", ["threads", "distributed"])
def test_every_scheduler_gives_the_same(weights: Path, schedule: str) -> None:
    lazy = volume(dask.array.from_array(image_like((8, 30, 40)), chunks=(3, 16, 40))).nrrn.denoise(weights)
    with dask.config.set(scheduler="sync"):
        wanted = lazy.compute()
    if schedule == "threads":
        found = lazy.compute(scheduler="threads")
    else:
        with (
            LocalCluster(
                n_workers=2, processes=False, dashboard_address="127.0.0.1:0", threads_per_worker=1
            ) as cluster,
            Client(cluster),
        ):
            found = lazy.compute()
    assert np.array_equal(found, wanted)


def test_large_arrays_take_seconds_to_describe(weights: Path) -> None:
    lazy = volume(dask.array.zeros((1000, 4000, 4000), chunks=(16, 256, 256), dtype=np.uint8))
    assert lazy.nrrn.denoise(weights).data.npartitions == lazy.data.npartitions == 63 * 16 * 16


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (volume(np.zeros((2, 8, 8), np.int16)), "holds int16 voxels: expected uint8, uint16, float32"),
        (volume(np.zeros((2, 8, 8), np.uint8)).transpose("y", "x", "z"), "dimensions y, x, z: expected z, y, x"),
        (volume(np.zeros((2, 8, 8), np.uint8)).isel(z=0), "dimensions y, x: expected z, y, x"),
        (volume(np.zeros((2, 8, 8), np.uint8)).expand_dims("c"), "dimensions c, z, y, x"),
        (volume(np.zeros((2, 8, 8), np.uint8)).isel(z=slice(0)), "is empty"),
        (volume(DASK[DASK[:, 0, 0] > 0]), r"chunks of unknown sizes: call its .data.compute_chunk_sizes\(\) first"),
    ],
)
def test_what_is_no_volume_is_refused(weights: Path, array: xarray.DataArray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        array.nrrn.denoise(weights)


def test_what_cannot_denoise_is_refused(tmp_path: Path, weights: Path) -> None:
    array = volume(image_like((2, 8, 8)))
    with pytest.raises(InputError, match="no weights at"):
        array.nrrn.denoise(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="device 'tpu' is unknown"):
        array.nrrn.denoise(weights, device="tpu")
    with pytest.raises(InputError, match="images 4 is not possible"):
        array.nrrn.denoise(weights, images=4)
    voxels = image_like((2, 8, 8), "float32")
    voxels[1, 2, 3] = np.nan
    with pytest.raises(InputError, match="the array raw holds NaN or infinite voxels in slice z=1"):
        volume(voxels, name="raw").nrrn.denoise(weights).compute()


def test_weights_that_are_others_by_now_are_refused(tmp_path: Path) -> None:
    lazy = volume(image_like((2, 8, 8))).nrrn.denoise(tiny_weights(tmp_path / "w.safetensors"))
    tiny_weights(tmp_path / "w.safetensors", seed=1)
    with pytest.raises(InputError, match="but the run was planned with"):
        lazy.compute(scheduler="sync")
