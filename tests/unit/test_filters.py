from __future__ import annotations

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.restoration import denoise_nl_means

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS, Filter, Stack, noise_sigma, risk, tuned
from nrrn_pipeline.geometry import Span, tiles_of

STRENGTH = {"gaussian-avg": 1.0, "median-avg": 5.0, "nlm": 0.3, "nlm-avg": 0.2}
LENGTHS = st.sampled_from([1, 7, 40, 65, 90])
SIGMA = 0.6


def made(name: str, strength: float | None = None) -> Filter:
    return Filter(name, SIGMA, strength or STRENGTH.get(name))


def clean_stack(shape: tuple[int, int, int]) -> Stack:
    """Membranes, of standard deviation about 1, that drift slowly from slice to slice."""
    z, y, x = np.indices(shape)
    return np.sign(np.sin((y + z / 2) / 5) + np.cos((x - z / 2) / 6)).astype(np.float32)


def noisy_stack(shape: tuple[int, int, int], sigma: float = SIGMA) -> Stack:
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return clean_stack(shape) + np.float32(sigma) * noise


def tiled(denoise: Filter, stack: Stack, window: int, halo: int) -> Stack:
    bounds_y, bounds_x = (Span(0, length) for length in stack.shape[1:])
    whole = np.full_like(stack[1:-1], np.nan)
    for y in tiles_of(bounds_y, bounds_y, window, halo, denoise.grid):
        for x in tiles_of(bounds_x, bounds_x, window, halo, denoise.grid):
            tile = stack[:, y.read.within(bounds_y), x.read.within(bounds_x)].copy()
            whole[:, y.keep.within(bounds_y), x.keep.within(bounds_x)] = denoise(tile)[:, y.crop, x.crop]
    return whole


@pytest.mark.parametrize(
    ("name", "strength"),
    [("mean", None), ("gaussian-avg", 0.5), ("gaussian-avg", 1.4), ("median-avg", 3.0), ("median-avg", 9.0)],
)
@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(3, 4), LENGTHS, LENGTHS), spare=st.integers(1, 30))
def test_tiled_output_equals_whole_slice_output(
    name: str, strength: float | None, shape: tuple[int, int, int], spare: int
) -> None:
    denoise, stack = made(name, strength), noisy_stack(shape)
    found = tiled(denoise, stack, 2 * denoise.reach + spare, denoise.reach)
    np.testing.assert_array_equal(found, denoise(stack))


@pytest.mark.parametrize("name", ["nlm", "nlm-avg"])
@settings(max_examples=10, deadline=None)
@given(shape=st.tuples(st.just(3), LENGTHS, LENGTHS), spare=st.integers(10, 40))
def test_tiles_of_non_local_means_show_only_as_rounding(name: str, shape: tuple[int, int, int], spare: int) -> None:
    denoise, stack = made(name), noisy_stack(shape)
    found = tiled(denoise, stack, 2 * denoise.reach + spare, denoise.reach)
    np.testing.assert_allclose(found, denoise(stack), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "most", "mean"), [("bm3d-avg", 0.02, 0.001), ("bm4d", 0.02, 0.001)])
def test_tiles_of_block_matching_stay_below_half_a_grey_level(name: str, most: float, mean: float) -> None:
    denoise, stack = made(name), noisy_stack((3, 140, 16))
    difference = np.abs(tiled(denoise, stack, 2 * denoise.reach + 18, denoise.reach) - denoise(stack))
    assert difference.max() <= most  # of a slice's std, which is some 40 grey levels
    assert difference.mean() <= mean


@pytest.mark.parametrize("name", ["gaussian-avg", "median-avg", "nlm", "nlm-avg"])
def test_a_halo_one_pixel_short_shows(name: str) -> None:
    denoise, stack = made(name), noisy_stack((3, 60, 60))
    difference = np.abs(tiled(denoise, stack, 2 * denoise.reach + 12, denoise.reach - 1) - denoise(stack))
    assert difference.max() > 1e-5


@pytest.mark.parametrize("name", FILTERS)
def test_an_estimate_depends_on_its_own_triplet_alone(name: str) -> None:
    denoise, stack = made(name), noisy_stack((5, 20, 24))
    one_by_one = np.concatenate([denoise(stack[z : z + 3]) for z in range(3)])
    np.testing.assert_array_equal(denoise(stack), one_by_one)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 5, 5), (3, 8, 8), (3, 1, 40), (4, 17, 3)])
def test_slices_of_any_size_are_denoised(name: str, shape: tuple[int, int, int]) -> None:
    estimate = made(name)(noisy_stack(shape))
    assert estimate.shape == (shape[0] - 2, *shape[1:])
    assert estimate.dtype == np.float32
    assert np.isfinite(estimate).all()


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_flat_stays_as_it_is(name: str) -> None:
    tolerance = 0.005 if name.startswith("bm") else 1e-6  # their Wiener stage draws towards 0, the slice's mean
    np.testing.assert_allclose(made(name)(np.full((3, 24, 24), 0.37, np.float32)), 0.37, atol=tolerance)


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_brings_a_slice_nearer_to_the_clean_one(name: str) -> None:
    noisy, clean = noisy_stack((3, 64, 64)), clean_stack((3, 64, 64))
    before, after = (np.mean((slices - clean[1:-1]) ** 2) for slices in (noisy[1:-1], made(name)(noisy)))
    assert after < before / 2


@pytest.mark.parametrize("name", ["mean", "bm3d-avg", "bm4d"])
def test_nothing_is_printed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    made(name)(noisy_stack((3, 20, 20)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["bm3d-avg", "bm4d"])
def test_threads_that_denoise_at_once_get_what_one_alone_gets(name: str) -> None:
    denoise, stack = made(name), noisy_stack((3, 30, 30))
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(denoise, [stack] * 6):
            np.testing.assert_array_equal(found, denoise(stack))


def test_the_mean_is_that_of_the_three_slices() -> None:
    stack = np.array([1, 2, 6, 7], np.float32)[:, None, None] * np.ones((4, 2, 3), np.float32)
    np.testing.assert_allclose(made("mean")(stack), [[[3.0] * 3] * 2, [[5.0] * 3] * 2])


def test_the_median_is_taken_of_the_mean() -> None:
    stack = np.zeros((3, 7, 7), np.float32)
    stack[:, 3, 3] = 90, 60, 30
    stack[0, 1, 1:6] = 3
    np.testing.assert_array_equal(made("median-avg", 3)(stack), np.zeros((1, 7, 7)))
    assert made("mean")(stack)[0, 3, 3] == 60


def test_non_local_means_of_the_mean_is_told_its_smaller_noise() -> None:
    stack = noisy_stack((3, 30, 30))
    expected = denoise_nl_means(made("mean")(stack)[0], 5, 6, h=0.2, sigma=SIGMA / np.sqrt(3))
    np.testing.assert_array_equal(made("nlm-avg")(stack)[0], expected)


@pytest.mark.parametrize("name", ["gaussian-avg", "median-avg", "nlm", "nlm-avg"])
def test_the_risk_estimate_is_the_squared_error(name: str) -> None:
    noisy, clean = noisy_stack((6, 128, 128)), clean_stack((6, 128, 128))
    error = float(np.mean((made(name)(noisy) - clean[1:-1]) ** 2))
    assert risk(made(name), noisy) == pytest.approx(error, abs=0.02 * SIGMA**2)


def test_the_risk_of_a_mean_of_three_flat_slices_is_a_third_of_the_noise() -> None:
    noise = SIGMA * np.random.default_rng(0).standard_normal((6, 128, 128), dtype=np.float32)
    assert risk(made("mean"), noise) == pytest.approx(SIGMA**2 / 3, rel=0.05)


@pytest.mark.parametrize("name", ["gaussian-avg", "median-avg", "nlm", "nlm-avg"])
def test_more_noise_is_met_with_more_strength(name: str) -> None:
    weak, strong = (tuned(name, [noisy_stack((4, 96, 96), sigma)], sigma).strength for sigma in (0.1, 1.5))
    assert weak is not None
    assert strong is not None
    assert weak < strong


@pytest.mark.parametrize("sigma", [0.05, 0.6])
def test_noise_is_measured_in_the_units_of_the_slices(sigma: float) -> None:
    slices = np.concatenate([sigma * np.random.default_rng(1).standard_normal((4, 64, 64)), np.zeros((1, 64, 64))])
    assert noise_sigma(slices) == pytest.approx(sigma, rel=0.05)
    assert noise_sigma(100 * slices) == pytest.approx(100 * noise_sigma(slices))


def test_a_volume_without_noise_is_refused() -> None:
    with pytest.raises(InputError, match="no noise can be measured on 3 slices"):
        noise_sigma(np.zeros((3, 32, 32)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mean", "median-avg", "bm4d"])
def test_noise_that_cannot_be_is_refused(name: str, sigma: float) -> None:
    with pytest.raises(InputError, match=f"{name} was given noise of sigma {sigma}"):
        tuned(name, [noisy_stack((3, 9, 9))], sigma)


@pytest.mark.parametrize(
    ("name", "strength", "match"),
    [("nlm", None, "strength None"), ("gaussian-avg", -1.0, "strength -1.0"), ("median-avg", 4.0, "an odd whole")],
)
def test_a_strength_that_cannot_be_is_refused(name: str, strength: float | None, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Filter(name, SIGMA, strength)


def test_an_unknown_filter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=f"'bm5d' is unknown: use {', '.join(FILTERS)}"):
        tuned("bm5d", [], SIGMA)


def test_a_strength_is_not_chosen_without_samples() -> None:
    with pytest.raises(InputError, match="given none"):
        tuned("gaussian-avg", [], SIGMA)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("bm3d", "bm4d"):
        monkeypatch.setitem(sys.modules, package, None)
    for ask in (lambda: made("bm3d").settings, lambda: made("bm4d")(noisy_stack((3, 9, 9)))):
        with pytest.raises(InputError, match=r"pip install nrrn-pipeline\[baselines\]"):
            ask()


@pytest.mark.parametrize("name", FILTERS)
def test_settings_are_json_and_tell_filters_apart(name: str) -> None:
    denoise = made(name)
    assert json.loads(json.dumps(denoise.settings)) == denoise.settings
    assert denoise.settings != Filter(name, 2 * SIGMA, denoise.strength).settings
    assert ("bm4d" in denoise.settings["filter"]) == name.startswith("bm")
    assert pickle.loads(pickle.dumps(denoise)) == denoise
    assert denoise.working_bytes(2000) == 2 * denoise.working_bytes(1000) > 0
