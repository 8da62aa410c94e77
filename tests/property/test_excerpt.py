"""The law that a preview rests on: a box denoised alone is that box of the full run's output, to the byte."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline.cluster.local import local_client
from nrrn_pipeline.denoisers import Weights, filter_for
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span
from nrrn_pipeline.network import Architecture, default_inputs, save_weights, weights_hash
from nrrn_pipeline.planning import DenoisePlan, Method, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.previewing.excerpt import Excerpt, denoised_boxes
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner, Runner, run_serially
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.volume import open_volume, read_box
from tests.support import bare_zarr, image_like, tiny_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def excerpt(steps: Generator[Any, None, Excerpt]) -> Excerpt:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def refuse_difference(plan: DenoisePlan, boxes: list[Box], runner: Runner = run_serially) -> None:
    """Excerpts first: they must need nothing of the run, and leave nothing that it finds."""
    folder = Path(plan.group_url).parent
    before = sorted(folder.rglob("*"))
    found = excerpt(denoised_boxes(plan, runner, boxes, "cpu")).voxels
    assert sorted(folder.rglob("*")) == before
    list(run_plan(plan, runner, "cpu"))
    assert [*found] == [*dict.fromkeys(boxes)]
    for box, voxels in found.items():
        whole = read_box(plan.target, box.shifted(plan.box))
        assert voxels.dtype == whole.dtype
        np.testing.assert_array_equal(voxels, whole)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    chunk = tuple(draw(st.integers(low, high)) for low, high in ((1, 3), (8, 40), (8, 40)))
    slab = tuple(n * draw(st.integers(1, 3)) for n in chunk)
    halo = draw(st.integers(4, 7))
    return Layout(slab, chunk, chunk, draw(st.integers(2 * halo + 5, 60)), halo)  # type: ignore[arg-type]


@st.composite
def boxes_in(draw: st.DrawFn, whole: Box) -> Box:
    spans = []
    for span in whole.spans:
        start = draw(st.integers(span.start, span.stop - 1))
        spans.append(Span(start, draw(st.integers(start + 1, span.stop))))
    return Box(*spans)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 11), st.integers(1, 90), st.integers(1, 90)),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    layout=layouts(),
    images=st.sampled_from([3, 3, 3, 2, 1]),
    statistics=st.sampled_from(["slice", "slice", "volume"]),
    stitch=st.sampled_from(["crop", "crop", "blend"]),
    blank=st.integers(-11, 10),
)
def test_boxes_denoised_alone_are_those_of_the_full_run(
    data: st.DataObject, shape: Shape, dtype: str, layout: Layout, images: int, statistics: str, stitch: str, blank: int
) -> None:
    noisy = image_like(shape, dtype)
    if 0 <= blank < shape[0]:
        noisy[blank] = noisy.flat[0]
    with TemporaryDirectory() as name:
        folder = Path(name)
        bare_zarr(folder / "in.zarr", noisy, (3, 20, 33))
        weights = tiny_weights(folder / "w.safetensors", channels=5)
        source, method = open_volume(folder / "in.zarr"), Method(images, statistics, stitch=stitch)
        denoiser = Weights(str(weights), weights_hash(weights), 1, 5)
        roi = data.draw(st.none() | boxes_in(source.box))
        plan = plan_denoise(source, str(folder / "out.zarr"), denoiser, layout, roi, method)
        refuse_difference(plan, data.draw(st.lists(boxes_in(plan.box), min_size=1, max_size=3)))


def planned(folder: Path, noisy: NDArray[Any], layout: Layout, weights: Path | str) -> DenoisePlan:
    source = open_volume(bare_zarr(folder / "in.zarr", noisy, (4, 32, 32)))
    return plan_denoise(source, str(folder / "out.zarr"), describe_weights(weights), layout)


def slices(z: Sequence[int], plan: DenoisePlan) -> list[Box]:
    return [Box(Span(each, each + 1), plan.box.y, plan.box.x) for each in z]


def test_a_slice_alone_is_rounded_as_amid_a_deep_slab(tmp_path: Path) -> None:
    """Where a network computes both slices beside one as a batch, a batch of one would differ in a last bit or two."""
    noise = np.random.default_rng(0).standard_normal((9, 173, 131), np.float32)  # about 0, where no bit is lost
    plan = planned(tmp_path, noise, Layout(), "nrrn-fast")
    refuse_difference(plan, slices([0, 1, 4, 7, 8], plan))


@pytest.mark.parametrize("kind", ["denoisenet", "unet"])
def test_the_law_holds_for_peers(kind: str, tmp_path: Path) -> None:
    network = Architecture(kind, 2, 4, default_inputs(kind)).build().eval()
    save_weights(network, tmp_path / "w.safetensors", {"note": "random"})
    layout = Layout(shard=(5, 32, 64), chunk=(5, 32, 32))
    plan = planned(tmp_path, image_like((7, 61, 90), "uint16"), layout, tmp_path / "w.safetensors")
    refuse_difference(plan, [Box(Span(3, 4), Span(20, 50), Span(40, 90)), Box(Span(6, 7), Span(0, 61), Span(0, 1))])


@pytest.mark.parametrize("name", ["gaussian-avg", "median-avg", "nlm-avg"])
def test_the_law_holds_for_filters_which_are_set_for_the_whole_volume(name: str, tmp_path: Path) -> None:
    source = open_volume(bare_zarr(tmp_path / "in.zarr", image_like((5, 50, 70)), (4, 32, 32)))
    layout, method = Layout(shard=(3, 32, 32), chunk=(3, 32, 32)), Method(name=name)
    plan = plan_denoise(source, str(tmp_path / "out.zarr"), filter_for(name, source, "slice"), layout, None, method)
    refuse_difference(plan, [Box(Span(2, 3), Span(20, 50), Span(25, 45))])


def test_workers_give_what_they_give_in_the_full_run(tmp_path: Path) -> None:
    """Of two threads each: their number changes how numbers are rounded."""
    layout = Layout(shard=(4, 32, 64), chunk=(4, 32, 32))
    plan = planned(tmp_path, image_like((5, 60, 90), "float32"), layout, "nrrn-fast")
    with local_client(1) as client:
        refuse_difference(plan, slices([2, 4], plan), DaskRunner(client))


def test_a_slice_with_nan_is_refused_and_one_that_is_not_needed_is_not_read(tmp_path: Path) -> None:
    voxels = image_like((16, 20, 20), "float32")
    voxels[3, 0, 0] = np.nan
    bare_zarr(tmp_path / "in.zarr", voxels)
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    plan = plan_denoise(open_volume(tmp_path / "in.zarr"), str(tmp_path / "out.zarr"), weights)
    with pytest.raises(InputError, match="NaN or infinite voxels in slice z=3"):
        excerpt(denoised_boxes(plan, run_serially, slices([1], plan), "cpu"))
    assert np.isfinite([*excerpt(denoised_boxes(plan, run_serially, slices([9], plan), "cpu")).voxels.values()]).all()
