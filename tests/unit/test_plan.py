"""What a plan decides, and what it says it will cost."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nrrn_pipeline.cost import cost_of, fetched_voxels, worker_bytes
from nrrn_pipeline.denoisers import Weights, stack_bytes, working_bytes
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import Filter
from nrrn_pipeline.geometry import Box, Shape, Span, box_of
from nrrn_pipeline.keeping import KEEP_GB
from nrrn_pipeline.network import flop_per_voxel
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.planning import TILE_BYTES, DenoisePlan, Method, plan_denoise, tile_for
from nrrn_pipeline.slabs import CHUNK, SHARD, Layout
from nrrn_pipeline.statistics import statistics_boxes
from nrrn_pipeline.volume import Volume
from tests.support import tiny_network

WEIGHTS = Weights("/w.safetensors", "cafe", units=1, channels=4)


def source_of(shape: Shape, chunk: Shape = (4, 16, 16), dtype: str = "uint16") -> Volume:
    return Volume("/raw.zarr", shape, dtype, chunk, chunk, voxel_size=(8.0, 4.0, 4.0), in_nm=True)


def small_plan(roi: Box | None = None, **layout: Any) -> DenoisePlan:
    layout = {"chunk": (4, 16, 16), "shard": (4, 32, 32)} | layout
    return plan_denoise(source_of((10, 70, 50)), "/out.zarr", WEIGHTS, Layout(**layout), roi)


PLAN = small_plan()
CHANGED = {
    "source": replace(PLAN, source=replace(PLAN.source, url="/other.zarr")),
    "source shape": replace(PLAN, source=replace(PLAN.source, shape=(11, 70, 50))),
    "dtype": replace(PLAN, source=replace(PLAN.source, dtype="float32")),
    "roi": replace(PLAN, box=Box(Span(0, 10), Span(0, 70), Span(0, 32))),
    "weights": replace(PLAN, denoiser=replace(WEIGHTS, sha256="beef")),
    "slab": replace(PLAN, slab=(4, 64, 32)),
    "shard": replace(PLAN, target=replace(PLAN.target, write_unit=(4, 16, 32))),
    "chunk": replace(PLAN, target=replace(PLAN.target, chunk=(4, 16, 32))),
    "tile": replace(PLAN, tile=64),
    "halo": replace(PLAN, halo=5),
    "images": replace(PLAN, method=Method(images=2)),
    "statistics": replace(PLAN, method=Method(statistics="volume")),
    "stitch": replace(PLAN, method=Method(stitch="blend")),
    "precision": replace(PLAN, method=Method(precision="bfloat16")),
    "filter": replace(PLAN, denoiser=Filter("mean", 0.5)),
    "filter's noise": replace(PLAN, denoiser=Filter("mean", 0.6)),
    "noise": replace(PLAN, denoiser=Noise(sigma=30)),
}
SAME = {
    "the same again": small_plan(),
    "the weights' place": replace(PLAN, denoiser=replace(WEIGHTS, path="/moved.safetensors")),
    "the output's place": replace(PLAN, target=replace(PLAN.target, url="/moved.zarr/0")),
    "the source's chunks": replace(PLAN, source=replace(PLAN.source, chunk=(1, 70, 50), write_unit=(1, 70, 50))),
    "a precision that is near enough": replace(PLAN, method=Method(precision="float32")),
    "the voxel size": replace(PLAN, source=replace(PLAN.source, voxel_size=(1.0, 1.0, 1.0))),
    "the whole volume as roi": small_plan(box_of((10, 70, 50))),
    "the defaults said aloud": small_plan(slab=(4, 32, 32), tile=40, halo=4),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_setting_that_changes_voxels_changes_the_fingerprint(what: str) -> None:
    assert CHANGED[what].fingerprint != PLAN.fingerprint


def test_outputs_from_before_tiles_could_be_blended_keep_their_fingerprint() -> None:
    assert "stitch" not in PLAN.settings
    assert replace(PLAN, method=Method(stitch="blend")).settings["stitch"] == "blend"


def test_no_two_settings_share_a_fingerprint() -> None:
    assert len({plan.fingerprint for plan in CHANGED.values()}) == len(CHANGED)


@pytest.mark.parametrize("what", SAME)
def test_what_changes_no_voxel_keeps_the_fingerprint(what: str) -> None:
    assert SAME[what].fingerprint == PLAN.fingerprint


def test_a_plan_pickles_and_is_small() -> None:
    data = pickle.dumps(PLAN)
    assert pickle.loads(data) == PLAN
    assert len(data) < 4096


@st.composite
def plans(draw: st.DrawFn) -> DenoisePlan:
    """Plans of small volumes: any roi, chunks, shards, slabs, halo and tile that fit together."""

    def triple(low: int, high: int) -> Shape:
        z, y, x = (draw(st.integers(low, high)) for _ in range(3))
        return z, y, x

    shape = triple(1, 24)
    spans = [sorted((draw(st.integers(0, n - 1)), draw(st.integers(1, n)))) for n in shape]
    z, y, x = (Span(start, max(stop, start + 1)) for start, stop in spans)
    chunk, shards, slabs = triple(1, 6), triple(1, 2), triple(1, 2)
    shard = (chunk[0] * shards[0], chunk[1] * shards[1], chunk[2] * shards[2])
    slab = (shard[0] * slabs[0], shard[1] * slabs[1], shard[2] * slabs[2])
    layout = Layout(slab, chunk, shard, tile=draw(st.integers(15, 30)), halo=draw(st.integers(4, 7)))
    return plan_denoise(source_of(shape, triple(1, 9)), "/out.zarr", WEIGHTS, layout, Box(z, y, x))


@given(plans())
def test_slabs_keep_every_voxel_of_the_box_once(plan: DenoisePlan) -> None:
    kept = np.zeros(plan.source.shape, int)
    for slab in plan.slabs:
        kept[slab.keep.within(plan.source.box)] += 1
    assert (kept[plan.box.within(plan.source.box)] == 1).all()
    assert kept.sum() == plan.box.size


@given(plans())
def test_a_slab_reads_its_halo_wherever_there_is_one(plan: DenoisePlan) -> None:
    for slab in plan.slabs:
        for keep, read, length, halo in zip(
            slab.keep.spans, slab.read.spans, plan.source.shape, (1, plan.halo, plan.halo), strict=True
        ):
            assert read == Span(max(0, keep.start - halo), min(length, keep.stop + halo))


@given(plans())
def test_slabs_are_whole_write_units_of_the_target(plan: DenoisePlan) -> None:
    for slab in plan.slabs:
        for span, unit, end in zip(plan.target_box(slab).spans, plan.target.write_unit, plan.target.shape, strict=True):
            assert span.start % unit == 0
            assert span.stop % unit == 0 or span.stop == end


@given(plans())
def test_slabs_have_names_of_their_own(plan: DenoisePlan) -> None:
    assert len({slab.key for slab in plan.slabs}) == len(plan.slabs)


@given(plans())
def test_tiles_keep_every_voxel_of_a_slabs_plane_once(plan: DenoisePlan) -> None:
    for slab in plan.slabs:
        kept = np.zeros(plan.source.shape[1:], int)
        for y, x in plan.tiles(slab):
            kept[y.keep.start : y.keep.stop, x.keep.start : x.keep.stop] += 1
        assert kept.sum() == len(slab.keep.y) * len(slab.keep.x)
        assert kept.max() == 1


@given(plans())
def test_cost_counts_the_voxels_read_and_written(plan: DenoisePlan) -> None:
    cost, item = cost_of(plan), plan.source.itemsize
    measured = statistics_boxes(plan.source, plan.statistics_z)
    read = sum(_voxels(plan.source.shape, slab.read) for slab in plan.slabs)
    assert cost.slabs == len(plan.slabs)
    assert cost.tasks == len(plan.slabs) + len(measured)
    assert cost.written_bytes == plan.box.size * item
    assert cost.read_bytes == (read + sum(_voxels(plan.source.shape, box) for box in measured)) * item
    assert cost.read_amplification == read / plan.box.size


@given(plans())
def test_cost_counts_the_whole_chunks_that_reads_touch(plan: DenoisePlan) -> None:
    reads = [slab.read for slab in plan.slabs]
    touched = sum(_voxels_of_touched_chunks(plan.source, box) for box in reads)
    measured = sum(
        _voxels_of_touched_chunks(plan.source, box) for box in statistics_boxes(plan.source, plan.statistics_z)
    )
    cost = cost_of(plan)
    assert sum(fetched_voxels(plan.source, box) for box in reads) == touched
    assert cost.chunk_amplification == touched / plan.box.size
    assert cost.fetched_bytes == (touched + measured) * plan.source.itemsize


@pytest.mark.parametrize(
    "plan",
    [
        small_plan(),
        small_plan(tile=16),
        small_plan(Box(Span(1, 9), Span(0, 56), Span(0, 50)), chunk=(4, 10, 50), shard=(4, 20, 50)),
        small_plan(Box(Span(1, 9), Span(8, 70), Span(5, 50)), chunk=(4, 10, 10), shard=(4, 20, 10), tile=20),
    ],
    ids=["whole", "small tiles", "roi at the start", "roi at the end"],
)
def test_cost_counts_the_arithmetic_of_every_tile(plan: DenoisePlan) -> None:
    pixels = sum(len(slab.keep.z) * len(y.read) * len(x.read) for slab in plan.slabs for y, x in plan.tiles(slab))
    assert cost_of(plan).flop == pytest.approx(pixels * flop_per_voxel(1, 4))


@given(plans())
def test_statistics_cover_each_slice_that_a_slab_reads_once(plan: DenoisePlan) -> None:
    boxes = statistics_boxes(plan.source, plan.statistics_z)
    measured = np.zeros(plan.source.shape, int)
    for box in boxes:
        measured[box.within(plan.source.box)] += 1
    needed = {z for slab in plan.slabs for z in range(slab.read.z.start, slab.read.z.stop)}
    assert set(measured.any((1, 2)).nonzero()[0]) == needed
    assert (measured[sorted(needed)] == 1).all()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize(("units", "channels"), [(1, 2), (3, 4)])
def test_one_slice_more_costs_the_arithmetic_that_is_told(units: int, channels: int, images: int) -> None:
    network = tiny_network(units, channels)

    def counted(slices: int) -> int:
        with FlopCounterMode(display=False) as counter:
            network.denoise(torch.zeros(slices + 2, 8, 9), images)
        return counter.get_total_flops()

    assert counted(5) - counted(4) == flop_per_voxel(units, channels, images) * 8 * 9


@pytest.mark.parametrize(
    ("weights", "tile"),
    [
        (Weights("", "", 4, 64), 256 + 14),  # the paper's: 512 in two pieces, and a halo of 7 on each side
        (Weights("", "", 2, 16), 512 + 10),
        (Weights("", "", 4, 64, "unet", "mean"), 256 + 2 * 122),
    ],
    ids=["paper's", "small", "unet"],
)
def test_tiles_are_as_large_as_memory_carries(weights: Weights, tile: int) -> None:
    plan = plan_denoise(source_of((64, 2000, 2000), dtype="uint8"), "/out.zarr", weights)
    assert plan.tile == tile
    cuts = list(plan.tiles(plan.slabs[0]))
    pieces = round(len(cuts) ** 0.5)
    larger = -(-512 // max(1, pieces - 1)) + tile - -(-512 // pieces)

    def taken(side: int) -> int:
        return working_bytes(weights, side**2, 3) + stack_bytes(66, side**2)

    assert taken(tile) <= TILE_BYTES
    assert pieces == 1 or taken(larger) > TILE_BYTES


def test_a_worker_that_estimates_two_tiles_at_a_time_holds_both() -> None:
    weights = Weights("", "", 4, 64)
    plan = plan_denoise(source_of((64, 512, 512), dtype="uint8"), "/out.zarr", weights)
    side = 512 // 2 + 7  # two along y and two along x, each with a halo on one side
    one = working_bytes(weights, side**2, 3) + stack_bytes(64, side**2)
    assert worker_bytes(plan, 1, threads=2) - worker_bytes(plan, 1, threads=1) == one
    assert worker_bytes(plan, 1, threads=3) == worker_bytes(plan, 1, threads=1), "all three at one tile"
    filtered = replace(plan, denoiser=Filter("mean", 1.0))
    assert worker_bytes(filtered, 1, threads=2) == worker_bytes(filtered, 1, threads=1)


def test_a_network_too_large_for_that_memory_gets_the_smallest_tiles() -> None:
    weights = Weights("", "", 4, 4096)
    assert (
        plan_denoise(source_of((64, 512, 512)), "/out.zarr", weights).tile == 32 + 14
    )  # 2^30 / (4 * 28 * 4096) = 48^2
    assert tile_for(weights, Method(), (10**9, 32, 32), 7) == 1 + 14, "one voxel each"


AWKWARD = [(1, 1, 1), (7, 255, 257), (64, 512, 512), (100, 100, 100), (3, 5000, 20), (1000, 513, 2049)]


@pytest.mark.parametrize("shape", AWKWARD)
def test_default_shards_are_whole_chunks_no_larger_than_they_need_be(shape: Shape) -> None:
    plan = plan_denoise(source_of(shape), "/out.zarr", WEIGHTS)
    for length, chunk, shard, most, largest in zip(
        shape, plan.target.chunk, plan.target.write_unit, CHUNK, SHARD, strict=True
    ):
        assert shard % chunk == 0
        assert chunk == min(length, most)
        assert shard <= max(chunk, min(largest, length + chunk - 1))
    assert plan.slab == plan.target.write_unit


@pytest.mark.parametrize("shape", AWKWARD)
@pytest.mark.parametrize("chunk", [(1, 4, 4), (10, 100, 100), (5, 7, 11), (64, 512, 512)])
def test_any_chunk_gets_a_shard_of_whole_chunks(shape: Shape, chunk: Shape) -> None:
    plan = plan_denoise(source_of(shape), "/out.zarr", WEIGHTS, Layout(chunk=chunk))
    assert all(shard % unit == 0 for shard, unit in zip(plan.target.write_unit, chunk, strict=True))


@pytest.mark.parametrize(
    "layout", [Layout(chunk=(1, 1, 1), shard=(64, 512, 512)), Layout(chunk=(64, 8192, 8192), shard=(64, 8192, 8192))]
)
def test_shards_that_could_not_be_read_again_are_refused_before_anything_is_done(layout: Layout) -> None:
    with pytest.raises(InputError, match=r"shards of \(64, \d+, \d+\) in chunks of .* cannot be"):
        plan_denoise(source_of((64, 8192, 8192)), "/out.zarr", WEIGHTS, layout)


def test_shards_without_number_are_refused() -> None:
    layout = Layout((64, 512, 512), (1, 1, 1), (1, 1, 1))
    with pytest.raises(InputError, match=r"shards of .* are too many to keep account of"):
        plan_denoise(source_of((64, 8192, 8192)), "/out.zarr", WEIGHTS, layout)


def test_a_target_mirrors_its_source() -> None:
    plan = small_plan(Box(Span(2, 10), Span(6, 70), Span(0, 50)))
    assert plan.target.shape == (8, 64, 50)
    assert plan.target.dtype == plan.source.dtype
    assert plan.target.axes == plan.source.axes
    assert plan.target.voxel_nm == (8.0, 4.0, 4.0)
    assert plan.target.origin == (16.0, 24.0, 0.0)


def test_the_halo_is_the_networks_reach_unless_told() -> None:
    assert small_plan().halo == tiny_network(units=1).reach
    assert small_plan(halo=9).halo == 9


@pytest.mark.parametrize("group", ["/raw.zarr", "/raw.zarr/out"])
def test_an_output_on_top_of_its_source_is_refused(group: str) -> None:
    with pytest.raises(InputError, match="on top of the input"):
        plan_denoise(source_of((8, 8, 8)), group, WEIGHTS)


def test_a_name_that_begins_like_the_sources_is_no_overlap() -> None:
    assert plan_denoise(source_of((8, 8, 8)), "/raw.zarr2", WEIGHTS).group_url == "/raw.zarr2"


def _voxels(shape: Shape, box: Box) -> int:
    inside = np.zeros(shape, bool)
    inside[box.within(box_of(shape))] = True
    return int(inside.sum())


def _voxels_of_touched_chunks(volume: Volume, box: Box) -> int:
    chunk_of = np.indices(volume.shape) // np.reshape(volume.chunk, (3, 1, 1, 1))
    touched = np.zeros(volume.shape, bool)
    read = box.within(volume.box)
    for place in set(map(tuple, chunk_of[(slice(None), *read)].reshape(3, -1).T)):
        touched |= (chunk_of == np.reshape(place, (3, 1, 1, 1))).all(0)
    return int(touched.sum())


@given(plans())
def test_slabs_by_number_are_those_in_their_order(plan: DenoisePlan) -> None:
    every = list(plan.slabs)
    assert len(plan.slabs) == len(every)
    assert [plan.slabs[i] for i in range(len(every))] == every == plan.slabs[:]
    assert plan.slabs[-1] == every[-1]
    assert plan.slabs[1:7:2] == every[1:7:2]
    assert plan.slabs.largest().read.size == max(slab.read.size for slab in every)
    with pytest.raises(IndexError):
        plan.slabs[len(every)]


@pytest.mark.parametrize("layers", [25, 250])
def test_a_plan_of_any_size_is_as_small(layers: int) -> None:
    """100,000 slabs, and a million: by the calls that are made, not by time."""
    side = 64 * 512
    source = Volume("/raw.zarr", (64 * layers, side, side), "uint8", (16, 256, 256), (64, 512, 512))
    tracemalloc.start()
    plan = plan_denoise(source, "/out.zarr", Weights("/w", "cafe", 4, 64))
    cost = cost_of(plan)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cost.slabs == len(plan.slabs) == layers * 64**2
    assert plan.slabs[10**5].key == next(islice(plan.slabs, 10**5, None)).key
    assert peak < 2**20, "a plan's memory grew with its slabs"


def test_the_default_plan_of_a_large_volume_reads_little_twice() -> None:
    """Of voxels, and of whole chunks, which storage gives, as workers keep what the next slabs read too."""
    weights, source = Weights("/w", "cafe", 4, 64), source_of((2000, 4000, 6000), (16, 256, 256), "uint8")
    plan = plan_denoise(source, "/out.zarr", weights)
    costs = [cost_of(plan, 2, True, workers, int(KEEP_GB * 1e9)) for workers in (1, 2, 4, 32)]
    assert costs[0].read_amplification < 1.09
    assert [round(cost.chunk_amplification, 2) for cost in costs] == [1.0, 1.02, 1.07, 1.72]
    assert round(cost_of(plan).chunk_amplification, 1) == 5.5, "if each slab read for itself"
    slices = plan_denoise(source_of(source.shape, (1, 4000, 6000), "uint16"), "/out.zarr", weights)
    assert [round(cost_of(slices, keep_bytes=keep).chunk_amplification) for keep in (0, int(KEEP_GB * 1e9))] == [99, 1]
