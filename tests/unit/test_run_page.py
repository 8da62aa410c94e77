"""What a report computes, without voxels in storage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.without_reference import radial_spectrum
from nrrn_pipeline.geometry import Box, boxes_of
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.run_page.looks import stretched
from nrrn_pipeline.run_page.made import done_part
from nrrn_pipeline.run_page.measuring import speeds
from nrrn_pipeline.run_page.showing import _slices
from nrrn_pipeline.slabs import slab_key

RNG = np.random.default_rng(0)
WHOLE = Box.parse("4:20,0:64,8:64")
SLABS = {slab_key(keep): keep for keep in boxes_of(WHOLE, (4, 32, 56))}


def test_the_spectrum_of_white_noise_is_flat() -> None:
    frequency, power = radial_spectrum(RNG.normal(3, 7, (4, 200, 260)))
    assert frequency[0] < 0.02
    assert frequency[-1] == pytest.approx(0.49, abs=0.01)
    np.testing.assert_allclose(power[2:], 1, atol=0.12)


def test_the_spectrum_of_lost_structure_rises_on_the_left_and_of_noise_left_in_falls() -> None:
    noise = RNG.normal(0, 1, (4, 128, 128))
    waves = noise + 2 * np.sin(np.arange(128) / 8)
    _, power = radial_spectrum(waves)
    assert power[0] + power[1] > 5 * power[16]
    _, power = radial_spectrum(np.diff(noise, axis=2))
    assert power[0] < 0.1 < 1 < power[-1]


def test_the_spectrum_of_nothing_is_nothing_and_small_slices_have_one_too() -> None:
    assert radial_spectrum(np.full((2, 20, 20), 4.0))[1].max() == 0
    frequency, power = radial_spectrum(RNG.normal(0, 1, (1, 5, 7)))
    assert 0 < len(frequency) == len(power) < 32


def test_a_cut_across_thick_slices_has_the_specimen_s_proportions() -> None:
    cut = RNG.integers(0, 256, (10, 40), np.uint8)
    found = stretched(cut, 2.5, 1)
    assert found.shape == (25, 40)
    assert set(map(bytes, found)) == set(map(bytes, cut)), "nothing is interpolated"
    np.testing.assert_array_equal(stretched(cut, 1, 2), np.repeat(cut, 2, axis=1))
    assert found[0].tolist() == cut[0].tolist()
    assert found[-1].tolist() == cut[-1].tolist()


@given(st.sets(st.sampled_from(sorted(SLABS)), min_size=1))
def test_what_is_shown_of_a_partial_run_is_done(done: set[str]) -> None:
    part = done_part(SLABS, done)
    for key, keep in SLABS.items():
        overlaps = all(a.start < b.stop and b.start < a.stop for a, b in zip(keep.spans, part.spans, strict=True))
        assert key in done or not overlaps


def test_the_longest_stretch_of_whole_slices_is_shown() -> None:
    assert done_part(SLABS, set(SLABS)) == WHOLE
    lacking = {key for key in SLABS if not key.startswith("z8-")}
    assert done_part(SLABS, lacking) == Box.parse("12:20,0:64,8:64")
    assert done_part(SLABS, {"z8-y0-x8"}) == Box.parse("8:12,0:32,8:64")
    with pytest.raises(InputError, match="no slab is done yet"):
        done_part(SLABS, set())


def record(finished: float, seconds: float, voxels: int = 1000) -> Record:
    return Record("z0-y0-x0", voxels, seconds, finished, "w", 0)


def test_speed_is_that_of_all_slabs_at_work_together() -> None:
    records = [record(10, 10), record(20, 10), record(20, 10)]
    seconds, speed = speeds(records, 0.5)
    np.testing.assert_allclose(speed[seconds < 9.9], 2 * 100)
    np.testing.assert_allclose(speed[seconds > 10.1], 2 * 200)


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e3), st.integers(1, 10**9)), min_size=1, max_size=20))
def test_no_voxel_is_lost_over_time(slabs: list[tuple[float, float, int]]) -> None:
    seconds, speed = speeds([record(*each) for each in slabs], 1)
    step = seconds[1] - seconds[0]
    assert float((speed * step).sum()) == pytest.approx(sum(voxels for *_, voxels in slabs), rel=1e-3)


def test_slices_are_named_by_stretches() -> None:
    assert _slices([7]) == "Slice 7"
    assert _slices([3, 7, 8, 9]) == "Slices 3, 7 to 9"
    assert _slices([1, 3, 5, 6], most=2) == "Slices 1, 3 and more, 4 in all"
