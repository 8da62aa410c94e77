"""Volumes to train on: what is beside them has to fit, and what is known of their noise decides on the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, box_of
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.training.material import TrainingVolume, settled
from nrrn_pipeline.training.triplets import triplets
from tests.support import bare_zarr, image_like

TINY = TrainSettings(units=1, channels=4, steps=4, batch=2, crop=8, device="cpu")
SHAPE = (6, 20, 22)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bare_zarr(tmp_path / "source.zarr", image_like(SHAPE))


@pytest.mark.parametrize(("shape", "dtype"), [((6, 20, 21), "uint8"), ((5, 20, 22), "uint8"), (SHAPE, "uint16")])
def test_a_clean_volume_of_other_voxels_is_refused(
    source: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: str
) -> None:
    clean = bare_zarr(tmp_path / "clean.zarr", image_like(shape, dtype))
    with pytest.raises(InputError, match=r"clean\.zarr has shape .* give the clean volume of the same voxels"):
        TrainingVolume(source, clean).opened()


def test_a_mask_of_another_shape_is_refused_and_of_another_dtype_is_not(source: Path, tmp_path: Path) -> None:
    mask = bare_zarr(tmp_path / "mask.zarr", image_like((6, 20, 21)))
    with pytest.raises(InputError, match=r"mask\.zarr has shape \(6, 20, 21\), .* give one of the same voxels"):
        TrainingVolume(source, mask=mask).opened()
    fits = bare_zarr(tmp_path / "fits.zarr", image_like(SHAPE, "uint16"))
    assert TrainingVolume(source, mask=fits).opened().mask is not None


def test_a_part_outside_the_volume_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="roi y=0:21 is empty or not inside the volume: use a part of 0:20"):
        TrainingVolume(source, roi=Box.parse("0:6,0:21,0:22")).opened()


def test_clean_volumes_and_the_loss_that_needs_them_go_together(source: Path) -> None:
    noisy, both = TrainingVolume(source).opened(), TrainingVolume(source, source).opened()
    for materials in ([noisy], [both, noisy]):
        with pytest.raises(InputError, match=r"loss clean needs the clean volume beside the noisy one, .*source\.zarr"):
            settled(replace(TINY, loss="clean"), materials)
    for loss in ("adjacent", "blind-spot", "recorrupted"):
        with pytest.raises(InputError, match=f"loss {loss} needs no clean volume: leave .*source"):
            settled(replace(TINY, loss=loss), [both])
    assert settled(TINY, [both])[0].loss == "clean"
    with pytest.raises(InputError, match="loss clean needs the clean volume"):
        settled(TINY, [both, noisy])


def noisy_volume(path: Path, sigma: float, shared: bool = False) -> Path:
    noise = np.random.default_rng(round(sigma)).normal(0, sigma, (4, 96, 97))
    noise = (noise[..., 1:] + noise[..., :-1]) / 2**0.5 if shared else noise[..., 1:]
    return bare_zarr(path, np.clip(np.rint(120 + noise), 0, 255).astype(np.uint8))


def test_each_volume_is_recorrupted_by_its_own_noise(tmp_path: Path) -> None:
    sources = [noisy_volume(tmp_path / f"{sigma}.zarr", sigma) for sigma in (6, 15)]
    settings = replace(TINY, loss="recorrupted", batch=16)
    settings, materials, why = settled(settings, [TrainingVolume(source).opened() for source in sources])
    assert why is None
    for sigma, material in zip((6, 15), materials, strict=True):
        assert material.noise is not None
        batch = next(triplets([material], settings).batches())
        apart = (batch[:, 3] - batch[:, 1]).std() * sigma  # of 0.5 and 2 times the noise; a volume of noise alone
        assert apart == pytest.approx(2.5 * sigma, rel=0.1)
    both = next(triplets(materials, settings).batches())
    assert both.shape == (16, 4, 8, 8)


def test_noise_that_one_volume_shares_between_neighbours_decides_for_all(tmp_path: Path) -> None:
    white = TrainingVolume(noisy_volume(tmp_path / "white.zarr", 9)).opened()
    shared = TrainingVolume(noisy_volume(tmp_path / "shared.zarr", 9, shared=True)).opened()
    assert settled(TINY, [white, white])[0].loss == "recorrupted"
    settings, materials, why = settled(TINY, [white, shared])
    assert settings.loss == "adjacent"
    assert "0.5" in str(why)
    assert [material.noise is not None for material in materials] == [True, True]


def test_a_volume_without_noise_to_be_measured_is_named(tmp_path: Path) -> None:
    flat = bare_zarr(tmp_path / "flat.zarr", np.broadcast_to(np.arange(96, dtype=np.uint8), (4, 96, 96)).copy())
    with pytest.raises(InputError, match=r"flat\.zarr: no noise can be measured"):
        settled(replace(TINY, loss="recorrupted"), [TrainingVolume(flat).opened()])


def half_noisier(path: Path) -> Path:
    """(8, 96, 192) voxels with noise of sigma 5, and 20 from x = 96 on."""
    halves = [np.full((8, 96, 96), 120, np.uint8) for _ in range(2)]
    noises = (Noise(sigma=5, seed=1), Noise(sigma=20, seed=2))
    noisy = [noise.added(half, box_of(half.shape)) for noise, half in zip(noises, halves, strict=True)]
    return bare_zarr(path, np.concatenate(noisy, axis=2))


def test_noise_is_measured_where_the_mask_leaves_something(tmp_path: Path) -> None:
    source = half_noisier(tmp_path / "source.zarr")
    mask = np.zeros((8, 96, 192), np.bool_)
    mask[1:6, :, 100:] = True
    masked = TrainingVolume(source, mask=bare_zarr(tmp_path / "mask.zarr", mask))
    for loss in ("auto", "recorrupted"):
        _, (material,), _ = settled(replace(TINY, loss=loss), [masked.opened()])
        assert material.noise is not None
        assert material.noise.model.sigma(np.array(120.0)) == pytest.approx(20, rel=0.1)


def test_noise_is_measured_in_the_part_alone(tmp_path: Path) -> None:
    source = half_noisier(tmp_path / "source.zarr")
    for part, sigma in (("1:7,0:96,0:96", 5), ("1:7,0:96,96:192", 20)):
        for loss in ("auto", "recorrupted"):
            opened = TrainingVolume(source, roi=Box.parse(part)).opened()
            _, (material,), _ = settled(replace(TINY, loss=loss), [opened])
            assert material.noise is not None
            assert material.noise.model.sigma(np.array(120.0)) == pytest.approx(sigma, rel=0.1)
