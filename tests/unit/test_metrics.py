from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.metrics import patch_likeness, psnr, refuse_unlike, ssim
from tests.support import image_like


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_psnr_of_identical_volumes_is_infinite(dtype: str) -> None:
    voxels = image_like((2, 16, 16), dtype)
    assert psnr(voxels, voxels.copy(), 255) == math.inf


@pytest.mark.parametrize(
    ("off", "data_range", "decibel"),
    [(255, 255.0, 0.0), (51, 255.0, 20 * math.log10(5)), (1, 255.0, 20 * math.log10(255)), (10, 100.0, 20.0)],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_psnr_follows_from_the_mean_squared_error(off: int, data_range: float, decibel: float, dtype: str) -> None:
    low, high = np.zeros((2, 16, 16), dtype), np.full((2, 16, 16), off, dtype)
    assert psnr(low, high, data_range) == pytest.approx(decibel, abs=1e-6)
    assert psnr(high, low, data_range) == pytest.approx(decibel, abs=1e-6)


def test_psnr_averages_squares_over_all_voxels() -> None:
    reference = np.zeros((1, 2, 2))
    image = np.array([[[1.0, -1.0], [0.0, 2.0]]])
    assert psnr(reference, image, 3.0) == pytest.approx(10 * math.log10(9 / 1.5))


@pytest.mark.parametrize("voxels", [image_like((3, 16, 20)), np.zeros((2, 16, 16), np.float32)], ids=["image", "blank"])
def test_ssim_of_identical_volumes_is_one(voxels: NDArray[Any]) -> None:
    assert ssim(voxels, voxels.copy(), 255) == pytest.approx(1.0)


def test_ssim_of_flat_slices_compares_their_brightness_alone() -> None:
    reference, image = np.full((1, 16, 16), 100.0), np.full((1, 16, 16), 150.0)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(reference, image, 255) == pytest.approx(expected)


def test_ssim_is_the_mean_over_slices() -> None:
    reference = np.full((2, 16, 16), 100.0)
    image = reference.copy()
    image[1] = 150
    apart = ssim(reference[1:], image[1:], 255)
    assert ssim(reference, image, 255) == pytest.approx((1 + apart) / 2)


def test_ssim_falls_as_noise_grows() -> None:
    reference = image_like((2, 32, 32), "float32")
    noise = np.random.default_rng(1).standard_normal(reference.shape)
    found = [ssim(reference, (reference + sigma * noise).astype(np.float32), 1.0) for sigma in (0.0, 0.05, 0.1, 0.5)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_volumes_of_different_shape_are_not_compared(measure: Any) -> None:
    with pytest.raises(ValueError, match=r"shape|dimension|shorter|longer"):
        measure(np.zeros((3, 16, 16)), np.zeros((2, 16, 16)), 255)


@pytest.mark.parametrize(
    ("length", "starts"), [(16, [0]), (31, [0]), (32, [0]), (64, [0, 32]), (65, [0, 32, 33]), (80, [0, 32, 48])]
)
def test_patches_lie_on_a_grid_and_the_last_is_flush_with_the_border(length: int, starts: list[int]) -> None:
    voxels = image_like((2, length, 20))
    patches = patch_likeness(voxels, voxels, 255, side=32)
    assert [(patch.z, patch.y, patch.x) for patch in patches] == [(z, y, 0) for z in range(2) for y in starts]


def test_an_error_in_one_patch_shows_in_that_patch_alone() -> None:
    reference = image_like((2, 64, 96)).clip(0, 200)
    image = reference.copy()
    image[1, 40:50, 72:88] += 10  # more than the window's 5 voxels away from other patches
    patches = {(patch.z, patch.y, patch.x): patch for patch in patch_likeness(reference, image, 255, side=32)}
    spoiled = patches.pop((1, 32, 64))
    assert spoiled.psnr_db == pytest.approx(10 * math.log10(255**2 / (100 * 160 / 32**2)))
    assert spoiled.ssim < 0.999
    assert {patch.psnr_db for patch in patches.values()} == {math.inf}
    assert [patch.ssim for patch in patches.values()] == pytest.approx([1] * 11)


def test_ssim_of_a_patch_looks_beyond_the_patch_at_the_whole_slice() -> None:
    reference = image_like((1, 32, 64)).clip(0, 200)
    image = reference.copy()
    image[0, :, 32:35] += 50
    left, right = patch_likeness(reference, image, 255, side=32)
    assert left.psnr_db == math.inf
    assert right.ssim < left.ssim < 0.999


def test_ssim_of_a_flat_patch_compares_brightness_alone() -> None:
    reference, image = np.full((1, 64, 32), 100.0), np.full((1, 64, 32), 150.0)
    reference[0, 32:] = image[0, 32:] = 200
    flat = patch_likeness(reference, image, 255, side=16)[0]  # rows 0 to 15: no window reaches row 32
    c1 = (0.01 * 255) ** 2
    assert flat.ssim == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert flat.psnr_db == pytest.approx(20 * math.log10(255 / 50))


def test_squared_errors_of_patches_that_tile_a_volume_average_to_that_of_the_volume() -> None:
    reference = image_like((2, 64, 64), "uint16")
    image = image_like((2, 64, 64), "uint16", seed=1)
    errors = [10 ** (-patch.psnr_db / 10) for patch in patch_likeness(reference, image, 65535, side=32)]
    assert -10 * math.log10(np.mean(errors)) == pytest.approx(psnr(reference, image, 65535))


@pytest.mark.parametrize(("shape", "side"), [((2, 10, 64), 32), ((2, 64, 10), 32), ((2, 64, 64), 0)])
def test_slices_and_patches_too_small_for_ssim_are_refused(shape: tuple[int, int, int], side: int) -> None:
    voxels = image_like(shape)
    with pytest.raises(InputError, match="at least 11 voxels"):
        patch_likeness(voxels, voxels, 255, side)


def with_voxel(value: float) -> NDArray[Any]:
    voxels = image_like((2, 16, 16), "float32")
    voxels[1, 3, 5] = value
    return voxels


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (image_like((2, 16, 17)), r"reference has shape \(2, 16, 16\), the image \(2, 16, 17\)"),
        (image_like((2, 16, 16), "uint16"), "uint8, the image uint16"),
        (image_like((2, 16, 16)).astype(np.int16), "uint8, the image int16"),
        (with_voxel(math.nan), "image holds NaN"),
        (with_voxel(-math.inf), "image holds NaN or infinite"),
        (np.full((2, 16, 16), 7, np.uint8), "every voxel of the image is 7"),
    ],
)
@pytest.mark.parametrize("refuses", [refuse_unlike, lambda *two: patch_likeness(*two, 255)])
def test_volumes_of_which_no_measure_means_anything_are_refused(
    refuses: Any, image: NDArray[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        refuses(image_like((2, 16, 16)), image)


def test_either_volume_may_be_the_bad_one() -> None:
    good = image_like((2, 16, 16), "float32")
    with pytest.raises(InputError, match="the noisy holds NaN"):
        refuse_unlike(with_voxel(math.nan), good, ("noisy", "denoised"))
    with pytest.raises(InputError, match="voxel of the noisy is 0"):
        refuse_unlike(np.zeros_like(good), good, ("noisy", "denoised"))


@pytest.mark.parametrize("shape", [(16, 16), (0, 16, 16), (1, 2, 16, 16)])
def test_what_is_no_volume_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="voxels along three axes"):
        refuse_unlike(np.ones(shape), np.ones(shape))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_volumes_of_one_range_and_floats_beside_them_are_compared(dtype: str) -> None:
    voxels = image_like((2, 16, 16), dtype)
    refuse_unlike(voxels, voxels)
    refuse_unlike(voxels, voxels.astype(np.float64))
    refuse_unlike(voxels.astype(voxels.dtype.newbyteorder()), voxels)
