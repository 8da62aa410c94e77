from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.evaluation.metrics import psnr, ssim
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
