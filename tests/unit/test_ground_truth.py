from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.transform import AffineTransform, warp

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.ground_truth import reference_image, trimmed_mean
from nrrn_pipeline.evaluation.metrics import psnr

SIDE, MARGIN = 192, 96
SIGMA = 20.0
Image = NDArray[np.float64]

MAPS = {  # of the middle: shift along x and y in pixels, stretch, turn in radians
    "still": (0.0, 0.0, 1.0, 0.0),
    "by parts of a pixel": (0.4, -0.7, 1.0, 0.0),
    "a little of all": (3.3, -2.6, 1.01, 0.004),
    "a seventh of the image": (-28.0, 26.5, 1.0, 0.0),
    "a quarter of the image": (48.3, -46.2, 1.005, 0.01),
}


def surface(seed: int = 0) -> Image:
    """Cells with sharp walls, grey levels 40 to 200, larger than any scan of it."""
    rough = gaussian_filter(np.random.default_rng(seed).standard_normal((SIDE + 2 * MARGIN,) * 2), 5)
    return 40 + 160 * gaussian_filter((np.sin(3 * rough / rough.std()) > 0).astype(float), 1)


def matrix(x: float, y: float, stretch: float, turn: float) -> Image:
    """From pixels (x, y, 1) of the first scan to those of another."""
    middle = (SIDE - 1) / 2
    to_middle, back = (AffineTransform(translation=(at, at)).params for at in (-middle, middle))
    turned = AffineTransform(scale=stretch, rotation=turn).params
    return AffineTransform(translation=(x, y)).params @ back @ turned @ to_middle


def scanned(kind: tuple[float, float, float, float], seed: int = 0, sigma: float = SIGMA, of: int = 0) -> Image:
    """(y, x) scan of a surface, displaced, with noise."""
    to_surface = AffineTransform(translation=(MARGIN, MARGIN)).params @ np.linalg.inv(matrix(*kind))
    clean = warp(surface(of), to_surface, output_shape=(SIDE, SIDE), order=3)
    return clean + sigma * np.random.default_rng(seed).standard_normal(clean.shape)


def scans_of(*kinds: str, sigma: float = SIGMA) -> list[NDArray[np.float32]]:
    return [scanned(MAPS[kind], seed, sigma).astype(np.float32) for seed, kind in enumerate(kinds)]


CLEAN = scanned(MAPS["still"], sigma=0.0)
STILL = scans_of(*["still"] * 6)


@pytest.mark.parametrize("kind", MAPS)
def test_the_shift_of_a_scan_is_recovered_to_a_tenth_of_a_pixel(kind: str) -> None:
    reference = reference_image(scans_of("still", kind, *["still"] * 3))
    x, y, _, _ = MAPS[kind]
    assert reference.transforms.shape == (5, 3, 3)
    np.testing.assert_array_equal(reference.transforms[0], np.eye(3))
    np.testing.assert_allclose(reference.shifts[1], (y, x), atol=0.1)
    np.testing.assert_allclose(reference.transforms[1][:2, :2], matrix(*MAPS[kind])[:2, :2], atol=0.003)


def test_the_result_is_nearer_to_the_surface_than_any_scan_and_than_the_mean_of_scans_as_they_are() -> None:
    scans = scans_of("still", "a little of all", "by parts of a pixel", "a seventh of the image", *["still"] * 4)
    inner = (slice(40, -40),) * 2
    found = psnr(CLEAN[inner], reference_image(scans).image[inner], 255)
    assert found > max(psnr(CLEAN[inner], scan[inner], 255) for scan in scans) + 6
    assert found > psnr(CLEAN[inner], np.mean(scans, axis=0)[inner], 255) + 3


def test_streaks_and_flashes_in_two_scans_leave_no_trace() -> None:
    scans = scans_of(*["still"] * 9, sigma=4.0)
    without = reference_image(scans).image
    scans[3][60:66] = 255
    scans[5][60:66] = 255
    image = reference_image(scans).image
    streak, beside = (np.abs(image - CLEAN)[rows].mean() for rows in (slice(60, 66), slice(20, 26)))
    assert np.abs(image - without)[60:66].mean() < 3
    assert streak < 2 * beside
    assert np.abs(np.mean(scans, axis=0) - CLEAN)[60:66].mean() > 10 * beside


def test_trimmed_mean_drops_the_two_extremes_on_each_side() -> None:
    values = np.array([[9, 1], [1, 1], [2, 1], [3, 1], [1000, 1], [5, 7], [-50, 1]], np.float32)
    assert trimmed_mean(values).tolist() == [pytest.approx((2 + 3 + 5) / 3), 1.0]


def test_trimmed_mean_of_fewer_than_five_is_the_mean_and_what_is_not_there_does_not_count() -> None:
    nan = np.nan
    values = np.array(
        [[1, 1, 1, 1], [nan, 2, 2, nan], [nan, 9, 9, nan], [nan, 30, 40, nan], [nan, 8, nan, 3], [nan, nan, nan, nan]],
        np.float32,
    )
    assert trimmed_mean(values).tolist() == [1, 8, 13, 2]


def test_what_only_the_first_scan_shows_is_the_first_scan() -> None:
    scans = scans_of("still", *["a quarter of the image"] * 4)
    reference = reference_image(scans)
    x, _, _, _ = MAPS["a quarter of the image"]  # the others show it at larger x: its right columns are beyond them
    only = (slice(None), slice(SIDE - int(x) + 4, None))
    np.testing.assert_array_equal(reference.image[only], scans[0][only])
    shared = (slice(60, -20), slice(20, SIDE - int(x) - 8))
    assert psnr(CLEAN[shared], reference.image[shared], 255) > psnr(CLEAN[shared], scans[0][shared], 255) + 3
    assert np.isfinite(reference.image).all()


def test_a_subset_holds_the_first_and_others_of_each_once_in_their_order() -> None:
    scans = [STILL[n % 6] for n in range(8)]
    chosen = {reference_image(scans, use=6, seed=seed).scans for seed in range(4)}
    assert len(chosen) > 1
    for numbers in chosen:
        assert numbers[0] == 0
        assert list(numbers) == sorted({*numbers})
        assert len(numbers) == 6
        assert numbers[-1] < 8


def test_a_subset_is_the_same_for_the_same_seed_and_gives_what_its_scans_give() -> None:
    one, again = (reference_image(STILL, use=5, seed=3) for _ in range(2))
    assert one.scans == again.scans
    np.testing.assert_array_equal(one.image, reference_image([STILL[number] for number in one.scans]).image)


def test_grey_levels_of_integers_are_kept() -> None:
    whole = [np.rint(np.clip(scan, 0, 255)).astype(np.uint8) for scan in STILL]
    image = reference_image(whole).image
    assert image.dtype == np.float32
    assert psnr(CLEAN, image, 255) > psnr(CLEAN, whole[0], 255) + 4


def spoilt(change: Any) -> list[Any]:
    """Good scans, but for the third."""
    scans = [scan.copy() for scan in STILL]
    scans[2] = change(scans[2])
    return scans


def with_nan(scan: Any) -> Any:
    scan[5, 7] = np.nan
    return scan


REFUSED = {
    "another shape": (lambda scan: scan[:-1], r"scan 3 of 6 is float32 \(191, 192\), the first float32 \(192, 192\)"),
    "another dtype": (lambda scan: scan.astype(np.uint16), "scan 3 of 6 is uint16 .* convert"),
    "a volume": (lambda scan: scan[None], r"scan 3 of 6 has shape \(1, 192, 192\): expected \(y, x\)"),
    "NaN": (with_nan, "scan 3 of 6 holds NaN or infinite pixels"),
    "constant": (np.zeros_like, "scan 3 of 6 is 0.0 everywhere: leave it out"),
    "upside down": (lambda scan: scan[::-1], "scan 3 of 6 does not fit the first"),
    "of another surface": (lambda _: scanned(MAPS["still"], of=1).astype(np.float32), "scan 3 of 6 does not fit"),
    "much larger": (
        lambda _: scanned((0.0, 0.0, 1.12, 0.0)).astype(np.float32),
        "scan 3 of 6 does not fit the first, .* stretched by 1.12 and 1.12",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_scan_that_cannot_be_used_is_named(what: str) -> None:
    change, said = REFUSED[what]
    with pytest.raises(InputError, match=said):
        reference_image(spoilt(change))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_fewer_than_five_scans_are_too_few(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} scans are too few: expected 5 or more"):
        reference_image(STILL[:count])


@pytest.mark.parametrize("use", [-1, 0, 4, 7])
def test_a_subset_that_cannot_be_drawn_is_refused(use: int) -> None:
    with pytest.raises(InputError, match=f"{use} scans cannot be used: expected 5 to 6"):
        reference_image(STILL, use=use)


def test_scans_that_are_too_small_to_register_are_refused() -> None:
    with pytest.raises(InputError, match=r"scan 1 of 6 has shape \(192, 31\): expected \(y, x\) of 32 pixels or more"):
        reference_image([scan[:, :31] for scan in STILL])


def test_without_pystackreg_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pystackreg", None)
    with pytest.raises(InputError, match=r"needs pystackreg: pip install nrrn-pipeline\[evaluation\]"):
        reference_image(STILL)
