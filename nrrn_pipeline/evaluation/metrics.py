"""Likeness to a clean reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def psnr(reference: NDArray[Any], image: NDArray[Any], data_range: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error); infinite for equal images."""
    if np.array_equal(reference, image):
        return float("inf")  # scikit-image gets there too, through a division by zero
    return float(peak_signal_noise_ratio(reference, image, data_range=data_range))


def ssim(reference: NDArray[Any], image: NDArray[Any], data_range: float) -> float:
    """Mean over z of each (y, x) slice's structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5)."""
    slices = [
        structural_similarity(clean, other, data_range=data_range, gaussian_weights=True, use_sample_covariance=False)
        for clean, other in zip(reference, image, strict=True)
    ]
    return float(np.mean(slices))
