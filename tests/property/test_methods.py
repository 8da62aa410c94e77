"""Filters and other networks obey the law of NRRN: tiles, slabs and halos cannot be seen; but blending shows them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline.denoisers import Denoiser
from nrrn_pipeline.filters import Filter
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import Architecture, in_slot, load_weights, save_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.planning import Method, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.slab import stacks_of
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.volume import open_volume, read_box
from tests.support import bare_zarr, image_like, tiny_weights

FILTERS = [Filter("mean", 0.5), Filter("gaussian-avg", 0.5, 1.4), Filter("median-avg", 0.5, 5), Filter("nlm", 0.5, 0.3)]
NETWORKS = [
    Architecture("denoisenet", 4, 4, "channels"),
    Architecture("denoisenet", 3, 4, "single"),
    Architecture("unet", 1, 3, "mean"),
    Architecture("unet", 2, 2, "single"),
]


def normalised(volume: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]:
    wide = volume.astype(np.float64)
    mean, std = wide.mean((1, 2), keepdims=True), wide.std((1, 2), keepdims=True)
    return ((wide - mean) / std).astype(np.float32), mean, std


def on_whole_slices(slot: Any, volume: NDArray[Any]) -> NDArray[np.float64]:
    """The definition: whole slices, z-scored, a missing neighbour replaced by the other one."""
    normal, mean, std = normalised(volume)
    (rows,) = stacks_of(Span(0, len(volume)), set(range(len(volume))))
    result: NDArray[np.float64] = slot(normal[rows]) * std + mean
    return result


def in_pieces(folder: Path, denoiser: Denoiser, layout: Layout, roi: Box | None = None, stitch: str = "crop") -> Any:
    method = Method(stitch=stitch)
    plan = plan_denoise(open_volume(folder / "in.zarr"), str(folder / "out.zarr"), denoiser, layout, roi, method)
    list(run_plan(plan, run_serially, "cpu"))
    return read_box(plan.target, plan.target.box)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), which=st.integers(0, len(FILTERS) + len(NETWORKS) - 1))
def test_any_method_in_tiles_and_slabs_equals_it_on_whole_slices(data: st.DataObject, which: int) -> None:
    shape = tuple(data.draw(st.integers(1 if axis == 0 else 2, most)) for axis, most in enumerate((4, 90, 90)))
    noisy = image_like(shape, "float32")
    noisy[:, 0, 0] += 1  # no slice is blank
    start = [data.draw(st.integers(0, length - 1)) for length in shape]
    roi = Box(*(Span(first, length) for first, length in zip(start, shape, strict=True)))
    with TemporaryDirectory() as name:
        folder = Path(name)
        bare_zarr(folder / "in.zarr", noisy)
        if which < len(FILTERS):
            denoiser: Any = FILTERS[which]
            slot: Any = denoiser
        else:
            torch.manual_seed(which)
            network = NETWORKS[which - len(FILTERS)].build().eval().requires_grad_(False)
            save_weights(network, folder / "w.safetensors", {})
            denoiser, slot = describe_weights(folder / "w.safetensors"), in_slot(network, "cpu", 3)
        least = 2 * denoiser.reach + denoiser.grid
        layout = Layout(chunk=(2, 16, 16), shard=(2, 32, 16), tile=data.draw(st.integers(least, least + 40)))
        found = in_pieces(folder, denoiser, layout, roi)
    expected = on_whole_slices(slot, noisy)[tuple(slice(span.start, span.stop) for span in roi.spans)]
    assert np.abs(found - expected).max() <= 1e-4 * float(np.ptp(noisy))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_noise_of_a_region_is_that_region_of_the_noisy_volume(data: st.DataObject) -> None:
    clean = image_like((5, 40, 150))
    spans = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in clean.shape]
    roi = Box(*(Span(*ends) for ends in spans))
    with TemporaryDirectory() as name:
        bare_zarr(Path(name) / "in.zarr", clean)
        found = in_pieces(Path(name), Noise(20, 30, seed=1), Layout(chunk=(2, 16, 16), shard=(2, 32, 16)), roi)
    whole = Noise(20, 30, seed=1).added(clean, Box(Span(0, 5), Span(0, 40), Span(0, 150)))
    assert np.array_equal(found, whole[tuple(slice(*ends) for ends in spans)])


@pytest.mark.parametrize("side", [7, 64, 100])
def test_blending_estimates_that_agree_changes_nothing(side: int, tmp_path: Path) -> None:
    noisy = image_like((3, side, 90), "float32")
    bare_zarr(tmp_path / "in.zarr", noisy)
    denoiser = Filter("mean", 0.5)  # of which a tile's edge spoils nothing
    layout = Layout(slab=(3, 128, 128), chunk=(3, 64, 64), shard=(3, 128, 128), tile=40, halo=8)
    found = in_pieces(tmp_path, denoiser, layout, stitch="blend")
    assert np.allclose(found, on_whole_slices(denoiser, noisy), rtol=0, atol=1e-5)


def test_blending_keeps_what_the_edges_of_tiles_spoil_and_cropping_does_not(tmp_path: Path) -> None:
    noisy = image_like((3, 90, 90), "float32")
    bare_zarr(tmp_path / "in.zarr", noisy)
    path = tiny_weights(tmp_path / "w.safetensors")
    weights = describe_weights(path)
    layout = Layout(slab=(3, 128, 128), chunk=(3, 64, 64), shard=(3, 128, 128), tile=30)
    expected = on_whole_slices(in_slot(load_weights(path), "cpu", 3), noisy)
    wrong = {}
    for stitch in ("crop", "blend"):
        (tmp_path / stitch).mkdir()
        bare_zarr(tmp_path / stitch / "in.zarr", noisy)
        wrong[stitch] = np.abs(in_pieces(tmp_path / stitch, weights, layout, stitch=stitch) - expected).max()
    assert wrong["crop"] <= 1e-5 * np.ptp(noisy)
    assert wrong["blend"] > 10 * wrong["crop"]
