"""The noise of a volume by its signal, from noisy slices alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.noise_model import LEVELS, NoiseModel, fineness, measure_curve, spread

Floats = NDArray[np.float64]
SHAPE = (4, 192, 192)


def cells(seed: int = 0) -> Floats:
    """Slices with regions of all grey levels, and sharp membranes across them."""
    random = np.random.default_rng(seed)
    inner, walls = (gaussian_filter(random.normal(size=SHAPE), (0, 16, 16)) for _ in range(2))
    levels = 30 + 180 * np.argsort(np.argsort(inner, axis=None)).reshape(SHAPE) / inner.size
    levels[np.abs(walls) < 0.03 * walls.std()] = 20
    return levels


def white(sigma: float, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(0, sigma, SHAPE)


@pytest.mark.parametrize("sigma", [5, 10, 25, 75])
def test_white_gaussian_noise_is_of_one_strength_on_every_signal(sigma: float) -> None:
    found = measure_curve(cells() + white(sigma))
    assert len(found.signal) == len(found.sigma) == LEVELS
    np.testing.assert_allclose(found.sigma, sigma, rtol=0.15)
    np.testing.assert_allclose(found.model.sigma(np.array([40, 120, 200])), sigma, rtol=0.1)


@pytest.mark.parametrize("peak", [8.0, 30.0])
def test_counting_noise_grows_with_the_signal(peak: float) -> None:
    counts = np.random.default_rng(1).poisson(cells() / 255 * peak) / peak * 255
    model = measure_curve(counts).model
    assert model.gain == pytest.approx(255 / peak, rel=0.1)
    assert model.sigma(np.array(160.0)) == pytest.approx(np.sqrt(160 * 255 / peak), rel=0.06)


def test_both_kinds_are_told_apart() -> None:
    model = measure_curve(np.random.default_rng(1).poisson(cells() / 255 * 60) / 60 * 255 + white(20)).model
    assert model.gain == pytest.approx(255 / 60, rel=0.15)
    assert model.offset == pytest.approx(400, rel=0.2)


def test_integers_measure_as_the_grey_levels_that_they_are() -> None:
    clean = np.rint(np.clip(cells(), 60, 190)).astype(np.uint8)
    noisy = Noise(sigma=12, seed=3).added(clean, box_of(SHAPE))
    as_floats = measure_curve(noisy.astype(np.float64))
    assert measure_curve(noisy) == as_floats
    assert as_floats.model.sigma(np.array(120.0)) == pytest.approx(12, rel=0.05)


def test_no_model_gives_less_noise_than_was_found_anywhere() -> None:
    found = measure_curve(np.random.default_rng(1).poisson(cells() / 255 * 30) / 30 * 255)
    assert found.model.sigma(np.array([-1000.0]))[0] == min(found.sigma) > 0
    assert NoiseModel(-1.0, 100.0, 25.0).sigma(np.array([0, 50, 99])).tolist() == [10, 50**0.5, 5]


def test_structure_is_not_taken_for_noise() -> None:
    ringed = white(6)
    ringed[:, 60:64] += 90
    ringed[:, :, 100:103] -= 90
    assert np.median(measure_curve(ringed).sigma) == pytest.approx(6, rel=0.04)
    values = np.append(white(3).ravel()[:10_000], np.full(60, 200.0))
    assert spread(values) == pytest.approx(3, rel=0.03)
    assert values.std() > 10


def test_white_noise_is_as_fine_along_y_as_along_x() -> None:
    np.testing.assert_allclose([fineness(plane) for plane in white(9)], 1, atol=0.1)


def test_noise_that_a_scan_line_shares_is_coarse_along_it_alone() -> None:
    along_x = gaussian_filter1d(white(9), 0.7, axis=2)
    for plane in along_x:
        y, x = fineness(plane)
        assert x < 0.4 < 0.85 < y
        turned = fineness(plane.T)
        assert turned == pytest.approx((x, y))


def test_a_constant_slice_is_as_fine_as_white_noise() -> None:
    assert fineness(np.full((64, 64), 7)) == (1, 1)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (np.zeros((1, 64, 64)), "give 4096"),
        (np.zeros(SHAPE, np.uint8), "slices are flat in places"),
        (np.broadcast_to(np.arange(192.0), SHAPE), "slices are flat in places"),
    ],
)
def test_slices_without_noise_or_too_few_are_refused(slices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_curve(slices)
