"""A filter's strength: from the volume's noise, in the units of the stack that it will see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nrrn_pipeline.denoisers import filter_for
from nrrn_pipeline.volume import open_volume
from tests.support import bare_zarr

SIGMA = 12.0


def volume(path: Path, contrast: float = 0.0, drift: float = 0.0) -> Path:
    """Smooth slices with noise: `contrast` between the left and the right half, `drift` from slice to slice."""
    z, y, x = np.meshgrid(*map(np.arange, (12, 300, 600)), indexing="ij")
    clean = 1000 + 40 * np.sin(y / 19 + z / 9) + 40 * np.cos(x / 23) + contrast * (x >= 300) + drift * z
    noise = np.random.default_rng(0).normal(0, SIGMA, clean.shape)
    return bare_zarr(path, (clean + noise).astype(np.float32))


@pytest.mark.parametrize(("contrast", "drift"), [(0, 0), (300, 0), (0, 50), (300, 50)])
def test_the_noise_is_measured_in_units_of_whole_slices(tmp_path: Path, contrast: float, drift: float) -> None:
    source = volume(tmp_path / "a.zarr", contrast, drift)
    opened = open_volume(source)
    slices = opened.to_xarray().values
    found = filter_for("bm3d", opened, "slice")
    assert found.sigma * slices.std(axis=(1, 2)).mean() == pytest.approx(SIGMA, rel=0.1)
    pooled = filter_for("bm3d", opened, "volume")
    assert pooled.sigma * slices.std() == pytest.approx(SIGMA, rel=0.1)


def test_blank_slices_are_no_sample(tmp_path: Path) -> None:
    source = volume(tmp_path / "a.zarr")
    whole = filter_for("nlm", open_volume(source), "slice")
    voxels = open_volume(source).to_xarray().values.copy()
    voxels[:5] = 0
    blanked = filter_for("nlm", open_volume(bare_zarr(tmp_path / "b.zarr", voxels)), "slice")
    assert blanked.sigma == pytest.approx(whole.sigma, rel=0.05)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_volume_of_few_slices_is_sample_enough(tmp_path: Path, depth: int) -> None:
    voxels = open_volume(volume(tmp_path / "a.zarr")).to_xarray().values[:depth]
    found = filter_for("gaussian-avg", open_volume(bare_zarr(tmp_path / "b.zarr", voxels)), "slice")
    assert found.sigma * voxels.std() == pytest.approx(SIGMA, rel=0.15)
    assert found.strength
