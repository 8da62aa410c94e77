"""Two noisy images from one: of the same clean slice, and neither tells of the other's noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.training.recorruption import recorrupted

SHAPE = (8, 192, 192)
NORMAL = NoiseModel(0.0, 900.0, 1.0)


def counting(peak: float) -> NoiseModel:
    return NoiseModel(255 / peak, 0.0, 1.0, counts=True, white=255.0)


def halves(dark: float = 90, bright: float = 170) -> NDArray[np.uint8]:
    """Two clean levels side by side."""
    clean = np.full(SHAPE, dark, np.uint8)
    clean[..., SHAPE[2] // 2 :] = bright
    return clean


def triplets_of(noisy: NDArray[Any]) -> NDArray[Any]:
    """(n, y, x) slices of one signal -> (n, 3, y, x), each between two others."""
    return np.stack([np.roll(noisy, 1, axis=0), noisy, np.roll(noisy, -1, axis=0)], axis=1)


def random() -> np.random.Generator:
    return np.random.default_rng(5)


def halves_of(slices: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Away from the edge between them, where the signal is known less well."""
    return slices[..., 8 : SHAPE[2] // 2 - 8], slices[..., SHAPE[2] // 2 + 8 : -8]


def noise_of(noise: Noise, model: NoiseModel, dark: float = 90, bright: float = 170) -> list[tuple[float, ...]]:
    """On each half: mean and variance of the noise of what is seen and of what is asked for, and their correlation."""
    clean = halves(dark, bright)
    seen, asked = recorrupted(triplets_of(noise.added(clean, box_of(SHAPE))), model, random())
    found = []
    for level, left, right in zip((dark, bright), halves_of(seen), halves_of(asked), strict=True):
        together = float(np.corrcoef(left.ravel(), right.ravel())[0, 1])
        found.append((left.mean() - level, left.var(), right.mean() - level, right.var(), together))
    return found


def test_normal_noise_becomes_two_that_are_independent() -> None:
    for seen_mean, seen_var, asked_mean, asked_var, together in noise_of(Noise(sigma=30, seed=1), NORMAL):
        assert abs(seen_mean) < 0.5
        assert abs(asked_mean) < 0.8
        assert seen_var == pytest.approx(1.25 * 900, rel=0.03)
        assert asked_var == pytest.approx(5 * 900, rel=0.03)
        assert abs(together) < 0.02


@pytest.mark.parametrize("peak", [8.0, 30.0])
def test_counts_are_split_in_two_that_are_independent(peak: float) -> None:
    gain = 255 / peak
    found = noise_of(Noise(peak=peak, seed=1), NoiseModel(gain, 0.0, 1.0, counts=True, white=255.0), 60, 100)
    for level, (seen_mean, seen_var, asked_mean, asked_var, together) in zip((60, 100), found, strict=True):
        assert abs(seen_mean) < 0.02 * level
        assert abs(asked_mean) < 0.02 * level
        assert seen_var == pytest.approx(gain * level, rel=0.05)  # as many counts as there were
        assert asked_var == pytest.approx(5 * gain * level, rel=0.05)
        assert abs(together) < 0.02


def test_what_was_cut_off_is_asked_for_again_and_what_is_seen_is_cut_off() -> None:
    clean = halves(20, 235)
    noisy = Noise(sigma=40, seed=1).added(clean, box_of(SHAPE))
    assert min((noisy == 0).mean(), (noisy == 255).mean()) > 0.1
    seen, asked = recorrupted(triplets_of(noisy), NoiseModel(0.0, 1600.0, 1.0, black=0.0, white=255.0), random())
    assert seen.min() == 0
    assert seen.max() == 255
    for level, cut, whole in zip((20, 235), halves_of(noisy.astype(np.float64)), halves_of(asked), strict=True):
        assert abs(cut.mean() - level) > 5
        assert abs(whole.mean() - level) < 2
        assert whole.std() == pytest.approx(40 * 5**0.5, rel=0.03)


def test_counts_beyond_white_are_asked_for_again() -> None:
    clean = halves(120, 220)
    noisy = Noise(peak=8, seed=1).added(clean, box_of(SHAPE))
    seen, asked = recorrupted(triplets_of(noisy), NoiseModel(255 / 8, 0.0, 1.0, counts=True, white=255.0), random())
    assert seen.max() == 255
    for level, cut, whole in zip((120, 220), halves_of(noisy.astype(np.float64)), halves_of(asked), strict=True):
        assert cut.mean() < level
        assert abs(whole.mean() - level) < min(0.02 * level, abs(cut.mean() - level) + 2)


@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_of_few_counts_what_is_seen_looks_like_what_there_is(peak: float) -> None:
    """Also where white cuts off: were fewer counts seen, a network would take what it denoises for brighter."""
    noisy = Noise(peak=peak, seed=1).added(halves(60, 200), box_of(SHAPE)).astype(np.float64)
    seen, _ = recorrupted(triplets_of(noisy), counting(peak), random())
    for there, shown in zip(halves_of(noisy), halves_of(seen), strict=True):
        assert shown.mean() == pytest.approx(there.mean(), rel=0.03)
        assert (shown == 255).mean() == pytest.approx((there == 255).mean(), abs=0.02)


@pytest.mark.parametrize("model", [NoiseModel(0.0, 1600.0, 1.0, black=0.0, white=255.0), counting(4.0)], ids=str)
def test_slices_around_that_are_brighter_or_darker_change_nothing_in_the_mean(model: NoiseModel) -> None:
    noise = Noise(peak=4, seed=1) if model.counts else Noise(sigma=40, seed=1)
    clean = halves(60, 200)
    triplets = triplets_of(noise.added(clean, box_of(SHAPE)))
    triplets[:, 0], triplets[:, 2] = triplets[:, 1] * 0.8, triplets[:, 1] * 0.7
    _, asked = recorrupted(triplets, model, random())
    for level, whole in zip((60, 200), halves_of(asked), strict=True):
        assert whole.mean() == pytest.approx(level, rel=0.06)


def test_noise_that_grows_with_the_signal_is_added_where_it_is() -> None:
    clean = np.full(SHAPE, 100, np.uint8)
    noisy = Noise(sigma=20, seed=1).added(clean, box_of(SHAPE))
    weak, strong = (
        recorrupted(triplets_of(noisy), NoiseModel(gain, 0.0, 1.0), random())[1].var() for gain in (1.0, 4.0)
    )
    assert strong - weak == pytest.approx(4 * 300, rel=0.1)


@pytest.mark.parametrize(("level", "limits"), [(0, {"black": 0.0}), (255, {"white": 255.0})])
def test_a_frame_without_image_stays_what_it_is_in_the_mean(level: int, limits: dict[str, float]) -> None:
    framed = np.full((64, 64), level, np.float32)
    framed[:, 32:] = np.clip(128 + 60 * random().standard_normal((64, 32)), 0, 255)
    _, asked = recorrupted(np.stack([framed] * 3), NoiseModel(0.0, 100.0, 1.0, **limits), random())
    assert abs(asked[:, :24].mean() - level) < 2


def test_of_counts_a_dead_voxel_below_0_is_none() -> None:
    dead = np.full((16, 16), 64.0, np.float32)
    dead[3, 4] = -9
    assert np.isfinite(recorrupted(np.stack([dead] * 3), NoiseModel(8.0, 0.0, 0.0, counts=True), random())).all()


def test_a_slice_of_which_nothing_is_left_is_no_trouble() -> None:
    for model in (
        NoiseModel(0.0, 100.0, 1.0, black=0.0, white=255.0),
        NoiseModel(255.0, 0.0, 1.0, counts=True, white=255.0),
    ):
        for value in (0, 255):
            both = recorrupted(np.full((3, 16, 16), value, np.uint8), model, random())
            assert np.isfinite(both).all()
