from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.special import erf

from nrrn_pipeline.evaluation.edges import REACH, Edges, find_edges, wider_by, width_of

Floats = NDArray[np.float64]
RISE = 2.5631  # sigmas from 10 to 90 % of a step behind a Gaussian blur
SHAPE = (6, 220, 220)


def stripes(sigma: float, angle: float = 0.3, shape: tuple[int, int, int] = SHAPE) -> Floats:
    """60 and 140, in stripes of 22 voxels, exactly as a Gaussian blur of an ideal step leaves them."""
    y, x = np.indices(shape[1:])
    place = y * np.sin(angle) + x * np.cos(angle)
    away = np.abs((place % 44) - 22) - 11  # signed distance from the nearest edge
    plane = 100 + 40 * erf(away / (sigma * np.sqrt(2)))
    return np.repeat(plane[None], shape[0], axis=0)


def noisy(volume: Floats, sigma: float, seed: int = 0) -> Floats:
    return volume + np.random.default_rng(seed).normal(0, sigma, volume.shape)


def width(volume: Floats, found_on: Floats | None = None) -> float:
    found = width_of(find_edges(volume if found_on is None else found_on).profiles(volume))
    assert found is not None
    return found.voxels


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("angle", [0.0, 0.3, 0.8, 2.0])
def test_a_step_behind_a_blur_of_sigma_is_2_563_sigma_wide(sigma: float, angle: float) -> None:
    """Within 5 %: places are off by parts of a voxel, and splines round off what is as steep as voxels can show."""
    assert width(stripes(sigma, angle)) == pytest.approx(RISE * sigma, rel=0.05)


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_noise_widens_what_it_is_measured_on_and_found_in_by_little(sigma: float) -> None:
    """Places are off by parts of a voxel: less than 5 % with the noise of a real volume, a ninth of the step."""
    assert RISE * sigma < width(noisy(stripes(sigma), 9)) < 1.05 * RISE * sigma


@pytest.mark.parametrize("strength", [5, 10, 20])
def test_a_noisy_volume_and_its_clean_copy_are_equally_wide(strength: float) -> None:
    clean = stripes(1.2, shape=(20, 220, 220))
    seen = noisy(clean, strength)
    edges = find_edges(seen)
    assert len(edges.places) > 500
    found = wider_by(edges.profiles(seen), edges.profiles(clean))
    assert found is not None
    assert abs(found.voxels) < max(3 * found.error, 0.01)
    assert found.error < 0.1


def test_edges_found_where_they_are_measured_would_favour_the_input() -> None:
    """Why they are not: with the same noise in all slices the noisy volume looks sharper than it is."""
    clean = stripes(1.2, shape=(20, 220, 220))
    seen = np.repeat(noisy(clean[:1], 20), len(clean), axis=0)
    edges = find_edges(seen)
    found = wider_by(edges.profiles(seen), edges.profiles(clean))
    assert found is not None
    assert found.voxels < -0.1


def test_the_error_is_the_spread_of_widths_over_other_noise() -> None:
    clean = stripes(1.2)
    found = [width_of(find_edges(seen).profiles(seen)) for seen in (noisy(clean, 12, seed) for seed in range(12))]
    spread = np.std([each.voxels for each in found if each])
    told = np.mean([each.error for each in found if each])
    assert 0.5 < spread / told < 1.7


def test_a_blur_is_told_from_none_and_by_how_much() -> None:
    seen = noisy(stripes(1.0), 9)
    edges = find_edges(seen)
    blurred = gaussian_filter(seen, (0, 1, 1))
    found = wider_by(edges.profiles(blurred), edges.profiles(seen))
    assert found is not None
    assert found.voxels == pytest.approx(RISE * (np.sqrt(2) - 1), rel=0.1)
    assert found.voxels > 10 * found.error
    mean = (seen[:-2] + seen[1:-1] + seen[2:]) / 3  # nothing moves between these slices
    same = wider_by(edges.profiles(np.pad(mean, ((1, 1), (0, 0), (0, 0)))), edges.profiles(seen))
    assert same is not None
    assert abs(same.voxels) < 3 * same.error


@settings(max_examples=12, deadline=None)
@given(gain=st.floats(0.01, 100), offset=st.floats(-1000, 1000), turns=st.integers(0, 3), swap=st.booleans())
def test_gain_offset_turns_and_mirrors_change_no_width(gain: float, offset: float, turns: int, swap: bool) -> None:
    seen = noisy(stripes(1.2), 6)
    changed = np.rot90(seen * gain + offset, turns, (1, 2))
    changed = changed.transpose(0, 2, 1) if swap else changed
    assert width(changed) == pytest.approx(width(seen), abs=0.02)


def test_dark_and_bright_changing_places_change_no_width() -> None:
    seen = noisy(stripes(1.2), 6)
    assert width(-seen) == pytest.approx(width(seen), abs=0.05)


def test_edges_lie_apart_off_the_borders_and_point_to_the_bright_side() -> None:
    seen = noisy(stripes(1.0), 9)
    edges = find_edges(seen)
    assert len(edges.places) > 100
    assert set(edges.places[:, 0]) == {2, 3}
    assert edges.places[:, 1:].min() > REACH
    assert edges.places[:, 1:].max() < 219 - REACH
    profiles = edges.profiles(seen)
    assert (profiles[:, -8:].mean(1) > profiles[:, :8].mean(1)).all()
    np.testing.assert_allclose(np.hypot(*edges.normals.T), 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_dtype_of_voxels_changes_nothing(dtype: str) -> None:
    seen = np.rint(noisy(stripes(1.2), 6))
    assert width(seen.astype(dtype).astype(seen.dtype)) == width(seen)
    assert width_of(find_edges(seen.astype(dtype)).profiles(seen.astype(dtype))) == width_of(
        find_edges(seen).profiles(seen)
    )


def test_a_frame_has_no_edges() -> None:
    seen = np.rint(noisy(np.full(SHAPE, 120.0), 6))
    seen[:, :60], seen[:, :, 150:] = 0, 255
    assert width_of(find_edges(seen).profiles(seen)) is None


def test_membranes_are_no_edges() -> None:
    place = np.indices(SHAPE)[2]
    seen = noisy(140 - 80 * np.exp(-(((place % 44) - 22) ** 2) / 8), 6)
    assert len(find_edges(seen).places) < 50


@pytest.mark.parametrize("seed", range(5))
def test_noise_has_no_width_whatever_is_done_to_it(seed: int) -> None:
    seen = noisy(np.full(SHAPE, 120.0), 20, seed)
    edges = find_edges(seen)
    assert width_of(edges.profiles(seen)) is None
    assert width_of(edges.profiles(gaussian_filter(seen, (0, 2, 2)))) is None


@pytest.mark.parametrize(
    "volume",
    [np.full(SHAPE, 7, np.uint8), stripes(1.0)[:4], stripes(1.0)[:, :20], np.empty((0, 64, 64)), stripes(1.0)[:1]],
    ids=["flat", "four slices", "narrow", "nothing", "one slice"],
)
def test_where_there_are_too_few_edges_there_is_no_width(volume: Floats) -> None:
    edges = find_edges(volume)
    assert edges.profiles(volume).shape == (len(edges.places), 33)
    assert width_of(edges.profiles(volume)) is None
    assert wider_by(edges.profiles(volume), edges.profiles(volume)) is None


def test_what_denoising_made_flat_has_no_width() -> None:
    seen = noisy(stripes(1.0), 9)
    edges = find_edges(seen)
    flat = edges.profiles(np.full(SHAPE, 100, np.uint8))
    assert width_of(flat) is None
    assert wider_by(flat, edges.profiles(seen)) is None


def test_half_of_the_edges_are_not_enough_below_fifty() -> None:
    seen = noisy(stripes(1.0), 9)
    edges = find_edges(seen)
    few = Edges(edges.places[:49], edges.normals[:49])
    assert width_of(few.profiles(seen)) is None
    enough = Edges(edges.places[:50], edges.normals[:50])
    assert width_of(enough.profiles(seen)) is not None


def test_profiles_of_other_edges_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"shape \(60, 33\) and \(61, 33\) are not of the same edges"):
        wider_by(np.zeros((60, 33)), np.zeros((61, 33)))
