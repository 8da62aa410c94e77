from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.evaluation.odd_slices import BLANK, BRIGHTNESS, CONTRAST, STEP, odd_slices

SLICES = 60


def course(seed: int = 0) -> tuple[list[float], list[float]]:
    """Means that drift, and contrasts, of slices of one specimen."""
    rng = np.random.default_rng(seed)
    mean = 120 + np.cumsum(rng.normal(0, 0.4, SLICES)) + 0.1 * np.arange(SLICES)
    return mean.tolist(), (35 + rng.normal(0, 0.3, SLICES)).tolist()


@given(st.integers(0, 2**32 - 1))
def test_a_specimen_that_drifts_has_no_odd_slice(seed: int) -> None:
    assert odd_slices(*course(seed)) == {}


@given(st.integers(0, SLICES - 1), st.sampled_from([-30.0, -12.0, 12.0, 30.0]), st.floats(0.01, 100))
def test_a_slice_that_charges_is_named_wherever_it_is_and_in_whatever_grey_levels(
    z: int, by: float, gain: float
) -> None:
    mean, std = course()
    mean[z] += by
    assert odd_slices([gain * each for each in mean], [gain * each for each in std]) == {BRIGHTNESS: [z]}


@given(st.integers(0, SLICES - 1), st.sampled_from([0.5, 0.8, 1.25, 2.0]))
def test_a_slice_of_other_contrast_is_named(z: int, by: float) -> None:
    mean, std = course()
    std[z] *= by
    assert odd_slices(mean, std) == {CONTRAST: [z]}


def test_blank_slices_are_named_and_their_neighbours_are_not() -> None:
    mean, std = course()
    for z in (0, 20, 21, 59):
        mean[z] = std[z] = 0.0
    assert odd_slices(mean, std) == {BLANK: [0, 20, 21, 59]}


def test_of_a_step_for_good_the_first_slice_after_it_is_named() -> None:
    mean, std = course()
    mean[30:] = [each + 25 for each in mean[30:]]
    assert odd_slices(mean, std) == {STEP: [30]}


def test_all_kinds_are_told_apart() -> None:
    mean, std = course()
    mean[10] = std[10] = 0.0
    mean[20] += 20
    std[40] *= 1.5
    assert odd_slices(mean, std) == {BLANK: [10], BRIGHTNESS: [20], CONTRAST: [40]}


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_few_slices_are_not_odd(slices: int) -> None:
    assert odd_slices([100.0] * slices, [10.0] * slices) == {}
    assert odd_slices([0.0] * slices, [0.0] * slices) == {BLANK: [*range(slices)]}
