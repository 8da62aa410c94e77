from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.without_reference import (
    autocorrelation,
    brightness_steps,
    low_frequency_share,
    neighbour_correlation,
    noise_sigma,
    seam_energy,
    whiteness,
)
from tests.support import image_like

Floats = NDArray[np.float64]


def white(shape: tuple[int, int, int] = (4, 128, 128), sigma: float = 9.0, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, sigma, shape)


def blurred(residual: Floats) -> Floats:
    """Each voxel the mean of itself and the one after it in x, around the end."""
    return (residual + np.roll(residual, 1, axis=2)) / 2


def waves(period_y: float, period_x: float, side: int = 64) -> Floats:
    """Two slices of a plane wave that fits them a whole number of times."""
    y, x = np.indices((side, side))
    return np.stack([np.cos(2 * np.pi * (y / period_y + x / period_x))] * 2)


# --- noise


def test_noise_sigma_is_that_of_white_noise_on_smooth_structure() -> None:
    y, x = np.indices((128, 128))
    smooth = 100 + 40 * np.sin(y / 9) + 30 * np.cos(x / 7)
    sigmas = np.array([4.0, 9.0, 20.0])
    found = noise_sigma(smooth + sigmas[:, None, None] * white((3, 128, 128), 1.0))
    np.testing.assert_allclose(found, sigmas, rtol=0.05)


def test_noise_sigma_of_rounded_voxels_is_in_grey_levels() -> None:
    volume = np.rint(100 + white()).astype(np.uint8)
    np.testing.assert_allclose(noise_sigma(volume), 9, rtol=0.05)


@pytest.mark.parametrize("value", [0, 7])
def test_a_slice_without_details_has_no_noise(value: int) -> None:
    volume = white((3, 32, 32))
    volume[1] = value
    found = noise_sigma(volume)
    assert found[1] == pytest.approx(0, abs=1e-9)
    assert (found[[0, 2]] > 7).all()


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(InputError, match=r"needs PyWavelets: pip install nrrn-pipeline\[evaluation\]"):
        noise_sigma(white())


# --- the residual


def test_white_noise_correlates_with_itself_alone() -> None:
    found = autocorrelation(white(), lag=8)
    assert found.shape == (17, 17)
    assert found[8, 8] == 1
    assert whiteness(autocorrelation(white())) < 5 / math.sqrt(4 * 128**2)


def test_autocorrelation_of_a_blurred_residual_is_that_of_the_blur() -> None:
    found = autocorrelation(blurred(white()), lag=2)
    expected = np.zeros((5, 5))
    expected[2, 1:4] = 0.5, 1, 0.5
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert whiteness(autocorrelation(blurred(white()))) == pytest.approx(0.5, abs=0.02)


def test_what_correlates_negatively_is_not_white() -> None:
    sharpened = white() - np.roll(white(), 1, axis=2)
    assert whiteness(autocorrelation(sharpened)) == pytest.approx(0.5, abs=0.02)


def test_autocorrelation_is_that_of_the_definition() -> None:
    residual = np.random.default_rng(0).normal(3, 1, (2, 7, 9))
    centred = residual - residual.mean((1, 2), keepdims=True)
    found = autocorrelation(residual, lag=3)
    for dy, dx in ((0, 1), (2, 0), (1, 3), (3, 3)):
        mean = (centred[:, dy:, dx:] * centred[:, : 7 - dy, : 9 - dx]).mean()
        assert found[3 + dy, 3 + dx] == pytest.approx(mean / np.square(centred).mean())
        assert found[3 - dy, 3 - dx] == pytest.approx(found[3 + dy, 3 + dx])
    mirrored = (centred[:, 2:, :-1] * centred[:, :-2, 1:]).mean() / np.square(centred).mean()
    assert found[3 + 2, 3 - 1] == pytest.approx(mirrored)


def test_a_checkerboard_correlates_fully_at_every_lag() -> None:
    board = np.where(np.indices((16, 16)).sum(0) % 2, 1.0, -1.0)
    signs = np.where(np.indices((7, 7)).sum(0) % 2, -1.0, 1.0)
    np.testing.assert_allclose(autocorrelation(np.stack([board, board]), lag=3), signs, atol=1e-12)


def test_brightness_of_slices_is_no_correlation_within_them() -> None:
    offsets = 100.0 * np.arange(4)[:, None, None]
    np.testing.assert_allclose(autocorrelation(white() + offsets), autocorrelation(white()), atol=1e-9)


def test_slices_not_larger_than_the_lag_are_refused() -> None:
    assert autocorrelation(white((2, 9, 9)), lag=8).shape == (17, 17)
    with pytest.raises(InputError, match="at least 9 voxels"):
        autocorrelation(white((2, 8, 20)), lag=8)


def test_neighbour_correlation_is_pearsons_averaged_over_pairs() -> None:
    first, second = white((2, 128, 128))
    assert neighbour_correlation(np.stack([first, 3 * first + 50])) == pytest.approx(1)
    assert neighbour_correlation(np.stack([first, -first, -first])) == pytest.approx(0)
    expected = np.corrcoef(first.ravel(), (first + second).ravel())[0, 1]
    assert neighbour_correlation(np.stack([first, first + second])) == pytest.approx(expected)
    assert abs(neighbour_correlation(np.stack([first, second]))) < 0.03


def test_a_pair_with_a_constant_residual_does_not_correlate() -> None:
    first = white((1, 32, 32))[0]
    assert neighbour_correlation(np.stack([first, first, np.full_like(first, 0.1)])) == pytest.approx(0.5)


def test_neighbours_need_two_slices() -> None:
    with pytest.raises(InputError, match="at least 2"):
        neighbour_correlation(white((1, 32, 32)))


def test_white_noise_has_the_disc_s_share_at_low_frequencies() -> None:
    assert low_frequency_share(white()) == pytest.approx(math.pi * 0.2**2, rel=0.05)
    assert low_frequency_share(white(), below=0.4) == pytest.approx(math.pi * 0.4**2, rel=0.05)


@pytest.mark.parametrize(
    ("residual", "share"),
    [
        (waves(8, math.inf), 1),
        (waves(math.inf, 4), 0),
        (waves(8, 8), 1),  # 0.177 cycles a voxel
        (waves(16 / 3, 16 / 3), 0),  # 0.265, though 0.1875 along y and along x
        (waves(8, math.inf) + waves(math.inf, 4), 0.5),
        (3 * waves(8, math.inf) + waves(math.inf, 4) + 100, 0.9),
    ],
)
def test_low_frequency_share_is_of_power_by_radial_frequency(residual: Floats, share: float) -> None:
    assert low_frequency_share(residual) == pytest.approx(share, abs=1e-9)


def test_structure_in_the_residual_raises_its_low_frequency_share_and_whiteness() -> None:
    lost = 5 * waves(16, 16, 128)
    noise = white((2, 128, 128))
    assert low_frequency_share(noise + lost) > low_frequency_share(noise) + 0.1
    assert whiteness(autocorrelation(noise + lost)) > 0.1


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_residual_measures_0(value: float) -> None:
    residual = np.full((3, 17, 19), value)
    assert not autocorrelation(residual).any()
    assert whiteness(autocorrelation(residual)) == neighbour_correlation(residual) == low_frequency_share(residual) == 0


# --- brightness and seams


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_brightness_steps_are_those_planted(dtype: str) -> None:
    volume = np.stack([image_like((1, 32, 32))[0] % 100] * 4).astype(dtype)
    volume[2] += 20
    volume[3] += 13
    assert brightness_steps(volume) == pytest.approx([0, 20, 7])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_seam_energy_of_a_planted_seam_is_that_worked_by_hand(dtype: str) -> None:
    y, x = np.indices((12, 16))
    plane = y + x + 4 * (y >= 6) + 2 * (x >= 8)  # steps of 1, but 5 across y = 6 and 3 across x = 8
    volume = np.stack([plane, 200 - plane]).astype(dtype)
    assert seam_energy(volume, [6], []) == pytest.approx(5)
    assert seam_energy(volume, [], [8]) == pytest.approx(3)
    assert seam_energy(volume, [6], [8]) == pytest.approx((5 * 16 + 3 * 12) / (16 + 12))
    assert seam_energy(volume, [3], []) == pytest.approx(1 / ((9 * 1 + 5) / 10))


def test_a_ramp_has_no_seams_however_steep_along_one_axis() -> None:
    y, x = np.indices((32, 32))
    assert seam_energy(np.stack([7 * y + x]), [8, 16, 24], [16]) == pytest.approx(1)


def test_seams_of_noise_show_once_tiles_differ_in_brightness() -> None:
    volume = white((2, 128, 128), 1.0)
    assert seam_energy(volume, [64], [64]) == pytest.approx(1, abs=0.15)
    volume[:, 64:] += 3
    assert seam_energy(volume, [64], []) > 2
    assert seam_energy(volume, [], [64]) == pytest.approx(1, abs=0.15)


def test_borders_at_the_ends_given_twice_or_outside_are_ignored() -> None:
    volume = image_like((2, 32, 32))
    assert seam_energy(volume, [-5, 0, 16, 16, 32, 99], [0, 32]) == seam_energy(volume, [16], [])


def test_seams_of_flat_tiles_are_infinite_and_a_flat_volume_has_none() -> None:
    volume = np.zeros((1, 8, 8))
    assert seam_energy(volume, [4], [4]) == 1
    volume[:, 4:] = 1
    assert seam_energy(volume, [4], []) == math.inf


def test_borders_outside_all_slices_or_between_all_voxels_are_refused() -> None:
    with pytest.raises(InputError, match="no tile border lies inside"):
        seam_energy(image_like((2, 32, 32)), [0, 32], [64])
    with pytest.raises(InputError, match="between all 32 voxels of axis x"):
        seam_energy(image_like((2, 32, 32)), [], range(32))


# --- all of them


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_perfect_denoising_leaves_a_white_independent_residual(dtype: str) -> None:
    y, x = np.indices((128, 128))
    clean = np.stack([np.rint(120 + 40 * np.sin(y / 9 + z / 3) + 30 * np.cos(x / 7)) for z in range(4)])
    clean[2:] += 10
    noisy = np.rint(clean + white()).astype(dtype)
    residual = np.subtract(noisy, clean.astype(dtype), dtype=np.float32)
    assert noise_sigma(noisy).mean() == pytest.approx(9, rel=0.05)
    assert noise_sigma(clean.astype(dtype)).mean() < 1
    assert whiteness(autocorrelation(residual)) < 0.03
    assert abs(neighbour_correlation(residual)) < 0.02
    assert low_frequency_share(residual) == pytest.approx(0.126, abs=0.01)
    np.testing.assert_allclose(brightness_steps(noisy), brightness_steps(clean), atol=0.3)


def test_too_much_smoothing_shows_in_every_measure_of_the_residual() -> None:
    residual = 20 * waves(16, 16, 128) + white((2, 128, 128))
    assert whiteness(autocorrelation(residual)) > 0.5
    assert neighbour_correlation(residual) > 0.5
    assert low_frequency_share(residual) > 0.5


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_unsigned_volumes_measure_as_floats_of_the_same_grey_levels(dtype: str) -> None:
    volume = image_like((3, 32, 32), dtype)
    as_floats = volume.astype(np.float64)
    np.testing.assert_allclose(noise_sigma(volume), noise_sigma(as_floats))
    np.testing.assert_allclose(brightness_steps(volume), brightness_steps(as_floats))
