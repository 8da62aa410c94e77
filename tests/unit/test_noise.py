from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest, norm, poisson

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, box_of, boxes_of
from nrrn_pipeline.noise import Noise, poisson_counts
from tests.support import image_like

SHAPE = (3, 150, 140)  # four cells a slice
TOP = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
KINDS = {"gaussian": Noise(sigma=0.2), "poisson": Noise(peak=5.0), "both": Noise(sigma=20.0, peak=30.0)}


def flat(level: float, dtype: str, kind: Noise, shape: tuple[int, int, int] = (4, 200, 200)) -> NDArray[np.float64]:
    """The noisy voxels of a volume of one grey level."""
    return kind.added(np.full(shape, level, dtype), box_of(shape)).astype(np.float64)


def assert_moments(voxels: NDArray[np.float64], mean: float, variance: float, kurtosis: float = 3.0) -> None:
    """Those of a sample, to five of their own standard errors."""
    n = voxels.size
    assert voxels.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert voxels.var() == pytest.approx(variance, abs=5 * variance * math.sqrt((kurtosis - 1) / n))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    starts = [draw(st.integers(0, length - 1)) for length in SHAPE]
    return Box(*(Span(a, draw(st.integers(a + 1, length))) for a, length in zip(starts, SHAPE, strict=True)))


@given(box=boxes(), dtype=st.sampled_from(sorted(TOP)), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**40))
@settings(max_examples=40)
def test_noise_of_a_part_equals_the_part_of_the_noise_of_the_whole(box: Box, dtype: str, kind: str, seed: int) -> None:
    how = Noise(KINDS[kind].sigma, KINDS[kind].peak, seed)
    voxels = image_like(SHAPE, dtype)
    whole = box_of(SHAPE)
    part = how.added(voxels[box.within(whole)], box)
    np.testing.assert_array_equal(part, how.added(voxels, whole)[box.within(whole)])


@pytest.mark.parametrize("step", [(1, 128, 128), (2, 33, 140), (3, 150, 7)])
def test_slabs_of_any_size_put_together_are_the_noise_of_the_whole(step: tuple[int, int, int]) -> None:
    voxels, whole, how = image_like(SHAPE), box_of(SHAPE), KINDS["both"]
    together = np.zeros_like(voxels)
    for box in boxes_of(whole, step):
        together[box.within(whole)] = how.added(voxels[box.within(whole)], box)
    np.testing.assert_array_equal(together, how.added(voxels, whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOP)
def test_noise_keeps_shape_and_dtype_and_leaves_its_input_as_it_was(dtype: str, kind: str) -> None:
    voxels = image_like((2, 30, 70), dtype)
    before = voxels.copy()
    noisy = KINDS[kind].added(voxels, box_of(voxels.shape))
    assert (noisy.shape, noisy.dtype) == (voxels.shape, voxels.dtype)
    np.testing.assert_array_equal(voxels, before)


@pytest.mark.parametrize(("dtype", "level", "sigma"), [("uint8", 128, 15.0), ("uint16", 30000, 75.0)])
def test_gaussian_noise_has_its_mean_and_its_variance_and_that_of_rounding(
    dtype: str, level: int, sigma: float
) -> None:
    assert_moments(flat(level, dtype, Noise(sigma)), level, sigma**2 + 1 / 12)


def test_gaussian_noise_of_floats_is_normal_and_not_clipped() -> None:
    noisy = flat(0.5, "float32", Noise(0.4))
    assert_moments(noisy, 0.5, 0.4**2)
    assert kstest(noisy.ravel(), norm(0.5, 0.4).cdf).pvalue > 1e-4
    assert noisy.min() < 0
    assert noisy.max() > 1


@pytest.mark.parametrize("peak", [1.0, 30.0, 50.0])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_poisson_noise_has_as_its_mean_the_voxel_and_as_its_variance_the_rate(dtype: str, peak: float) -> None:
    top = TOP[dtype]
    level = 0.25 if dtype == "float32" else 16384
    rate, count = level / top * peak, top / peak  # grey levels of one count
    noisy = flat(level, dtype, Noise(peak=peak), (1, 200, 200))
    noisy = np.minimum(noisy, top) if dtype == "float32" else noisy  # as integers are clipped
    shown = np.minimum(np.arange(200) * count, top)
    shown = shown if dtype == "float32" else np.rint(shown)
    chance = poisson.pmf(np.arange(200), rate)
    mean = float(chance @ shown)
    variance = float(chance @ (shown - mean) ** 2)
    assert_moments(noisy, mean, variance, float(chance @ (shown - mean) ** 4) / variance**2)


def test_unclipped_poisson_noise_is_unbiased() -> None:
    peak, level = 8.0, 0.75
    rate = level * peak
    assert_moments(flat(level, "float32", Noise(peak=peak)), level, rate / peak**2, 3 + 1 / rate)


def test_poisson_counts_are_hand_worked_values() -> None:
    """At rate 1 the cumulative probabilities are 0.368, 0.736, 0.920, 0.981; at rate 0 they are all 1."""
    uniform = np.array([0.0, 0.367, 0.369, 0.735, 0.737, 0.919, 0.921, 0.980])
    assert poisson_counts(np.ones(8), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert poisson_counts(np.zeros(8), uniform).tolist() == [0] * 8


@pytest.mark.parametrize("largest", [0.1, 1.0, 50.0, 700.0, 2000.0])
def test_poisson_counts_are_the_inverse_of_the_cumulative_distribution(largest: float) -> None:
    rng = np.random.default_rng(0)
    rates, uniform = largest * rng.random(5000), rng.random(5000)
    np.testing.assert_array_equal(poisson_counts(rates, uniform), poisson.ppf(uniform, rates))


@pytest.mark.parametrize("rate", [0.0, 1e-300, 0.1, 50.0, 700.0, 701.0, 1e6])
def test_poisson_counts_are_bounded_at_both_ends(rate: float) -> None:
    lowest, highest = poisson_counts(np.full(2, rate), np.array([0.0, np.nextafter(1, 0)]))
    assert lowest == 0
    assert math.floor(rate) <= highest <= rate + 10 * math.sqrt(rate) + 20


def test_black_has_no_counts_and_below_black_neither() -> None:
    assert not flat(0, "uint8", Noise(peak=3.0)).any()
    assert not flat(-0.5, "float32", Noise(peak=3.0), (1, 20, 20)).any()


def test_poisson_comes_before_gaussian() -> None:
    shape = (1, 100, 100)
    voxels = np.full(shape, 0.5, np.float32)
    counted = Noise(peak=4.0, seed=3).added(voxels, box_of(shape))
    both = Noise(0.1, 4.0, seed=3).added(voxels, box_of(shape))
    gaussian = Noise(0.1, seed=3).added(voxels, box_of(shape)) - voxels
    np.testing.assert_allclose(both, counted + gaussian, atol=1e-6)
    assert abs(np.corrcoef(counted.ravel(), gaussian.ravel())[0, 1]) < 5 / math.sqrt(voxels.size)


@pytest.mark.parametrize(("level", "dtype"), [(0, "uint8"), (255, "uint8"), (0, "uint16"), (65535, "uint16")])
def test_noise_beyond_the_range_of_integers_is_clipped_and_never_wraps(level: int, dtype: str) -> None:
    noisy = flat(level, dtype, Noise(TOP[dtype] / 10), (1, 100, 100))
    at_the_end = (noisy == level).mean()
    assert at_the_end == pytest.approx(0.5, abs=0.05)
    assert np.abs(noisy - level).max() < 0.6 * TOP[dtype]


def test_noise_of_other_seeds_slices_and_cells_is_unlike() -> None:
    shape = (2, 256, 256)
    one, other = (flat(0.5, "float32", Noise(1.0, seed=seed), shape) for seed in (0, 1))
    pieces = [one[0, :128, :128], one[0, :128, 128:], one[0, 128:, :128], one[1, :128, :128], other[0, :128, :128]]
    likeness = np.corrcoef([piece.ravel() for piece in pieces]) - np.eye(len(pieces))
    assert np.abs(likeness).max() < 5 / 128


def test_noise_is_the_same_in_years_to_come() -> None:
    """Pinned: should NumPy's streams ever change, this says so."""
    voxels = np.full((1, 1, 8), 100, np.uint8)
    box = Box(Span(7, 8), Span(300, 301), Span(124, 132))
    assert Noise(25.0, 30.0, seed=5).added(voxels, box).tolist() == [[[111, 72, 0, 116, 69, 72, 123, 69]]]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"sigma": -1.0}, "sigma -1.0 is not possible: use 0 to 65535"),
        ({"sigma": math.nan}, "sigma nan is not possible"),
        ({"sigma": math.inf}, "sigma inf is not possible"),
        ({"peak": 0.0}, "peak 0.0 is not possible: use 0.001 to 100000 counts"),
        ({"peak": -3.0, "sigma": 1.0}, "peak -3.0 is not possible"),
        ({"peak": math.nan}, "peak nan is not possible"),
        ({"peak": math.inf}, "peak inf is not possible"),
        ({}, "no noise was asked for: give a sigma above 0, a peak, or both"),
        ({"sigma": 1.0, "seed": -1}, "seed -1 is not possible: use 0 or more"),
    ],
)
def test_noise_that_cannot_be_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Noise(**given_)


def test_voxels_that_do_not_fit_their_box_are_refused() -> None:
    with pytest.raises(ValueError, match=r"voxels \(2, 3, 4\) do not fit box 0:2,0:3,0:5"):
        Noise(1.0).added(np.zeros((2, 3, 4), np.uint8), box_of((2, 3, 5)))
