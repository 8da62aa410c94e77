from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array
import fsspec
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image
from zarr.storage import LocalStore

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.volume import (
    Volume,
    create_volume,
    get_provenance,
    is_zarr,
    missing_chunks,
    open_volume,
    read_box,
    set_provenance,
    write_box,
)
from tests.support import bare_zarr, image_like, stored_chunks

LEAD = {3: (), 4: ("c",), 5: ("t", "c")}
BOXES = [
    Box(Span(0, 6), Span(0, 37), Span(0, 41)),
    Box(Span(2, 3), Span(5, 30), Span(40, 41)),
    Box(Span(1, 6), Span(31, 37), Span(0, 33)),
]


def ome_image(
    path: Path,
    voxels: NDArray[Any],
    zarr_format: int = 3,
    levels: int = 1,
    unit: str | None = "nanometer",
    scale: tuple[float, float, float] = (4.0, 4.0, 4.0),
) -> Path:
    """An OME-Zarr group, 0.5 or 0.4; every level takes every other voxel of the one before, in y and x."""
    axes = [*LEAD[voxels.ndim], "z", "y", "x"]
    spatial = {"type": "space"} | ({"unit": unit} if unit else {})
    datasets = []
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for level in range(levels):
        data = voxels[..., :: 2**level, :: 2**level]
        keys = {"name": "v2", "separator": "/"} if zarr_format == 2 else None
        chunks = (1,) * (data.ndim - 3) + (4, 16, 16)
        group.create_array(str(level), data=data, chunks=chunks, chunk_key_encoding=keys)
        sizes = [1.0] * (data.ndim - 3) + [scale[0], scale[1] * 2**level, scale[2] * 2**level]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": sizes}]})
    image = {
        "axes": [{"name": axis, **(spatial if axis in "zyx" else {})} for axis in axes],
        "datasets": datasets,
    }
    put_multiscales(path, image)
    return path


def put_multiscales(path: Path, image: dict[str, Any]) -> None:
    group = zarr.open_group(path, mode="r+")
    if group.metadata.zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{"version": "0.4", **image}]


def multiscales(path: Path) -> dict[str, Any]:
    attributes = zarr.open_group(path, mode="r").attrs.asdict()
    image: dict[str, Any] = attributes.get("ome", attributes)["multiscales"][0]
    return image


def described(group: Path, shape: tuple[int, int, int] = (10, 37, 41), **fields: Any) -> Volume:
    """A volume to create: two chunks a shard along every axis, unless said otherwise."""
    ours: dict[str, Any] = {"dtype": "uint8", "chunk": (4, 16, 16), "write_unit": (8, 32, 32)}
    return Volume(url=f"{group}/0", level_path="0", shape=shape, **(ours | fields))


def written(volume: Volume, voxels: NDArray[Any]) -> Volume:
    create_volume(volume, {})
    for unit in boxes_of(volume.box, volume.write_unit):
        write_box(volume, unit, voxels[unit.within(volume.box)])
    return volume


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all chunks and shards that are read from local stores from now on."""
    keys: list[str] = []
    get, get_sync, get_partial_values = LocalStore.get, LocalStore.get_sync, LocalStore.get_partial_values

    def note(key: str) -> None:
        if not key.endswith(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")):
            keys.append(key)

    async def noted_get(store: LocalStore, key: str, *args: Any, **options: Any) -> Any:
        note(key)
        return await get(store, key, *args, **options)

    def noted_get_sync(store: LocalStore, key: str, **options: Any) -> Any:
        note(key)
        return get_sync(store, key, **options)

    async def noted_get_partial_values(store: LocalStore, prototype: Any, key_ranges: Any) -> Any:
        wanted = list(key_ranges)
        for key, _ in wanted:
            note(key)
        return await get_partial_values(store, prototype, wanted)

    monkeypatch.setattr(LocalStore, "get", noted_get)
    monkeypatch.setattr(LocalStore, "get_sync", noted_get_sync)
    monkeypatch.setattr(LocalStore, "get_partial_values", noted_get_partial_values)
    return keys


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://test_volume"
    files = fsspec.filesystem("memory")
    if files.exists("/test_volume"):
        files.rm("/test_volume", recursive=True)


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


def other_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no Zarr")


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


def plain_group(path: Path) -> None:
    group = zarr.open_group(path, mode="w")
    for name in ("raw", "labels"):
        group.create_array(name, shape=(4, 8, 8), dtype="uint8")


def empty_group(path: Path) -> None:
    zarr.open_group(path, mode="w")


def damaged_multiscales(path: Path) -> None:
    ome_image(path, image_like((4, 8, 8)))
    put_multiscales(path, {"axes": multiscales(path)["axes"]})


def array(shape: tuple[int, ...], dtype: str = "uint8", **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        chunks = tuple(max(1, min(8, length)) for length in shape)
        zarr.create_array(path, shape=shape, dtype=dtype, chunks=chunks, **options)

    return make


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
        (torn_metadata, "damaged Zarr"),
        (torn_v2_metadata, "damaged Zarr"),
        (no_metadata_but(b""), "damaged Zarr"),
        (no_metadata_but(b"\xff\xfe\x00"), "damaged Zarr"),
        (no_metadata_but(b"[]"), "damaged Zarr"),
        (no_metadata_but(b"null"), "damaged Zarr"),
        (no_metadata_but(b"{}"), "damaged Zarr|is a Zarr group without"),
        (metadata_with(shape=None), "damaged Zarr"),
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    ("shape", "chunk", "write_unit"),
    [
        ((10, 37, 41), (4, 16, 16), (8, 32, 32)),
        ((5, 33, 7), (2, 16, 7), (2, 16, 7)),
        ((3, 5, 6), (4, 8, 8), (4, 16, 16)),
        ((1, 64, 64), (1, 16, 16), (1, 64, 64)),
    ],
)
@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_what_is_written_as_whole_units_is_read_back(
    tmp_path: Path,
    axes: tuple[str, ...],
    shape: tuple[int, int, int],
    chunk: tuple[int, int, int],
    write_unit: tuple[int, int, int],
    dtype: str,
) -> None:
    voxels = image_like(shape, dtype)
    volume = described(tmp_path / "out.zarr", shape, dtype=dtype, chunk=chunk, write_unit=write_unit, axes=axes)
    written(volume, voxels)
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)


@pytest.mark.parametrize("in_nm", [True, False])
@pytest.mark.parametrize("axes", [("z", "y", "x"), ("c", "z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_a_created_volume_opens_as_it_was_described(tmp_path: Path, axes: tuple[str, ...], in_nm: bool) -> None:
    place = {"voxel_size": (8.0, 4.0, 4.5), "origin": (80.0, 0.0, -9.0), "in_nm": in_nm}
    volume = described(tmp_path / "out.zarr", axes=axes, **place)
    create_volume(volume, {})
    assert open_volume(tmp_path / "out.zarr") == volume


@pytest.mark.parametrize("in_nm", [True, False])
@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_a_created_group_is_valid_ome_zarr(tmp_path: Path, axes: tuple[str, ...], in_nm: bool) -> None:
    place = {"voxel_size": (8.0, 4.0, 4.5), "origin": (80.0, 0.0, 9.0), "in_nm": in_nm}
    create_volume(described(tmp_path / "out.zarr", axes=axes, **place), {"any": "thing"})
    image = Image.from_zarr(zarr.open_group(tmp_path / "out.zarr", mode="r"))
    assert [axis.name for axis in image.attributes.ome.multiscales[0].axes] == list(axes)


def test_a_volume_in_an_object_store_is_written_and_read_back(memory_url: str) -> None:
    voxels = image_like((10, 37, 41))
    volume = written(replace(described(Path("unused")), url=f"{memory_url}/out.zarr/0"), voxels)
    assert open_volume(f"{memory_url}/out.zarr") == volume
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)
    assert all(missing_chunks(volume, unit) == [] for unit in boxes_of(volume.box, volume.write_unit))


def test_provenance_is_kept_beside_the_image_metadata(tmp_path: Path) -> None:
    group = str(tmp_path / "out.zarr")
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {"state": "begun"})
    assert get_provenance(group) == {"state": "begun"}
    set_provenance(group, {"state": "done", "of": [1, 2]})
    assert get_provenance(group) == {"state": "done", "of": [1, 2]}
    assert open_volume(group) == volume


def test_a_group_of_others_has_no_provenance(tmp_path: Path) -> None:
    assert get_provenance(str(ome_image(tmp_path / "a.zarr", image_like((4, 8, 8))))) is None


@pytest.mark.parametrize(
    ("make", "expected"),
    [(plain_group, True), (array((4, 8)), True), (lambda path: None, False), (other_folder, False)],
)
def test_is_zarr_tells_zarr_from_the_rest(tmp_path: Path, make: Callable[[Path], None], expected: bool) -> None:
    make(tmp_path / "a.zarr")
    assert is_zarr(str(tmp_path / "a.zarr")) is expected


@pytest.mark.parametrize("write_unit", [(8, 32, 32), (4, 16, 16)], ids=["sharded", "not sharded"])
@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_black_voxels_are_stored_and_not_missing(
    tmp_path: Path, axes: tuple[str, ...], write_unit: tuple[int, int, int]
) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=write_unit, axes=axes)
    written(volume, np.zeros(volume.shape, np.uint8))
    units = list(boxes_of(volume.box, write_unit))
    assert len(stored_chunks(Path(volume.url))) == len(units)
    assert [missing_chunks(volume, unit) for unit in units] == [[]] * len(units)


@pytest.mark.parametrize("write_unit", [(8, 32, 32), (4, 16, 16)], ids=["sharded", "not sharded"])
def test_all_chunks_of_a_deleted_file_are_missing(tmp_path: Path, write_unit: tuple[int, int, int]) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=write_unit)
    written(volume, image_like(volume.shape))
    first, *others, last = boxes_of(volume.box, write_unit)
    place = "/".join(str(span.start // size) for span, size in zip(last.spans, write_unit, strict=True))
    (Path(volume.url) / "c" / place).unlink()
    assert missing_chunks(volume, last) == [str(chunk) for chunk in boxes_of(last, volume.chunk)]
    assert all(missing_chunks(volume, unit) == [] for unit in [first, *others])


@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_one_chunk_that_was_never_written_into_a_shard_is_missing(tmp_path: Path, axes: tuple[str, ...]) -> None:
    volume = described(tmp_path / "out.zarr", axes=axes)
    unit = Box(Span(0, 8), Span(32, 37), Span(0, 32))
    absent = Box(Span(4, 8), Span(32, 37), Span(16, 32))
    voxels = np.ones(volume.shape, np.uint8)
    written(volume, voxels)
    voxels[absent.within(volume.box)] = 0
    lead = (0,) * (len(axes) - 3)
    with zarr.config.set({"array.write_empty_chunks": False}):
        zarr.open_array(volume.url, mode="r+")[lead + unit.within(volume.box)] = voxels[unit.within(volume.box)]
    assert missing_chunks(volume, unit) == [str(absent)]


def test_a_shard_shorter_than_its_index_is_an_error(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    written(volume, image_like(volume.shape))
    (Path(volume.url) / "c/0/0/0").write_bytes(b"torn")
    with pytest.raises(ValueError, match="4 bytes is shorter than a shard's index of 132"):
        missing_chunks(volume, Box(Span(0, 8), Span(0, 32), Span(0, 32)))


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1], ids=lambda kept: f"keep={kept}")
@pytest.mark.parametrize(
    "unit", [Box(Span(8, 10), Span(32, 37), Span(32, 41)), Box(Span(0, 8), Span(0, 32), Span(0, 32))], ids=str
)
def test_a_torn_shard_is_overwritten_like_any_other(tmp_path: Path, unit: Box, kept: float) -> None:
    volume = described(tmp_path / "out.zarr")
    voxels = image_like(volume.shape)
    written(volume, voxels)
    place = "/".join(str(span.start // size) for span, size in zip(unit.spans, volume.write_unit, strict=True))
    shard = Path(volume.url) / "c" / place
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    write_box(volume, unit, voxels[unit.within(volume.box)])
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)


def test_a_box_of_many_write_units_is_written_whole(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    voxels = image_like(volume.shape)
    create_volume(volume, {})
    write_box(volume, volume.box, voxels)
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)


@pytest.mark.parametrize("write_unit", [(8, 32, 32), (4, 16, 16)], ids=["sharded", "not sharded"])
def test_writing_reads_no_chunk_even_where_there_is_one(
    tmp_path: Path, chunk_reads: list[str], write_unit: tuple[int, int, int]
) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=write_unit)
    voxels = image_like(volume.shape)
    written(volume, voxels)
    for unit in boxes_of(volume.box, write_unit):
        write_box(volume, unit, voxels[unit.within(volume.box)])
    assert chunk_reads == []
    read_box(volume, volume.box)
    assert len(set(chunk_reads)) == math.prod(
        -(-length // size) for length, size in zip(volume.shape, write_unit, strict=True)
    )


def test_reading_a_box_reads_only_the_chunks_that_it_touches(tmp_path: Path, chunk_reads: list[str]) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=(4, 16, 16))
    written(volume, image_like(volume.shape))
    read_box(volume, Box(Span(3, 5), Span(16, 32), Span(40, 41)))
    assert sorted(chunk_reads) == ["c/0/1/2", "c/1/1/2"]


@pytest.mark.parametrize(
    "box",
    [
        Box(Span(0, 4), Span(0, 32), Span(0, 32)),
        Box(Span(1, 9), Span(0, 32), Span(0, 32)),
        Box(Span(0, 8), Span(16, 37), Span(0, 32)),
        Box(Span(0, 8), Span(0, 32), Span(32, 40)),
        Box(Span(0, 8), Span(0, 32), Span(0, 31)),
    ],
    ids=str,
)
def test_a_box_that_is_not_made_of_whole_write_units_is_refused_and_nothing_written(tmp_path: Path, box: Box) -> None:
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {})
    with pytest.raises(ValueError, match="not made of whole write units"):
        write_box(volume, box, np.ones(box.shape, np.uint8))
    assert stored_chunks(Path(volume.url)) == {}


def test_writing_a_box_leaves_all_other_units_as_they_are(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    written(volume, image_like(volume.shape))
    before = stored_chunks(Path(volume.url))
    unit = Box(Span(8, 10), Span(0, 32), Span(32, 41))
    write_box(volume, unit, np.full(unit.shape, 7, np.uint8))
    after = stored_chunks(Path(volume.url))
    assert {key for key in before if before[key] != after[key]} == {"c/1/0/1"}
    assert before.keys() == after.keys()


def test_a_volume_pickles_and_holds_nothing_open(tmp_path: Path) -> None:
    volume = open_volume(ome_image(tmp_path / "a.zarr", image_like((4, 8, 8))))
    copy = pickle.loads(pickle.dumps(volume))
    assert copy == volume
    assert hash(copy) == hash(volume)
    np.testing.assert_array_equal(read_box(copy, copy.box), image_like((4, 8, 8)))


@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_xarray_equals_the_voxels_at_their_places_in_nm(tmp_path: Path, axes: tuple[str, ...]) -> None:
    place = {"voxel_size": (8.0, 4.0, 4.5), "origin": (80.0, 0.0, -9.0), "in_nm": True}
    voxels = image_like((10, 37, 41))
    lazy = written(described(tmp_path / "out.zarr", axes=axes, **place), voxels).to_xarray()
    assert lazy.dims == ("z", "y", "x")
    np.testing.assert_array_equal(lazy.values, voxels)
    for axis, length, size, origin in zip("zyx", voxels.shape, (8.0, 4.0, 4.5), (80.0, 0.0, -9.0), strict=True):
        np.testing.assert_array_equal(lazy[axis].values, [origin + i * size for i in range(length)])
        assert lazy[axis].attrs["units"] == "nm"


def test_xarray_reads_only_what_is_computed(tmp_path: Path, chunk_reads: list[str]) -> None:
    volume = written(described(tmp_path / "out.zarr", write_unit=(4, 16, 16)), image_like((10, 37, 41)))
    lazy = volume.to_xarray()
    assert isinstance(lazy.data, dask.array.Array)
    assert chunk_reads == []
    lazy[0, 0, 0].compute()
    assert chunk_reads == ["c/0/0/0"]


def test_xarray_without_units_says_that_they_are_unknown(tmp_path: Path) -> None:
    lazy = open_volume(bare_zarr(tmp_path / "a.zarr", image_like((4, 8, 8)))).to_xarray()
    assert lazy.x.attrs["units"] == "unknown"


@pytest.mark.parametrize(
    ("box", "voxels"),
    [
        (Box(Span(16, 24), Span(0, 32), Span(0, 32)), np.zeros((8, 32, 32), np.uint8)),
        (Box(Span(8, 16), Span(0, 32), Span(0, 32)), np.zeros((8, 32, 32), np.uint8)),
        (Box(Span(8, 10), Span(0, 32), Span(0, 32)), np.zeros((8, 32, 32), np.uint8)),
        (Box(Span(0, 8), Span(0, 32), Span(0, 32)), np.zeros((8, 32, 32), np.uint16)),
    ],
    ids=["outside", "beyond the end", "another shape", "another dtype"],
)
def test_voxels_that_do_not_fit_are_refused_and_not_dropped_or_converted(
    tmp_path: Path, box: Box, voxels: np.ndarray
) -> None:
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {})
    with pytest.raises(ValueError, match="box"):
        write_box(volume, box, voxels)


@pytest.mark.parametrize("level", [1, -1])
def test_a_bare_array_has_level_0_alone(tmp_path: Path, level: int) -> None:
    source = bare_zarr(tmp_path / "in.zarr", image_like((2, 8, 8)))
    with pytest.raises(InputError, match=f"has no level {level}: it is a bare array"):
        open_volume(source, level)


def test_metadata_that_was_changed_under_a_begun_output_is_refused(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {})
    with pytest.raises(InputError, match="was changed since it was begun"):
        create_volume(replace(volume, dtype="uint16"), {})
    create_volume(volume, {})
