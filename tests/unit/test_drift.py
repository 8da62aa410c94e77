"""Shifts between slices: found to a fraction of a voxel, or said not to be known; and what of them is undone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline.drift import LARGEST, Drift, drift_of
from tests.drifting import drifting, one_by_one

STILL = np.zeros((24, 2))


def jitter(size: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-size, size, STILL.shape)


def known(position: np.ndarray) -> Drift:
    return Drift(0, np.asarray(position, float), np.ones(len(position), bool))


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=4, max_size=8))
def test_whole_voxels_are_found_exactly(places: list[tuple[int, int]]) -> None:
    found = drift_of(one_by_one(drifting(places)))
    np.testing.assert_allclose(found.position, np.array(places) - places[0], atol=0.15)
    assert found.known.all()


@pytest.mark.parametrize(("sigma", "near"), [(0.0, 0.1), (30.0, 0.25)])
def test_fractions_of_a_voxel_are_found_in_noise_too(sigma: float, near: float) -> None:
    places = jitter(2.0)
    places[14:] += (9.0, -5.5)
    found = drift_of(one_by_one(drifting(places, sigma)))
    error = np.diff(found.position - places, axis=0)
    assert np.abs(error).max() < 2 * near
    assert np.sqrt(np.square(error).mean()) < near
    assert found.jumps == (14,)
    assert not found.aligned


def test_crops_tell_together_what_one_cannot() -> None:
    voxels = drifting(jitter(2.0), 60.0)
    alone = drift_of([plane[:64, :64]] for plane in voxels)
    together = drift_of([plane[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)] for plane in voxels)

    def error(found: Drift) -> float:
        return float(np.sqrt(np.square(np.diff(found.position - jitter(2.0), axis=0)).mean()))

    assert error(together) < error(alone)
    assert together.told


@pytest.mark.parametrize("sigma", [0.0, 30.0])
def test_an_aligned_volume_is_aligned_and_nothing_of_it_is_moved(sigma: float) -> None:
    found = drift_of(one_by_one(drifting(STILL, sigma)))
    assert found.aligned
    assert found.steps.max() < 0.5
    assert found.jumps == ()
    assert not found.moves().any()


def test_noise_without_structure_tells_nothing() -> None:
    noise = np.random.default_rng(0).normal(128, 30, (24, 128, 128))
    found = drift_of(one_by_one(noise))
    assert not found.told
    assert not found.aligned
    assert found.jumps == ()


def test_slices_that_are_blank_are_passed_over() -> None:
    places = jitter(2.0)
    voxels = drifting(places)
    voxels[[0, 7, 8, 9, 23]] = 0
    found = drift_of(one_by_one(voxels))
    assert np.flatnonzero(~found.known).tolist() == [0, 7, 8, 9, 23]
    there = found.known
    np.testing.assert_allclose(np.diff(found.position[there], axis=0), np.diff(places[there], axis=0), atol=0.4)
    assert (found.steps[[0, 1, 7, 8, 9, 10, 23]] == 0).all(), "nothing was compared there"


def test_a_jump_behind_blank_slices_is_one_jump() -> None:
    places = STILL.copy()
    places[14:] += (6, -7)
    voxels = drifting(places)
    voxels[13:15] = 0
    found = drift_of(one_by_one(voxels))
    assert found.jumps == (15,)
    assert (found.moves()[15] - found.moves()[12]).tolist() == [6, -7]


def test_a_slice_that_is_like_no_other_is_not_known_and_moves_no_neighbour() -> None:
    voxels = drifting(STILL)
    voxels[11] = np.random.default_rng(1).integers(0, 256, voxels[11].shape)
    found = drift_of(one_by_one(voxels))
    assert np.flatnonzero(~found.known).tolist() == [11]
    assert found.aligned
    assert not found.moves().any()


def test_one_comparison_that_is_wrong_is_outvoted() -> None:
    """Slice 11 holds more of slice 10's structure, shifted, than of its own."""
    voxels = drifting(STILL).astype(float)
    voxels[11] = 0.3 * voxels[11] + 0.7 * np.roll(voxels[10], 20, axis=1)
    found = drift_of(one_by_one(voxels))
    others = np.delete(found.position, 11, axis=0)
    np.testing.assert_allclose(np.diff(others, axis=0), 0, atol=0.3)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_voxels_of_any_size_drift_alike(scale: float) -> None:
    voxels = drifting(jitter(2.0), 20.0)
    found = drift_of(one_by_one(voxels.astype(np.float32) * np.float32(scale)))
    assert found.told
    np.testing.assert_allclose(found.position, drift_of(one_by_one(voxels)).position, atol=0.02)


def test_stripes_along_either_axis_are_no_structure() -> None:
    voxels = drifting(jitter(3.0)).astype(float)
    voxels[:] += 60 * np.random.default_rng(3).normal(size=(1, 1, 128))  # at the same place in all slices
    voxels[:] += 60 * np.random.default_rng(4).normal(size=(1, 128, 1))
    found = drift_of(one_by_one(voxels))
    np.testing.assert_allclose(np.diff(found.position, axis=0), np.diff(jitter(3.0), axis=0), atol=0.3)


def test_jitter_is_undone_and_slow_drift_kept_unless_it_is_to_be_undone_too() -> None:
    slow = np.outer(np.arange(400), (0.1, -0.05)) + 6 * np.sin(np.arange(400) / 150)[:, None]
    fast = np.random.default_rng(0).integers(-3, 4, slow.shape)
    drift = known(slow + fast)
    assert np.abs(drift.moves() - fast).max() <= 1
    assert np.abs(drift.moves(undo_trend=True) - (slow + fast)).max() <= 1.5
    assert drift.slope < 0.3


def test_a_jump_is_undone_for_good_and_a_slice_that_alone_is_off_is_no_jump() -> None:
    position = np.random.default_rng(0).uniform(-0.2, 0.2, (300, 2))
    position[120:] += (12, -7)
    position[200] += (0, 9)
    drift = known(position)
    assert drift.jumps == (120,)
    moves = drift.moves()
    assert (moves[130:200] - moves[50:110].mean(axis=0)).mean(axis=0) == pytest.approx((12, -7), abs=0.2)
    assert (moves[200] - moves[199]).tolist() == [0, 9]
    assert (moves[:100] == moves[0]).all()


@given(st.integers(0, 1000), st.floats(0, 3), st.integers(2, 150), st.booleans())
def test_whatever_the_drift_neighbours_are_no_farther_apart_than_whole_voxels_leave_them(
    seed: int, size: float, slices: int, undo_trend: bool
) -> None:
    """By 1 voxel along each axis; and no slice is farther from where it belongs than 1.5."""
    drift = known(np.random.default_rng(seed).normal(0, size, (slices, 2)))
    belongs = drift.position if undo_trend else drift.position - drift.trend
    left = belongs - drift.moves(undo_trend)
    assert np.abs(np.diff(left, axis=0)).max() <= 1.0 + 1e-9
    assert np.abs(left).max() <= 1.5
    assert np.hypot(1, 1) < LARGEST


def test_two_slices_are_enough_and_one_tells_nothing() -> None:
    pair = drift_of(one_by_one(drifting([(0, 0), (4, -3)])))
    assert pair.moves().tolist() == [[0, 0], [4, -3]]
    assert pair.worst_z == 1
    assert not drift_of(one_by_one(drifting([(0, 0)]))).told
