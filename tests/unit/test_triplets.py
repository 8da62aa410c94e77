"""Crops of slice triplets, as training is given them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from nrrn_pipeline import statistics
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.training import triplets as streaming
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.training.material import training_runs
from nrrn_pipeline.volume import Volume, open_volume, read_box
from tests.crops import crops_of
from tests.support import bare_zarr, image_like

TINY = TrainSettings(units=1, channels=4, steps=4, batch=2, crop=8, device="cpu", loss="adjacent")


def stored(folder: Path, voxels: NDArray[Any]) -> Volume:
    return open_volume(bare_zarr(folder / "source.zarr", voxels))


def z_scored(voxels: NDArray[Any]) -> NDArray[Any]:
    exact = voxels.astype(np.float64)
    spread = exact.std((1, 2), keepdims=True)
    return (exact - exact.mean((1, 2), keepdims=True)) / np.where(spread > 0, spread, 1)


def places_of(triplet: Tensor, voxels: NDArray[Any]) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """Every (centre z, y, x, flipped axes) at which the z-scored volume holds the (3, y, x) triplet."""
    windows = sliding_window_view(z_scored(voxels), tuple(triplet.shape))
    found = []
    for flips in ((), (1,), (2,), (1, 2)):
        match = np.isclose(windows, np.flip(triplet.numpy(), flips), atol=1e-5).all((3, 4, 5))
        found += [(int(z) + 1, int(y), int(x), flips) for z, y, x in np.argwhere(match)]
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_batches_are_float32_crops_of_three_slices(tmp_path: Path, dtype: str) -> None:
    volume = stored(tmp_path, image_like((6, 32, 40), dtype))
    for batch in islice(crops_of(volume, replace(TINY, batch=3, crop=16)).batches(), 3):
        assert batch.shape == (3, 3, 16, 16)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_crop_is_a_z_scored_part_of_three_consecutive_slices(tmp_path: Path, dtype: str) -> None:
    voxels = image_like((5, 12, 14), dtype)
    batches = islice(crops_of(stored(tmp_path, voxels), replace(TINY, batch=4, crop=6)).batches(), 6)
    places = [places_of(triplet, voxels) for batch in batches for triplet in batch]
    assert [len(found) for found in places] == [1] * 24
    assert {found[0][0] for found in places} == {1, 2, 3}
    assert len({found[0][:3] for found in places}) > 10


def test_crops_reach_every_corner_of_a_slice(tmp_path: Path) -> None:
    voxels = image_like((3, 10, 11))
    batches = islice(crops_of(stored(tmp_path, voxels), replace(TINY, batch=32, crop=9)).batches(), 2)
    places = {places_of(triplet, voxels)[0][1:3] for batch in batches for triplet in batch}
    assert places == {(y, x) for y in range(2) for x in range(3)}


def test_crops_are_flipped_in_all_four_ways(tmp_path: Path) -> None:
    voxels = image_like((3, 12, 14))
    batch = next(crops_of(stored(tmp_path, voxels), replace(TINY, batch=32, crop=14)).batches())
    assert {places_of(triplet, voxels)[0][3] for triplet in batch} == {(), (1,), (2,), (1, 2)}


def test_a_crop_larger_than_the_slice_is_the_slice(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((3, 12, 50)))
    assert next(crops_of(volume, replace(TINY, crop=20)).batches()).shape == (2, 3, 12, 20)
    assert next(crops_of(volume, replace(TINY, crop=256)).batches()).shape == (2, 3, 12, 50)


def test_triplets_with_a_blank_slice_are_skipped(tmp_path: Path) -> None:
    voxels = image_like((9, 12, 14))
    voxels[[3, 7]] = 77
    batches = islice(crops_of(stored(tmp_path, voxels), replace(TINY, batch=8, crop=12)).batches(), 4)
    found = {places_of(triplet, voxels)[0][0] for batch in batches for triplet in batch}
    assert found == {1, 5}


def test_triplets_with_a_slice_to_be_left_out_are_skipped(tmp_path: Path) -> None:
    voxels = image_like((9, 12, 14))
    batches = islice(crops_of(stored(tmp_path, voxels), replace(TINY, batch=8, crop=12), without=(3, 7)).batches(), 4)
    found = {places_of(triplet, voxels)[0][0] for batch in batches for triplet in batch}
    assert found == {1, 5}


def test_the_seed_decides_the_batches(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((6, 32, 32)))
    first, again, other = (
        list(islice(crops_of(volume, settings).batches(), 3)) for settings in (TINY, TINY, replace(TINY, seed=1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_crop_is_the_same_however_many_others_are_in_its_batch(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((30, 20, 22)))
    few, many = (crops_of(volume, replace(TINY, batch=batch)) for batch in (2, 5))
    assert torch.equal(next(few.batches(3)), next(many.batches(3))[:2])
    assert torch.equal(few.validation(2)[1], many.validation(2)[1][:2])
    assert len({crop.numpy().tobytes() for crop in next(many.batches(3))}) == 5


def clean_beside(folder: Path, voxels: NDArray[Any], name: str = "clean.zarr") -> Volume:
    return open_volume(bare_zarr(folder / name, voxels))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_clean_slice_is_scaled_as_the_noisy_centre_slice_is(tmp_path: Path, dtype: str) -> None:
    noisy = image_like((6, 20, 22), dtype)
    clean = image_like((6, 20, 22), dtype, seed=1)
    volume, beside = stored(tmp_path, noisy), clean_beside(tmp_path, clean)
    settings = replace(TINY, loss="clean", batch=8, crop=12)
    exact = noisy.astype(np.float64)
    scaled = (clean - exact.mean((1, 2), keepdims=True)) / exact.std((1, 2), keepdims=True)
    for crop in next(crops_of(volume, settings, clean=beside).batches()):
        z, y, x, flips = places_of(crop[:3], noisy)[0]
        expected = np.flip(scaled[z, y : y + 12, x : x + 12], [axis - 1 for axis in flips])
        np.testing.assert_allclose(crop[3].numpy(), expected, atol=1e-4)


def test_the_clean_volume_does_not_change_the_noisy_crops(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((6, 20, 22)))
    beside = clean_beside(tmp_path, image_like((6, 20, 22), seed=1))
    alone = islice(crops_of(volume, TINY).batches(), 3)
    both = islice(crops_of(volume, replace(TINY, loss="clean"), clean=beside).batches(), 3)
    assert all(torch.equal(a, b[:, :3]) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_of_a_recorrupted_triplet_the_centre_alone_is_changed_and_its_other_half_comes_last(
    tmp_path: Path, dtype: str
) -> None:
    voxels = (40 + image_like((6, 20, 22), "uint8") / 2).astype(dtype)
    plain = replace(TINY, batch=8, crop=12)
    volume = stored(tmp_path, voxels)
    crops = next(crops_of(volume, replace(plain, loss="recorrupted"), noise=NoiseModel(0.0, 9.0, 1.0)).batches())
    assert crops.shape == (8, 4, 12, 12)
    windows = sliding_window_view(z_scored(voxels), (3, 12, 12))
    for crop in crops.numpy():
        unflipped = (np.flip(crop, flips) for flips in ((), (1,), (2,), (1, 2)))
        found = [
            (place, each)
            for each in unflipped
            for place in np.argwhere(np.isclose(windows[..., ::2, :, :], each[:3:2], atol=1e-5).all((3, 4, 5)))
        ]
        (((z, y, x), unflipped_crop),) = found
        centre, spread = windows[z, y, x, 1], voxels[z + 1].astype(np.float64).std()
        np.testing.assert_allclose(
            (unflipped_crop[1] - centre) * spread, (centre - unflipped_crop[3]) * spread / 4, atol=2e-3
        )
        assert ((unflipped_crop[1] - centre) * spread).std() == pytest.approx(0.5 * 3, rel=0.25)


def slices_of(places: Any) -> set[int]:
    """All slices of the triplets around some centres."""
    return {place.z + apart for place in places for apart in (-1, 0, 1)}


@pytest.mark.parametrize(("depth", "held"), [(3, 0), (11, 0), (12, 0), (17, 1), (42, 4)])
def test_what_is_held_out_shares_no_slice_with_what_is_learnt(tmp_path: Path, depth: int, held: int) -> None:
    voxels = image_like((depth, 12, 14))
    found = crops_of(stored(tmp_path, voxels), replace(TINY, batch=16, crop=12))
    assert len(found.held_out) == held
    assert len(found.learnt) == depth - 2 - (held + 4 if held else 0)
    assert not slices_of(found.learnt) & slices_of(found.held_out)
    for batch, places in (
        (next(found.batches()), found.learnt),
        *((each, found.held_out) for each in found.validation(2)),
    ):
        centres = {places_of(triplet, voxels)[0][0] for triplet in batch}
        assert centres <= {place.z for place in places}


def test_what_is_held_out_is_always_the_same(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((30, 20, 20)))
    first, again = (crops_of(volume, TINY).validation(3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert crops_of(volume, replace(TINY, hold_out=0)).validation(3) == []


def striped() -> NDArray[Any]:
    return np.broadcast_to(np.arange(96, dtype=np.uint8), (4, 96, 96))


def test_a_clean_volume_with_voxels_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((6, 20, 22), "float32"))
    beside = clean_beside(tmp_path, np.full((6, 20, 22), np.nan, np.float32))
    with pytest.raises(InputError, match=r"clean\.zarr holds NaN or infinite voxels in slice z=\d"):
        next(crops_of(volume, replace(TINY, loss="clean"), clean=beside).batches())


def one_slice() -> NDArray[Any]:
    return image_like((1, 12, 12))


def two_slices() -> NDArray[Any]:
    return image_like((2, 12, 12))


def all_blank() -> NDArray[Any]:
    return np.full((6, 12, 12), 9, np.uint8)


def every_third_blank() -> NDArray[Any]:
    voxels = image_like((9, 12, 12))
    voxels[2::3] = 0
    return voxels


@pytest.mark.parametrize("make", [one_slice, two_slices, all_blank, every_third_blank])
def test_a_volume_without_three_consecutive_images_is_refused(tmp_path: Path, make: Callable[[], NDArray[Any]]) -> None:
    volume = stored(tmp_path, make())
    with pytest.raises(InputError, match=r"source\.zarr has no three consecutive slices to learn from"):
        crops_of(volume, TINY)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_volume_with_voxels_that_are_no_numbers_is_refused_before_the_first_batch(tmp_path: Path, bad: float) -> None:
    voxels = image_like((6, 12, 12), "float32")
    voxels[2, 3, 4] = bad
    with pytest.raises(InputError, match="slice z=2"):
        crops_of(stored(tmp_path, voxels), TINY)


@pytest.fixture
def boxes_read(monkeypatch: pytest.MonkeyPatch) -> list[Box]:
    """The boxes that training reads from now on, of volumes that are made up on the spot."""
    boxes: list[Box] = []

    def read(volume: Volume, box: Box) -> NDArray[Any]:
        boxes.append(box)
        return np.random.default_rng(box.z.start).integers(0, 255, box.shape, dtype=np.uint8)

    monkeypatch.setattr(statistics, "read_box", read)
    monkeypatch.setattr(streaming, "read_box", read)
    monkeypatch.setattr(streaming, "KEPT_BYTES", 0)
    return boxes


@pytest.mark.parametrize(("slices", "chunk"), [(100_000, 1), (100_000, 8), (10_007, 16), (3000, 50), (10_007, 128)])
def test_training_reads_at_most_128_slices_and_its_crops_however_deep_the_volume(
    boxes_read: list[Box], slices: int, chunk: int
) -> None:
    volume = Volume("made up", (slices, 24, 20), "uint8", (chunk, 8, 8), (chunk, 8, 8))
    batches = crops_of(volume, replace(TINY, batch=5)).batches()
    measured = sum(box.size for box in boxes_read)
    assert 0 < measured <= 128 * 24 * 20
    boxes_read.clear()
    for _ in islice(batches, 4):
        pass
    assert {box.shape for box in boxes_read} == {(3, 8, 8)}
    assert 20 <= len(boxes_read) <= 25  # one batch is made ahead


def test_crops_come_only_from_slices_that_were_measured(boxes_read: list[Box]) -> None:
    volume = Volume("made up", (5000, 24, 20), "uint8", (8, 8, 8), (8, 8, 8))
    batches = crops_of(volume, replace(TINY, batch=50)).batches()
    measured = {z for box in boxes_read for z in range(box.z.start, box.z.stop)}
    boxes_read.clear()
    next(batches)
    assert {z for box in boxes_read for z in range(box.z.start, box.z.stop)} <= measured


@pytest.mark.parametrize(("slices", "chunk"), [(1, 1), (3, 8), (16, 1), (100, 8), (128, 8), (129, 1), (5000, 7)])
def test_training_runs_lie_on_the_chunk_grid_and_span_the_volume(slices: int, chunk: int) -> None:
    volume = Volume("unread", (slices, 8, 8), "uint8", (chunk, 8, 8), (chunk, 8, 8))
    runs = training_runs(volume, volume.box.z)
    assert all(run.start % chunk == 0 and (run.stop % chunk == 0 or run.stop == slices) for run in runs)
    assert all(a.stop <= b.start for a, b in pairwise(runs))
    assert runs[0].start == 0
    assert slices <= 128 or slices - runs[-1].stop < 3
    assert slices > 128 or sum(len(run) for run in runs) == slices


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 100, 128, 500])
@pytest.mark.parametrize("z", [(0, 3), (7, 9), (120, 400), (127, 400), (63, 130), (63, 193), (1, 255), (0, 5000)])
def test_about_128_slices_of_any_part_are_learnt_from(z: tuple[int, int], chunk: int) -> None:
    part = Span(*z)
    volume = Volume("unread", (5000, 8, 8), "uint8", (chunk, 8, 8), (chunk, 8, 8))
    runs = training_runs(volume, part)
    assert all(part.start <= run.start < run.stop <= part.stop for run in runs)
    assert all(a.stop < b.start for a, b in pairwise(runs))
    assert sum(len(run) for run in runs) <= 128
    assert all(len(run) >= min(3, len(part)) for run in runs)
    if len(part) <= 128:
        assert runs == [part]
    else:
        assert sum(len(run) for run in runs) >= 64


def test_of_chunks_as_deep_as_all_that_is_learnt_the_middle_one_is_taken() -> None:
    volume = Volume("unread", (1000, 8, 8), "uint8", (128, 8, 8), (128, 8, 8))
    assert training_runs(volume, volume.box.z) == [Span(512, 640)]


def test_every_triplet_of_a_run_is_trained_on(boxes_read: list[Box]) -> None:
    volume = Volume("made up", (40, 8, 8), "uint8", (4, 8, 8), (4, 8, 8))
    batches = crops_of(volume, replace(TINY, batch=600, hold_out=0)).batches()
    boxes_read.clear()
    next(batches)
    expected = {
        Span(z - 1, z + 2) for run in training_runs(volume, volume.box.z) for z in range(run.start + 1, run.stop - 1)
    }
    assert {box.z for box in boxes_read} == expected


@pytest.mark.parametrize("loss", ["adjacent", "clean", "recorrupted"])
def test_what_fits_is_held_in_memory_and_taught_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    volume = stored(tmp_path, image_like((9, 20, 22), "uint16"))
    clean = clean_beside(tmp_path, image_like((9, 20, 22), "uint16", seed=1)) if loss == "clean" else None
    noise = NoiseModel(0.0, 9.0, 1.0) if loss == "recorrupted" else None
    settings, part = replace(TINY, loss=loss), Box.parse("1:9,3:20,2:19")
    bytes_learnt = 8 * 17 * 17 * 2 * (2 if clean else 1)
    taught, read = [], []

    def counted(volume: Volume, box: Box) -> NDArray[Any]:
        read.append(box)
        return read_box(volume, box)

    for most in (bytes_learnt, bytes_learnt - 1):
        monkeypatch.setattr(streaming, "KEPT_BYTES", most)
        crops = crops_of(volume, settings, noise, clean=clean, part=part)
        read.clear()
        monkeypatch.setattr(streaming, "read_box", counted)
        taught.append([*islice(crops.batches(), 5), *crops.validation(1)])
        monkeypatch.undo()
        assert (read == []) == (most == bytes_learnt)
    assert all(torch.equal(a, b) for a, b in zip(*taught, strict=True))
