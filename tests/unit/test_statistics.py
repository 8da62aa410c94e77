from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline import statistics
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.statistics import (
    Moments,
    SliceStatistics,
    measure_box,
    merge_boxes,
    statistics_boxes,
)
from nrrn_pipeline.volume import Volume, open_volume
from tests.support import bare_zarr, image_like

lengths = st.integers(1, 20)
shapes = st.tuples(st.integers(1, 5), lengths, lengths)


def measured(voxels: NDArray[Any], steps: tuple[int, int, int], chunks: tuple[int, int, int]) -> SliceStatistics:
    """The statistics of voxels stored in chunks, measured in boxes of `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        volume = open_volume(bare_zarr(Path(folder) / "a.zarr", voxels, chunks))
        return merge_boxes(measure_box(volume, box) for box in boxes_of(volume.box, steps))


def stored(folder: Path, voxels: NDArray[Any]) -> Volume:
    return open_volume(bare_zarr(folder / "a.zarr", voxels))


def assert_as_numpy(found: SliceStatistics, voxels: NDArray[Any]) -> None:
    exact = voxels.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, exact.std((1, 2)), rtol=1e-9, atol=1e-300)


@given(
    shape=shapes,
    steps=shapes,
    chunks=shapes,
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    seed=st.integers(0),
)
@settings(max_examples=60, deadline=None)
def test_merged_statistics_equal_those_of_whole_slices(
    shape: tuple[int, int, int], steps: tuple[int, int, int], chunks: tuple[int, int, int], dtype: str, seed: int
) -> None:
    voxels = image_like(shape, dtype, seed)
    found = measured(voxels, steps, chunks)
    assert found.first_z == 0
    assert_as_numpy(found, voxels)


@given(order=st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_statistics_do_not_depend_on_the_order_of_the_parts_to_the_last_bit(order: list[int]) -> None:
    voxels = image_like((4, 30, 31), "float32")
    parts = []
    for box in boxes_of(Box(Span(0, 4), Span(0, 30), Span(0, 31)), (2, 11, 17)):
        planes = voxels[box.z.start : box.z.stop, box.y.start : box.y.stop, box.x.start : box.x.stop].astype(float)
        parts.append((box, [Moments(p.size, float(p.mean()), float(p.var() * p.size)) for p in planes]))
    assert merge_boxes(parts[i] for i in order) == merge_boxes(parts)


def test_runs_of_slices_may_begin_anywhere(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((9, 40, 40)))
    whole = merge_boxes([measure_box(volume, volume.box)])
    part = Box(Span(3, 8), volume.box.y, volume.box.x)
    assert merge_boxes([measure_box(volume, part)]) == whole.of(Span(3, 8))


@pytest.mark.parametrize(
    ("value", "dtype"), [(0, "uint8"), (255, "uint8"), (7, "uint16"), (0.1, "float32"), (1e30, "float32")]
)
def test_a_blank_slice_has_a_standard_deviation_of_exactly_zero(value: float, dtype: str) -> None:
    voxels = np.full((2, 41, 67), value, dtype)
    found = measured(voxels, (1, 13, 29), (2, 16, 16))
    assert found.std == (0.0, 0.0)
    assert found.mean == (float(voxels[0, 0, 0]),) * 2


def test_one_voxel_that_differs_makes_a_slice_not_blank() -> None:
    voxels = np.full((1, 40, 40), 0.1, np.float32)
    voxels[0, 39, 39] = np.nextafter(np.float32(0.1), np.float32(1))
    assert measured(voxels, (1, 16, 16), (1, 40, 40)).std[0] > 0


@pytest.mark.parametrize(("offset", "spread"), [(1e6, 1.0), (-1e6, 0.25), (1e30, 1e25), (3e38, 1e37)])
def test_a_large_offset_costs_no_accuracy(offset: float, spread: float) -> None:
    noise = np.random.default_rng(0).uniform(-spread, spread, (2, 64, 65))
    voxels = np.clip(offset + noise, -3.4e38, 3.4e38).astype(np.float32)
    assert_as_numpy(measured(voxels, (1, 17, 23), (2, 32, 32)), voxels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_finite_numbers_are_refused_by_slice(tmp_path: Path, bad: float) -> None:
    voxels = image_like((6, 40, 40), "float32")
    voxels[4, 39, 0] = bad
    volume = stored(tmp_path, voxels)
    with pytest.raises(InputError, match=r"a\.zarr holds NaN or infinite voxels in slice z=4"):
        measure_box(volume, Box(Span(2, 6), Span(8, 40), Span(0, 8)))


def test_pooled_statistics_are_those_of_all_voxels(tmp_path: Path) -> None:
    voxels = image_like((5, 30, 40), "uint16")
    volume = stored(tmp_path, voxels)
    pooled = merge_boxes([measure_box(volume, volume.box)]).pooled()
    np.testing.assert_allclose(pooled.mean, [voxels.astype(float).mean()] * 5, rtol=1e-12)
    np.testing.assert_allclose(pooled.std, [voxels.astype(float).std()] * 5, rtol=1e-12)


def test_pooling_leaves_blank_slices_marked() -> None:
    pooled = SliceStatistics(3, (10.0, 20.0, 30.0), (1.0, 0.0, 2.0)).pooled()
    assert pooled.first_z == 3
    assert pooled.std[1] == 0
    assert pooled.std[0] == pooled.std[2] == pytest.approx(np.sqrt((1 + 0 + 4 + 100 + 0 + 100) / 3))


def test_of_gives_the_statistics_of_the_slices_asked_for() -> None:
    whole = SliceStatistics(10, (0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0))
    assert whole.of(Span(11, 13)) == SliceStatistics(11, (1.0, 2.0), (5.0, 6.0))
    assert whole.of(Span(10, 14)) == whole
    assert whole.of(Span(11, 14)).of(Span(13, 14)) == whole.of(Span(13, 14))


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5), first=st.integers(0))
def test_statistics_survive_json_to_the_last_bit(values: list[float], first: int) -> None:
    before = SliceStatistics(first, tuple(values), tuple(abs(value) for value in values))
    assert SliceStatistics.from_dict(json.loads(json.dumps(asdict(before)))) == before


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"first_z": 0, "mean": [1.0]},
        {"first_z": 0, "mean": [1.0, 2.0], "std": [1.0]},
        {"first_z": None, "mean": [1.0], "std": [1.0]},
        {"first_z": 0, "mean": 1.0, "std": 1.0},
        {"first_z": 0, "mean": ["one"], "std": [1.0]},
    ],
)
def test_fields_that_are_no_statistics_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        SliceStatistics.from_dict(fields)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Volume, Span, int]:
    """A volume of odd shape in chunks or shards of them, a run of its slices, and how large a box may be."""
    shape = draw(st.tuples(*[st.integers(1, 40)] * 3))
    chunk = draw(st.tuples(*[st.integers(1, 9)] * 3))
    times = draw(st.tuples(*[st.integers(1, 3)] * 3))
    unit = tuple(size * n for size, n in zip(chunk, times, strict=True))
    start = draw(st.integers(0, shape[0] - 1))
    z = Span(start, draw(st.integers(start + 1, shape[0])))
    return Volume("unread", shape, "uint8", chunk, unit), z, draw(st.integers(1, 40**3))  # type: ignore[arg-type]


def boxes_within(limit: int, volume: Volume, z: Span) -> tuple[Box, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "MAX_VOXELS", limit)
        return statistics_boxes(volume, z)


@given(layout=layouts())
@settings(max_examples=200, deadline=None)
def test_statistics_boxes_cover_each_voxel_of_the_slices_exactly_once(layout: tuple[Volume, Span, int]) -> None:
    volume, z, limit = layout
    times = np.zeros(volume.shape, np.uint8)
    for box in boxes_within(limit, volume, z):
        times[box.within(volume.box)] += 1
    assert (times[z.start : z.stop] == 1).all()
    assert times.sum() == times[z.start : z.stop].size


@given(layout=layouts())
@settings(max_examples=200, deadline=None)
def test_statistics_boxes_cut_a_write_unit_only_where_the_slices_end(layout: tuple[Volume, Span, int]) -> None:
    volume, z, limit = layout
    for box in boxes_within(limit, volume, z):
        for span, unit, bounds in zip(box.spans, volume.write_unit, (z, volume.box.y, volume.box.x), strict=True):
            assert span.start % unit == 0 or span.start == bounds.start
            assert span.stop % unit == 0 or span.stop == bounds.stop


@given(layout=layouts())
@settings(max_examples=200, deadline=None)
def test_a_statistics_box_fits_its_limit_unless_one_write_unit_does_not(layout: tuple[Volume, Span, int]) -> None:
    volume, z, limit = layout
    assert max(box.size for box in boxes_within(limit, volume, z)) <= max(limit, int(np.prod(volume.write_unit)))


def test_a_large_volume_is_measured_in_a_few_whole_slices_at_a_time() -> None:
    volume = Volume("unread", (1000, 4000, 5000), "uint8", (1, 256, 256), (1, 256, 256))
    boxes = statistics_boxes(volume, Span(0, 1000))
    assert len(boxes) == 1000
    assert {box.shape for box in boxes} == {(1, 4000, 5000)}


def test_statistics_measured_in_the_proposed_boxes_are_those_of_whole_slices(tmp_path: Path) -> None:
    voxels = image_like((11, 50, 70))
    volume = stored(tmp_path, voxels)
    for start, stop in itertools.combinations((0, 3, 4, 11), 2):
        boxes = boxes_within(2000, volume, Span(start, stop))
        found = merge_boxes(measure_box(volume, box) for box in boxes)
        assert len(boxes) > 1
        assert found.first_z == start
        assert_as_numpy(found, voxels[start:stop])


def test_sums_over_integers_are_exact(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 2**16, (2, 301, 203), dtype=np.uint16)
    source = open_volume(bare_zarr(tmp_path / "in.zarr", voxels))
    _, moments = measure_box(source, source.box)
    for plane, found in zip(voxels, moments, strict=True):
        values = [int(value) for value in plane.flat]
        total, squares = sum(values), sum(value**2 for value in values)
        assert found.mean == total / len(values)
        assert found.squares == (squares * len(values) - total**2) / len(values)
