"""Crops where a mask, or a part, leaves something to learn from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.training import masks
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.training.masks import BLOCK, best_window, blocks_of, image_blocks
from nrrn_pipeline.training.material import Material, TrainingVolume
from nrrn_pipeline.training.triplets import Triplets, triplets
from nrrn_pipeline.volume import Volume, open_volume
from tests.support import bare_zarr, image_like

SETTINGS = TrainSettings(units=1, channels=4, batch=200, crop=8, device="cpu", loss="adjacent", hold_out=0)
SHAPE = (7, 100, 90)


@given(data=st.data())
def test_blocks_have_what_the_mask_has(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (4, 70, 70))
    spans = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    box = Box(*(Span(*ends) for ends in spans))
    unit = tuple(data.draw(st.integers(1, 40)) for _ in shape)
    voxels = np.zeros(shape, np.uint8)
    for _ in range(data.draw(st.integers(0, 5))):
        voxels[tuple(data.draw(st.integers(0, n - 1)) for n in shape)] = 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masks, "read_box", lambda volume, cell: voxels[cell.within(volume.box)])
        patched.setattr(masks, "LEAST_READ", data.draw(st.integers(1, 50)))
        found = blocks_of(Volume("made up", shape, "uint8", unit, unit), box)
    expected = np.zeros_like(found)
    for z, y, x in np.argwhere(voxels):
        if all(span.start <= at < span.stop for span, at in zip(box.spans, (z, y, x), strict=True)):
            expected[z - box.z.start, y // BLOCK, x // BLOCK] = True
    np.testing.assert_array_equal(found, expected)


def test_blocks_of_a_frame_have_no_image(tmp_path: Path) -> None:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[:, 20:60, 40:] = 7
    voxels[2, 70, 5:] = 9
    volume = open_volume(bare_zarr(tmp_path / "v.zarr", voxels))
    found = image_blocks(volume, Box(Span(1, 3), *volume.box.spans[1:]))
    expected = np.zeros((2, 7, 6), bool)
    expected[:, 1:4, 2] = expected[1, 4, 0] = True  # where it begins
    np.testing.assert_array_equal(found, expected)


def made(folder: Path, mask: NDArray[np.bool_] | None = None, part: str | None = None) -> Triplets:
    """Crops of a volume whose voxels say where they are: along y in the slice before, along x in the one after."""
    y, x = np.meshgrid(np.arange(SHAPE[1]), np.arange(SHAPE[2]), indexing="ij")
    voxels = np.stack([(y if z % 2 else x) for z in range(SHAPE[0])]).astype(np.float32)
    source = bare_zarr(folder / "source.zarr", voxels)
    url = None if mask is None else bare_zarr(folder / "mask.zarr", mask.astype(np.uint8))
    roi = None if part is None else Box.parse(part)
    return triplets([TrainingVolume(source, mask=url, roi=roi).opened()], SETTINGS)


def corners(crops: Triplets) -> NDArray[np.int64]:
    """(crop, zyx) where each of a batch begins."""
    random, size = np.random.default_rng(1), crops.crop
    places = [crops.learnt[random.integers(len(crops.learnt))] for _ in range(300)]
    return np.array([(place.z, *place.corner(size, random)) for place in places])


def test_crops_lie_around_what_the_mask_has(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.bool_)
    mask[2, 20, 30] = mask[2, 80:83, 80:85] = mask[4, 0, 0] = True
    found = corners(made(tmp_path, mask))
    assert set(found[:, 0]) == {2, 4}
    middles = found[found[:, 0] == 2, 1:] + 4
    near = [np.abs(middles - (y, x)).max(axis=1) <= BLOCK + 4 for y, x in ((20, 30), (81, 82))]
    assert np.logical_or(*near).all()
    assert min(of.sum() for of in near) > 30
    assert found[found[:, 0] == 4, 1:].max() <= BLOCK
    assert found[:, 1:].min() >= 0
    assert (found[:, 1:].max(axis=0) <= (92, 82)).all()


def test_crops_lie_inside_the_part(tmp_path: Path) -> None:
    found = corners(made(tmp_path, part="1:6,10:40,50:70"))
    assert set(found[:, 0]) == {2, 3, 4}
    np.testing.assert_array_equal(found[:, 1:].min(axis=0), (10, 50))
    np.testing.assert_array_equal(found[:, 1:].max(axis=0), (32, 62))


def test_of_a_mask_only_what_lies_in_the_part_counts(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.bool_)
    mask[:, 5, 5] = mask[3, 60, 60] = True
    found = corners(made(tmp_path, mask, "0:7,20:100,20:90"))
    assert set(found[:, 0]) == {3}
    assert (found[:, 1:] >= 20).all()
    with pytest.raises(InputError, match=r"mask\.zarr leaves nothing of 0:7,70:100,70:90 in z=0:7, where"):
        made(tmp_path / "other", mask, "0:7,70:100,70:90")


def test_slices_are_normalised_whole_whatever_the_part(tmp_path: Path) -> None:
    crops = made(tmp_path, part="1:6,10:40,50:70")
    voxels = np.arange(SHAPE[1])
    for place in crops.learnt:
        for z, mean in zip(range(place.z - 1, place.z + 2), place.statistics.mean, strict=True):
            assert mean == pytest.approx(voxels.mean() if z % 2 else np.arange(SHAPE[2]).mean())


def test_crops_of_several_volumes_are_of_one_size_and_as_many_as_each_has_triplets(tmp_path: Path) -> None:
    small = bare_zarr(tmp_path / "small.zarr", image_like((4, 6, 30)))
    large = bare_zarr(tmp_path / "large.zarr", image_like((20, 40, 7), "uint16"))
    materials = [TrainingVolume(source).opened() for source in (small, large)]
    crops = triplets(materials, replace(SETTINGS, hold_out=0.2))
    assert crops.crop == (6, 7)
    assert next(crops.batches()).shape == (200, 3, 6, 7)
    learnt = [sum(place.material is of for place in crops.learnt) for of in materials]
    assert learnt == [2, 11]
    assert [crops.held_out_of(of) for of in materials] == [[], [8, 9, 10]]


def test_what_is_held_out_of_overlapping_parts_is_learnt_through_neither(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "source.zarr", image_like((40, 20, 20)))
    parts = (Box.parse("0:30,0:20,0:20"), Box.parse("10:40,0:20,0:20"))
    crops = triplets(
        [TrainingVolume(source, roi=part).opened() for part in parts], replace(SETTINGS, hold_out=0.1, batch=2)
    )
    learnt, held = (
        {place.z + apart for place in places for apart in (-1, 0, 1)} for places in (crops.learnt, crops.held_out)
    )
    assert held
    assert not learnt & held


def test_no_number_is_no_part_of_a_mask(tmp_path: Path) -> None:
    mask = np.full((4, 40, 40), np.nan, np.float32)
    mask[1, 3, 4] = 1
    volume = open_volume(bare_zarr(tmp_path / "mask.zarr", mask))
    assert np.argwhere(blocks_of(volume, volume.box)).tolist() == [[1, 0, 0]]


def test_the_best_window_is_where_most_of_the_mask_is() -> None:
    blocks = np.zeros((10, 9), np.bool_)
    part = Box.parse("2:9,5:150,3:140")
    found = partial(best_window, part=part, side=3 * BLOCK)
    blocks[1, 1] = True
    assert found({3: blocks, 4: np.zeros_like(blocks)}) == Box.parse("3:4,16:32,16:32")
    blocks[5:7, 6:9] = True
    assert found({3: blocks, 6: blocks, 8: np.zeros_like(blocks)}) == Box.parse("3:7,80:112,96:140")
    blocks[:] = True
    window = found({3: blocks})
    assert (window.y.start, len(window.y)) == (5, 43)
    assert (window.x.start, len(window.x)) == (3, 45)


def test_a_mask_is_read_once_in_units_of_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Box] = []

    def all_there(volume: Volume, box: Box) -> NDArray[np.uint8]:
        read.append(box)
        return np.ones(box.shape, np.uint8)

    monkeypatch.setattr(masks, "read_box", all_there)
    volume = open_volume(bare_zarr(tmp_path / "source.zarr", image_like((40, 30, 30))))
    mask = Volume("made up", (40, 30, 30), "uint8", (8, 16, 16), (8, 16, 16))
    triplets([Material(volume, volume.box, mask=mask)], SETTINGS)
    assert sum(box.size for box in read) == 40 * 30 * 30
    assert {box.z.start % 8 for box in read} == {0}
