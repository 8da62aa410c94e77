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
from nrrn_pipeline.noise_details import LEVELS, measure_curve, neighbour_noise, slice_sigma, spread
from nrrn_pipeline.noise_model import NoiseModel

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


@pytest.mark.parametrize("sigma", [25, 50, 75])
def test_noise_that_is_cut_off_at_black_and_white_is_known_as_it_was(sigma: float) -> None:
    noisy = Noise(sigma=sigma, seed=3).added(np.rint(cells()).astype(np.uint8), box_of(SHAPE))
    model = measure_curve(noisy).model
    assert (model.black, model.white, model.counts) == (0, 255, False)
    np.testing.assert_allclose(model.sigma(np.array([40, 120, 200])), sigma, rtol=0.06)


@pytest.mark.parametrize("sigma", [10, 20, 40, 75])
@pytest.mark.parametrize(("contrast", "offset"), [(1.3, 0), (2, 0), (1, -50), (1, -70)])
def test_signals_beyond_black_and_white_do_not_count(contrast: float, offset: float, sigma: float) -> None:
    noisy = np.rint(contrast * cells() + offset + white(sigma))
    model = measure_curve(np.clip(noisy, 0, 255).astype(np.uint8)).model
    assert (model.black, model.white) != (None, None)
    np.testing.assert_allclose(model.sigma(np.array([1, 60, 120, 200, 250])), sigma, rtol=0.25)


def test_noise_of_which_next_to_nothing_is_left_is_refused() -> None:
    with pytest.raises(InputError, match="nearly all voxels are cut off at black or white"):
        measure_curve(np.clip(np.rint(cells() + 240 + white(10)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("peak", [8.0, 30.0])
def test_a_frame_does_not_hide_counts(peak: float) -> None:
    noisy = Noise(peak=peak, seed=1).added(np.clip(cells(), 100, 250).astype(np.uint8), box_of(SHAPE))
    noisy[:, :20] = 0
    model = measure_curve(noisy).model
    assert model.counts
    assert (model.gain, model.black, model.white) == (pytest.approx(255 / peak, rel=5e-3), None, 255)


@pytest.mark.parametrize("levels", [np.arange(-9, 0), np.arange(-4, 5), 40 + np.arange(9)])
def test_levels_that_are_no_numbers_of_anything_are_no_counts(levels: NDArray[np.int_]) -> None:
    noisy = np.random.default_rng(1).choice(levels * 10.0, SHAPE)
    assert not measure_curve(noisy).model.counts


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_the_ends_of_few_voxels_are_no_cuts(sigma: float) -> None:
    for seed in range(20):
        model = measure_curve(np.rint(120 + white(sigma, seed)[:1, :64, :160]).astype(np.uint8)).model
        assert (model.black, model.white) == (None, None)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float64"])
@pytest.mark.parametrize("peak", [1.0, 2.0, 8.0, 30.0, 50.0])
def test_counts_are_known_as_such_by_their_levels(peak: float, dtype: str) -> None:
    top = {"uint8": 255, "uint16": 65535, "float64": 1.0}[dtype]
    noisy = Noise(peak=peak, seed=3).added((cells() / 255 * top).astype(dtype), box_of(SHAPE))
    model = measure_curve(noisy * 0.7 if dtype == "float64" else noisy).model
    top *= 0.7 if dtype == "float64" else 1
    assert model.counts
    assert model.gain == pytest.approx(top / peak, rel=5e-3)
    assert model.offset == 0
    assert model.black is None
    assert (model.white == top) == (dtype != "float64")


@pytest.mark.parametrize("levels", [8, 16])
def test_coarse_levels_alone_are_no_counts(levels: int) -> None:
    coarse = np.rint((cells() + white(30)) / 256 * levels) * (256 // levels)
    assert not measure_curve(coarse).model.counts


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_noise_that_ends_by_itself_is_not_cut_off(dtype: str) -> None:
    noisy = np.clip(cells(), 60, 190) + white(9)
    model = measure_curve(noisy.astype(dtype)).model
    assert (model.black, model.white) == (None, None)


@pytest.mark.parametrize(
    "model",
    [
        NoiseModel(0.0, 1600.0, 1.0, black=0.0, white=255.0),
        NoiseModel(2.0, 400.0, 1.0, white=255.0),
        NoiseModel(0.0, 900.0, 1.0, black=30.0),
        NoiseModel(255 / 8, 0.0, 1.0, counts=True, white=255.0),
        NoiseModel(255.0, 0.0, 1.0, counts=True, white=255.0),
        NoiseModel(12.0, 0.0, 1.0, counts=True),
        NoiseModel(1.0, 9.0, 1.0),
    ],
    ids=str,
)
def test_what_a_camera_shows_is_what_the_model_says(model: NoiseModel) -> None:
    random, signals = np.random.default_rng(2), np.array([5.0, 60.0, 128.0, 200.0, 250.0])
    means, spreads = model.as_seen(signals)
    for signal, mean, spread_ in zip(signals, means, spreads, strict=True):
        drawn = (
            random.poisson(signal / model.gain, 400_000) * model.gain
            if model.counts
            else random.normal(signal, model.sigma(np.array(signal)), 400_000)
        )
        if model.black is not None or model.white is not None:
            drawn = np.clip(drawn, model.black, model.white)
        assert drawn.mean() == pytest.approx(mean, abs=0.5)
        assert drawn.std() == pytest.approx(spread_, rel=0.02)


def test_the_signal_is_that_before_the_cut() -> None:
    noisy = Noise(sigma=60, seed=3).added(np.full(SHAPE, 220, np.uint8), box_of(SHAPE))
    assert noisy.mean() < 210
    found = NoiseModel(0.0, 3600.0, 1.0, black=0.0, white=255.0).signal_in(noisy)
    assert found.shape == SHAPE
    assert found.mean() == pytest.approx(220, abs=2)
    np.testing.assert_allclose(NoiseModel(0.0, 3600.0, 1.0).signal_in(noisy).mean(), noisy.mean(), rtol=1e-3)


def test_no_model_gives_less_noise_than_was_found_anywhere() -> None:
    found = measure_curve(np.random.default_rng(1).poisson(cells() / 255 * 30) / 30 * 255 + white(1))
    assert found.model.sigma(np.array([-1000.0]))[0] == pytest.approx(min(found.sigma), rel=1e-6)
    assert NoiseModel(-1.0, 100.0, 25.0).sigma(np.array([0, 50, 99])).tolist() == [10, 50**0.5, 5]


def test_structure_is_not_taken_for_noise() -> None:
    ringed = white(6)
    ringed[:, 60:64] += 90
    ringed[:, :, 100:103] -= 90
    assert np.median(measure_curve(ringed).sigma) == pytest.approx(6, rel=0.04)
    values = np.append(white(3).ravel()[:10_000], np.full(60, 200.0))
    assert spread(values) == pytest.approx(3, rel=0.03)
    assert values.std() > 10


@pytest.mark.parametrize("sigma", [3, 10, 30])
def test_white_noise_is_shared_by_no_neighbours_whatever_lies_under_it(sigma: float) -> None:
    for slices in (white(sigma), cells() + white(sigma)):
        np.testing.assert_allclose(np.median([neighbour_noise(plane) for plane in slices], axis=0), 0, atol=0.1)


@pytest.mark.parametrize("share", [-0.3, 0.3, 0.6])
def test_what_neighbours_along_a_line_share_is_found_along_it_alone(share: float) -> None:
    noise = white(9)
    along_x = noise + share * np.roll(noise, 1, axis=2)  # correlation with the next voxel: share / (1 + share^2)
    for plane in along_x:
        y, x = neighbour_noise(plane)
        assert x == pytest.approx(share / (1 + share**2), abs=0.05)
        assert abs(y) < 0.05
        assert neighbour_noise(plane.T) == pytest.approx((x, y))


def test_noise_that_is_blurred_along_scan_lines_is_shared() -> None:
    blurred = cells() + gaussian_filter1d(white(20), 0.7, axis=2)
    y, x = np.median([neighbour_noise(plane) for plane in blurred], axis=0)
    assert abs(y) < 0.06
    assert x > 0.4


@pytest.mark.parametrize("frame", [8, 60, 120])
def test_a_frame_without_image_changes_nothing(frame: int) -> None:
    slices = np.rint(120 + white(10))
    slices[:, :frame] = 0
    np.testing.assert_allclose(measure_curve(slices).sigma, 10, rtol=0.15)
    np.testing.assert_allclose([slice_sigma(plane) for plane in slices], 10, rtol=0.08)
    np.testing.assert_allclose(np.median([neighbour_noise(plane) for plane in slices], axis=0), 0, atol=0.06)


@pytest.mark.parametrize("value", [0, 255])
def test_a_constant_slice_has_no_noise_that_could_be_measured(value: int) -> None:
    flat = np.full((64, 64), value, np.uint8)
    assert (slice_sigma(flat), neighbour_noise(flat)) == (0, (0, 0))


@pytest.mark.parametrize("unit", [1e-20, 1e-3, 1e12])
def test_any_unit_will_do(unit: float) -> None:
    slices = np.random.default_rng(1).poisson(cells() / 255 * 60) / 60 * 255 + white(20)
    one, other = measure_curve(slices).model, measure_curve(slices * unit).model
    assert other.gain == pytest.approx(one.gain * unit, rel=1e-6)
    assert other.offset == pytest.approx(one.offset * unit**2, rel=1e-6)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (np.zeros((1, 64, 64)), "give 4096"),
        (np.zeros(SHAPE, np.uint8), "slices of 0 smooth voxels: give 4096"),
        (np.broadcast_to(np.arange(192.0), SHAPE), "slices are flat in places"),
    ],
)
def test_slices_without_noise_or_too_few_are_refused(slices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_curve(slices)
