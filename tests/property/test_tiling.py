"""The law that everything rests on: tiles, slabs and halos cannot be seen in the output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import in_slot, weights_hash
from nrrn_pipeline.planning import DenoisePlan, Method, plan_denoise
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.slab import SlabTask, denoise_voxels
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.statistics import measure_box, merge_boxes
from nrrn_pipeline.volume import open_volume, read_box
from tests.support import bare_zarr, image_like, tiny_network, tiny_weights, whole_slices

LENGTHS = st.sampled_from([1, 7, 31, 64, 255, 256, 257])


def planned(folder: Path, layout: Layout, images: int = 3, roi: Box | None = None) -> DenoisePlan:
    path = folder / "w.safetensors"
    weights = Weights(str(path), weights_hash(path), 1, 4)
    return plan_denoise(open_volume(folder / "in.zarr"), str(folder / "out.zarr"), weights, layout, roi, Method(images))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    chunk = tuple(draw(st.integers(low, high)) for low, high in ((1, 3), (16, 90), (16, 90)))
    shard = tuple(n * draw(st.integers(1, 3)) for n in chunk)
    slab = tuple(n * draw(st.integers(1, 2)) for n in shard)
    halo = draw(st.integers(4, 9))
    return Layout(slab, chunk, shard, draw(st.integers(2 * halo + 30, 256)), halo)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    shape=st.tuples(st.integers(1, 4), LENGTHS, LENGTHS),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    layout=layouts(),
    chunks=st.tuples(st.integers(1, 4), st.integers(20, 300), st.integers(20, 300)),
    images=st.sampled_from([3, 3, 2, 1]),
    blank=st.integers(-6, 3),
)
def test_the_stored_output_equals_the_network_on_whole_slices(
    shape: tuple[int, int, int], dtype: str, layout: Layout, chunks: tuple[int, ...], images: int, blank: int
) -> None:
    noisy = image_like(shape, dtype)
    if 0 <= blank < shape[0]:
        noisy[blank] = noisy.flat[0]
    expected = whole_slices(tiny_network(), noisy, images)
    with TemporaryDirectory() as name:
        folder = Path(name)
        bare_zarr(folder / "in.zarr", noisy, chunks)
        tiny_weights(folder / "w.safetensors")
        plan = planned(folder, layout, images)
        list(run_plan(plan, run_serially, device="cpu"))
        found = read_box(plan.target, plan.target.box)
    difference = np.abs(found.astype(np.float64) - expected)
    if dtype == "float32":
        assert difference.max() <= 1e-4 * (noisy.max() - noisy.min() + 1e-9)
    else:
        limits = np.iinfo(dtype)
        rounded = np.clip(np.rint(expected.astype(np.float64)), limits.min, limits.max)
        assert np.abs(found - rounded).max() <= (1 if dtype == "uint8" else 1e-4 * limits.max)


@pytest.mark.parametrize("shape", [(3, 256, 512), (1, 1, 1), (2, 1, 257), (5, 255, 7), (3, 512, 256)])
def test_awkward_shapes_are_exact_with_the_default_layout(shape: tuple[int, int, int], tmp_path: Path) -> None:
    noisy = image_like(shape, "float32")
    bare_zarr(tmp_path / "in.zarr", noisy)
    tiny_weights(tmp_path / "w.safetensors")
    plan = planned(tmp_path, Layout())
    list(run_plan(plan, run_serially, device="cpu"))
    expected = whole_slices(tiny_network(), noisy)
    scale = max(float(noisy.max() - noisy.min()), 1e-9)
    assert np.abs(read_box(plan.target, plan.target.box) - expected).max() <= 1e-4 * scale


def stitched(halo: int, folder: Path) -> np.ndarray:
    """A float32 volume denoised in tiles of 40 with any halo, past the check that refuses a short one."""
    source = open_volume(folder / "in.zarr")
    network = tiny_network(1, 4, gain=3.0)
    statistics = merge_boxes([measure_box(source, source.box)])
    plan = plan_denoise(source, str(folder / "out.zarr"), Weights("", "", 1, 4), Layout(slab=source.shape))
    (slab,) = plan.slabs
    cut = replace(plan, tile=40, halo=halo)
    return denoise_voxels(read_box(source, source.box), SlabTask(slab, statistics), in_slot(network, "cpu", 3), cut)


def test_a_halo_one_voxel_short_shows_and_the_reach_itself_does_not(tmp_path: Path) -> None:
    noisy = image_like((3, 90, 90), "float32")
    bare_zarr(tmp_path / "in.zarr", noisy)
    network = tiny_network(1, 4, gain=3.0)
    expected = whole_slices(network, noisy)
    tolerance = 1e-5 * float(noisy.max() - noisy.min())
    assert np.abs(stitched(network.reach, tmp_path) - expected).max() <= tolerance
    assert np.abs(stitched(network.reach - 1, tmp_path) - expected).max() > 3 * tolerance


def test_a_region_comes_out_as_it_does_in_the_full_run(tmp_path: Path) -> None:
    noisy = image_like((6, 70, 80), "float32")
    bare_zarr(tmp_path / "in.zarr", noisy)
    tiny_weights(tmp_path / "w.safetensors")
    roi = Box(Span(1, 4), Span(13, 60), Span(30, 80))
    plan = planned(tmp_path, Layout(chunk=(1, 16, 16), shard=(2, 16, 32), tile=30), roi=roi)
    list(run_plan(plan, run_serially, device="cpu"))
    expected = whole_slices(tiny_network(), noisy)[1:4, 13:60, 30:80]
    assert plan.target.origin == (1.0, 13.0, 30.0)
    np.testing.assert_allclose(read_box(plan.target, plan.target.box), expected, rtol=0, atol=1e-5)
