from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.volume import (
    open_volume,
    read_box,
)
from tests.support import LEAD, array, bare_zarr, image_like, ome_image, other_folder, plain_group, put_multiscales

BOXES = [
    Box(Span(0, 6), Span(0, 37), Span(0, 41)),
    Box(Span(2, 3), Span(5, 30), Span(40, 41)),
    Box(Span(1, 6), Span(31, 37), Span(0, 33)),
]


def multiscales(path: Path) -> dict[str, Any]:
    attributes = zarr.open_group(path, mode="r").attrs.asdict()
    image: dict[str, Any] = attributes.get("ome", attributes)["multiscales"][0]
    return image


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("ndim", [3, 4, 5])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_read_box_of_a_bare_array_equals_numpy_slicing(tmp_path: Path, zarr_format: int, ndim: int, box: Box) -> None:
    voxels = image_like((6, 37, 41), "uint16")
    full = voxels.reshape((1,) * (ndim - 3) + voxels.shape)
    chunks = (1,) * (ndim - 3) + (4, 16, 16)
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", full, chunks, zarr_format=zarr_format))
    assert volume.axes == (*LEAD[ndim], "z", "y", "x")
    np.testing.assert_array_equal(read_box(volume, box), voxels[box.within(volume.box)])


@pytest.mark.parametrize("ndim", [3, 4, 5])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_read_box_of_an_ome_image_equals_numpy_slicing(tmp_path: Path, zarr_format: int, ndim: int) -> None:
    voxels = image_like((6, 37, 41))
    full = voxels.reshape((1,) * (ndim - 3) + voxels.shape)
    volume = open_volume(ome_image(tmp_path / "a.zarr", full, zarr_format))
    assert volume.axes == (*LEAD[ndim], "z", "y", "x")
    for box in BOXES:
        np.testing.assert_array_equal(read_box(volume, box), voxels[box.within(volume.box)])


@pytest.mark.parametrize("stored", ["u1", "<u2", ">u2", "<f4", ">f4"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_voxels_are_read_in_native_byte_order_whatever_the_file_s(
    tmp_path: Path, zarr_format: int, stored: str
) -> None:
    native = np.dtype(stored).newbyteorder("=")
    voxels = image_like((3, 9, 8), native.name)
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", voxels.astype(stored), zarr_format=zarr_format))
    found = read_box(volume, volume.box)
    assert volume.dtype == native.name
    assert volume.itemsize == native.itemsize
    assert found.dtype == native
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, voxels)


def test_voxels_stored_in_fortran_order_are_read_in_c_order(tmp_path: Path) -> None:
    voxels = image_like((6, 37, 41))
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", voxels, (4, 16, 16), zarr_format=2, order="F"))
    found = read_box(volume, BOXES[2])
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, voxels[BOXES[2].within(volume.box)])


@pytest.mark.parametrize("shards", [None, (8, 32, 32)])
def test_chunk_and_write_unit_are_the_array_s(tmp_path: Path, shards: tuple[int, ...] | None) -> None:
    voxels = image_like((9, 40, 40))
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", voxels, chunks=(4, 16, 16), shards=shards))
    assert volume.chunk == (4, 16, 16)
    assert volume.write_unit == (shards or volume.chunk)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_level_of_a_multiscale_image_opens_with_its_own_voxels_and_size(tmp_path: Path, zarr_format: int) -> None:
    voxels = image_like((6, 37, 41))
    path = ome_image(tmp_path / "a.zarr", voxels, zarr_format, levels=3)
    assert open_volume(path) == open_volume(path, level=0)
    for level in range(3):
        volume = open_volume(path, level)
        assert volume.url == f"{path}/{level}"
        assert volume.voxel_nm == (4.0, 4.0 * 2**level, 4.0 * 2**level)
        np.testing.assert_array_equal(read_box(volume, volume.box), voxels[:, :: 2**level, :: 2**level])


@pytest.mark.parametrize("level", [2, -1])
def test_a_level_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path, level: int) -> None:
    path = ome_image(tmp_path / "a.zarr", image_like((4, 8, 8)), levels=2)
    with pytest.raises(InputError, match=rf"has no level {level}: its levels are 0 to 1"):
        open_volume(path, level)


def test_a_level_whose_array_is_missing_is_refused_by_its_path(tmp_path: Path) -> None:
    path = ome_image(tmp_path / "a.zarr", image_like((4, 8, 8)))
    put_multiscales(path, multiscales(path) | {"datasets": [multiscales(path)["datasets"][0] | {"path": "elsewhere"}]})
    with pytest.raises(InputError, match=r"a\.zarr/elsewhere"):
        open_volume(path)


@pytest.mark.parametrize(
    ("unit", "scale"),
    [("nanometer", (8.0, 4.0, 4.5)), ("micrometer", (0.008, 0.004, 0.0045)), ("angstrom", (80.0, 40.0, 45.0))],
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_voxel_sizes_are_in_nm_whatever_the_unit(
    tmp_path: Path, zarr_format: int, unit: str, scale: tuple[float, float, float]
) -> None:
    volume = open_volume(ome_image(tmp_path / "a.zarr", image_like((4, 8, 8)), zarr_format, unit=unit, scale=scale))
    assert volume.in_nm
    assert volume.voxel_nm == (8.0, 4.0, 4.5)


def test_without_units_the_voxel_size_is_the_file_s_own_and_not_nm(tmp_path: Path) -> None:
    volume = open_volume(ome_image(tmp_path / "a.zarr", image_like((4, 8, 8)), unit=None, scale=(8.0, 4.0, 4.5)))
    assert not volume.in_nm
    assert volume.voxel_nm is None
    assert volume.voxel_size == (8.0, 4.0, 4.5)


def test_a_bare_array_has_no_voxel_size(tmp_path: Path) -> None:
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", image_like((4, 8, 8))))
    assert volume.voxel_nm is None


def test_transformations_of_the_level_then_of_the_image_apply_in_order(tmp_path: Path) -> None:
    path = ome_image(tmp_path / "a.zarr", image_like((4, 8, 8))[None], unit="micrometer")
    image = multiscales(path)
    image["datasets"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0, 1.0, 2.0, 3.0]},
        {"type": "translation", "translation": [0.0, 10.0, 20.0, 30.0]},
    ]
    image["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0, 0.004, 0.004, 0.002]},
        {"type": "translation", "translation": [0.0, 1.0, 0.0, -1.0]},
    ]
    put_multiscales(path, image)
    volume = open_volume(path)
    assert volume.voxel_nm == pytest.approx((4.0, 8.0, 6.0))
    assert volume.origin == pytest.approx((1040.0, 80.0, -940.0))


def empty_folder(path: Path) -> None:
    path.mkdir()


def plain_file(path: Path) -> None:
    path.write_bytes(b"MM\x00*")


def torn_metadata(path: Path) -> None:
    metadata = bare_zarr(path, image_like((4, 8, 8))) / "zarr.json"
    metadata.write_bytes(metadata.read_bytes()[:100])


def torn_v2_metadata(path: Path) -> None:
    metadata = bare_zarr(path, image_like((4, 8, 8)), zarr_format=2) / ".zarray"
    metadata.write_bytes(metadata.read_bytes()[:100])


def no_metadata_but(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "zarr.json").write_bytes(content)

    return make


def metadata_with(**changes: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        metadata = bare_zarr(path, image_like((4, 8, 8))) / "zarr.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | changes))

    return make


def empty_group(path: Path) -> None:
    zarr.open_group(path, mode="w")


def damaged_multiscales(path: Path) -> None:
    ome_image(path, image_like((4, 8, 8)))
    put_multiscales(path, {"axes": multiscales(path)["axes"]})


def ome_axes(names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        ome_image(path, np.zeros((1,) * (len(names) - 3) + (4, 8, 8), np.uint8))
        put_multiscales(path, multiscales(path) | {"axes": [{"name": name} for name in names]})

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is nothing there"),
        (empty_folder, "there is nothing there"),
        (other_folder, "is not a Zarr volume"),
        (plain_file, "is not a Zarr volume"),
        (torn_metadata, r"zarr\.json is damaged: it cannot be read"),
        (torn_v2_metadata, r"\.zarray is damaged: it cannot be read"),
        (no_metadata_but(b""), r"zarr\.json is damaged: it cannot be read"),
        (no_metadata_but(b"\xff\xfe\x00"), r"zarr\.json is damaged: it cannot be read"),
        (no_metadata_but(b"[]"), r"zarr\.json is damaged: it holds no table"),
        (no_metadata_but(b"null"), r"zarr\.json is damaged: it holds no table"),
        (no_metadata_but(b"{}"), r"damaged Zarr.*\(zarr_format"),
        (metadata_with(shape=None), "its shape None is not made of sizes"),
        (metadata_with(codecs=[{"name": "no-such-codec"}]), "damaged Zarr"),
        (metadata_with(data_type="no-such-type"), "damaged Zarr"),
        (metadata_with(fill_value=-1), "damaged Zarr"),
        (plain_group, r"name one of its arrays \(labels, raw\)"),
        (empty_group, r"name one of its arrays \(none\)"),
        (damaged_multiscales, "multiscales metadata is damaged"),
        (array((8, 8)), "expected z,y,x"),
        (array((4, 8, 8), dimension_names=("x", "y", "z")), "axes x,y,z: expected z,y,x"),
        (array((1, 1, 1, 4, 8, 8)), "expected z,y,x"),
        (array((2, 4, 8, 8)), "2 entries along axis c"),
        (array((3, 1, 4, 8, 8)), "3 entries along axis t"),
        (array((1, 4, 8, 8), dimension_names=("q", "z", "y", "x")), "along axis q"),
        (array((4, 8, 8), "int32"), "holds int32 voxels: expected uint8, uint16, float32"),
        (array((4, 8, 8), "float64"), "holds float64 voxels"),
        (array((4, 8, 8), "bool"), "holds bool voxels"),
        (array((0, 8, 8)), r"is empty: its shape is \(0, 8, 8\)"),
        (array((4, 8, 0)), "is empty"),
        (ome_axes("xyz"), "axes x,y,z: expected z,y,x"),
        (ome_axes("zcyx"), "axes z,c,y,x: expected z,y,x"),
        (ome_axes("yx"), "damaged|expected z,y,x"),
    ],
)
def test_what_is_no_volume_is_refused_by_path_and_reason(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "source.zarr"
    make(path)
    with pytest.raises(InputError, match=words) as refusal:
        open_volume(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("level", [1, -1])
def test_a_bare_array_has_level_0_alone(tmp_path: Path, level: int) -> None:
    source = bare_zarr(tmp_path / "in.zarr", image_like((2, 8, 8)))
    with pytest.raises(InputError, match=f"has no level {level}: it is a bare array"):
        open_volume(source, level)
