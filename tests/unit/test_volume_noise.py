"""The noise of a volume: by signal, slice by slice, white or not; and the loss that suits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.training.choosing import loss_for
from nrrn_pipeline.volume import Volume, open_volume
from nrrn_pipeline.volume_noise import VolumeNoise, measure_volume, noise_of, noise_samples, outliers
from tests.support import bare_zarr

SHAPE = (12, 80, 96)


def scene(seed: int = 0) -> NDArray[np.float64]:
    """Slices that change slowly along z, from dark to bright."""
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), (4, 12, 12))
    return 120 + 40 * smooth / smooth.std()


def white(sigma: float, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, sigma, SHAPE)


def stored(folder: Path, voxels: NDArray[Any], dtype: str = "uint8") -> Volume:
    levels = np.clip(np.rint(voxels), 0, 255) if dtype == "uint8" else voxels
    return open_volume(bare_zarr(folder / "v.zarr", levels.astype(dtype)))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_white_noise_is_measured_in_every_slice(tmp_path: Path, dtype: str) -> None:
    found = measure_volume(stored(tmp_path, scene() + white(9), dtype))
    assert len(found.sigma) == SHAPE[0]
    np.testing.assert_allclose(found.sigma, 9, rtol=0.12)
    np.testing.assert_allclose(found.curve.model.sigma(np.array([90, 150])), 9, rtol=0.1)
    assert found.outliers == ()
    assert found.white
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(scene(), scene()[1:], strict=False)]
    assert 0.8 * np.mean(expected) < found.likeness < np.mean(expected)


def test_a_slice_with_twice_the_noise_is_an_outlier_and_a_drift_is_none(tmp_path: Path) -> None:
    drift = np.linspace(8, 10, SHAPE[0])[:, None, None] * white(1)
    drift[7] *= 2
    assert measure_volume(stored(tmp_path, scene() + drift)).outliers == (7,)


def test_what_counts_as_unlike_its_neighbours() -> None:
    assert outliers([10.0] * 20 + [13.5] + [10.0] * 20 + [7.4] + [0.0, 10.0]) == (20, 41)
    assert outliers([10.0 + 0.4 * z for z in range(200)]) == ()
    assert outliers([0.0, 0.0, 5.0]) == ()


def test_blank_slices_have_no_noise_and_spoil_nothing(tmp_path: Path) -> None:
    voxels = scene() + white(9)
    voxels[[3, 8]] = 0
    found = measure_volume(stored(tmp_path, voxels))
    assert [z for z, sigma in enumerate(found.sigma) if sigma == 0] == [3, 8]
    assert found.outliers == ()
    assert found.white


def test_noise_along_scan_lines_is_not_white(tmp_path: Path) -> None:
    found = measure_volume(stored(tmp_path, scene() + gaussian_filter1d(white(20), 0.7, axis=2)))
    y, x = found.shared
    assert abs(y) < 0.1
    assert x > 0.4
    assert not found.white


def test_slices_are_read_a_chunk_deep_at_a_time_and_in_the_middle_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = []

    def read(volume: Volume, box: Any) -> NDArray[Any]:
        boxes.append(box)
        return np.random.default_rng(box.z.start).integers(0, 255, box.shape, dtype=np.uint8)

    monkeypatch.setattr("nrrn_pipeline.volume_noise.read_box", read)
    volume = Volume("made up", (100, 4000, 6000), "uint8", (16, 128, 128), (16, 128, 128))
    assert len(measure_volume(volume).sigma) == 100
    whole = [box for box in boxes if len(box.z) > 3]
    assert [(box.z.start, box.z.stop) for box in whole] == [(z, min(z + 16, 100)) for z in range(0, 100, 16)]
    assert {(box.y.start, box.y.stop, box.x.start, box.x.stop) for box in whole} == {(1872, 2128, 2872, 3128)}
    assert sum(box.size for box in boxes) == (100 + 4 * 4 * 3) * 256 * 256


def test_samples_are_spread_over_the_volume_and_leave_out_blank_depths(tmp_path: Path) -> None:
    voxels = scene() + white(9)
    voxels[0] = 0
    samples = noise_samples(stored(tmp_path, voxels))
    assert samples.shape == (3, 1, 3, 80, 96)
    np.testing.assert_array_equal(samples[0, 0], np.clip(np.rint(voxels[3:6]), 0, 255))


def saturated() -> NDArray[np.float64]:
    """All white but for a frame that has noise, and one voxel."""
    voxels = 200 + np.random.default_rng(1).normal(0, 9, (4, 600, 600))
    voxels[:, 150:450, 150:450] = 255
    voxels[:, 300, 300] = 254
    return voxels


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.zeros(SHAPE), "is blank where its noise is measured"),
        (np.full(SHAPE, np.nan), "holds NaN or infinite voxels"),
        (np.broadcast_to(np.arange(96.0), SHAPE), r"v\.zarr: no noise can be measured"),
        (white(9)[:, :12, :12], r"v\.zarr: noise cannot be measured on slices of \(12, 12\)"),
        (white(9)[:1, :20, :20], r"v\.zarr: noise cannot be measured on slices of 216 smooth voxels"),
    ],
)
def test_volumes_whose_noise_cannot_be_measured_are_refused(tmp_path: Path, voxels: Any, message: str) -> None:
    volume = stored(tmp_path, voxels, "float32")
    for measure in (noise_of, measure_volume):
        with pytest.raises(InputError, match=message):
            measure(volume)


def test_a_volume_that_is_saturated_in_the_middle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"v\.zarr has no two successive slices with noise to be measured"):
        measure_volume(stored(tmp_path, saturated(), "float32"))


def test_nan_anywhere_in_the_middle_of_a_slice_is_refused(tmp_path: Path) -> None:
    voxels = np.tile(scene() + white(9), (3, 1, 1))
    voxels[5, 40, 40] = np.nan
    with pytest.raises(InputError, match="holds NaN or infinite voxels in slice z=5"):
        measure_volume(stored(tmp_path, voxels, "float32"))


def test_of_a_single_slice_nothing_can_be_said_of_successive_ones(tmp_path: Path) -> None:
    volume = stored(tmp_path, 100 + white(9)[:1])
    assert noise_of(volume).model.sigma(np.array(100.0)) == pytest.approx(9, rel=0.1)
    with pytest.raises(InputError, match="no two successive slices"):
        measure_volume(volume)


def shared(y: float, x: float) -> VolumeNoise:
    return VolumeNoise(NoiseCurve((1.0,), (1.0,), NoiseModel(0, 1, 1)), (1.0,), (), (y, x), 0.9)


def test_the_loss_that_suits_the_noise_is_chosen_and_says_why() -> None:
    nrrn, unet = Architecture.published("nrrn"), Architecture.published("unet")
    assert loss_for(shared(0.0, 0.05), nrrn)[0] == loss_for(shared(0.0, -0.05), unet)[0] == "recorrupted"
    for x in (0.4, -0.37):
        loss, why = loss_for(shared(0.01, x), nrrn)
        assert loss == "adjacent"
        assert f"correlates by 0.01 along y, {x:.2f} along x" in why
        with pytest.raises(InputError, match="unet would learn to keep it; train nrrn, or give a clean"):
            loss_for(shared(0.01, x), unet)
