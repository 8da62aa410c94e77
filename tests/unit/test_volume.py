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

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.volume import (
    Volume,
    create_volume,
    get_provenance,
    is_zarr,
    open_volume,
    read_ahead,
    read_box,
    set_provenance,
    stored_units,
    write_box,
)
from tests.support import array, bare_zarr, image_like, ome_image, other_folder, plain_group, stored_chunks


def described(group: Path, shape: tuple[int, int, int] = (10, 37, 41), **fields: Any) -> Volume:
    """A volume to create: two chunks a shard along every axis, unless said otherwise."""
    ours: dict[str, Any] = {"dtype": "uint8", "chunk": (4, 16, 16), "write_unit": (8, 32, 32)}
    return Volume(url=f"{group}/0", level_path="0", shape=shape, **(ours | fields))


def written(volume: Volume, voxels: NDArray[Any]) -> Volume:
    create_volume(volume, {})
    for unit in boxes_of(volume.box, volume.write_unit):
        write_box(volume, unit, voxels[unit.within(volume.box)])
    return volume


def chunk_metadata(volume: Volume) -> dict[str, Any]:
    """zarr.json of a created array, as anybody finds it."""
    metadata: dict[str, Any] = json.loads((Path(volume.url) / "zarr.json").read_text())
    return metadata


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all chunks and shards of local volumes that are read from now on."""
    keys: list[str] = []
    read_file = storage.read_file

    def noted(url: str, start: int = 0, stop: int | None = None) -> bytes | None:
        if "/c/" in url:
            keys.append("c/" + url.rpartition("/c/")[2])
        return read_file(url, start, stop)

    monkeypatch.setattr(storage, "read_file", noted)
    return keys


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://test_volume"
    files = fsspec.filesystem("memory")
    if files.exists("/test_volume"):
        files.rm("/test_volume", recursive=True)


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
    opened = open_volume(tmp_path / "out.zarr")
    assert replace(opened, metadata="") == volume


def test_an_opened_volume_carries_its_metadata_so_that_no_reader_reads_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = image_like((10, 37, 41))
    written(described(tmp_path / "out.zarr"), voxels)
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "out.zarr")))
    assert json.loads(volume.metadata) == chunk_metadata(volume)
    (Path(volume.url) / "zarr.json").unlink()
    (tmp_path / "out.zarr" / "zarr.json").unlink()
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)
    write_box(volume, volume.box, 255 - voxels)
    np.testing.assert_array_equal(read_box(volume, volume.box), 255 - voxels)


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
    assert replace(open_volume(f"{memory_url}/out.zarr"), metadata="") == volume
    np.testing.assert_array_equal(read_box(volume, volume.box), voxels)


def test_provenance_is_kept_beside_the_image_metadata(tmp_path: Path) -> None:
    group = str(tmp_path / "out.zarr")
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {"state": "begun"})
    assert get_provenance(group) == {"state": "begun"}
    set_provenance(group, {"state": "done", "of": [1, 2]})
    assert get_provenance(group) == {"state": "done", "of": [1, 2]}
    assert replace(open_volume(group), metadata="") == volume


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
    assert stored_units(volume).keys() == set(units)


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


def test_outputs_are_zstd_with_a_checksum_on_each_chunk_and_each_index(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {})
    assert chunk_metadata(volume)["chunk_grid"]["configuration"]["chunk_shape"] == [8, 32, 32]
    (shard,) = chunk_metadata(volume)["codecs"]
    assert shard["name"] == "sharding_indexed"
    assert shard["configuration"]["chunk_shape"] == [4, 16, 16]
    assert [codec["name"] for codec in shard["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [codec["name"] for codec in shard["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


def test_outputs_without_shards_are_zstd_with_a_checksum_too(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=(4, 16, 16))
    create_volume(volume, {})
    assert chunk_metadata(volume)["chunk_grid"]["configuration"]["chunk_shape"] == [4, 16, 16]
    assert [codec["name"] for codec in chunk_metadata(volume)["codecs"]] == ["bytes", "zstd", "crc32c"]


@pytest.mark.parametrize("write_unit", [(8, 32, 32), (4, 16, 16)], ids=["sharded", "not sharded"])
@pytest.mark.parametrize("axes", [("z", "y", "x"), ("t", "c", "z", "y", "x")], ids="".join)
def test_writing_tells_the_bytes_and_checksum_of_each_object(
    tmp_path: Path, axes: tuple[str, ...], write_unit: tuple[int, int, int]
) -> None:
    volume = described(tmp_path / "out.zarr", write_unit=write_unit, axes=axes)
    create_volume(volume, {})
    told = write_box(volume, volume.box, image_like(volume.shape))
    stored = stored_chunks(Path(volume.url))
    assert told == {key: (len(data), storage.digest(data)) for key, data in stored.items()}
    assert len(told) == len(list(boxes_of(volume.box, write_unit)))


def test_the_units_that_storage_lists_are_those_written_with_their_bytes(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr", axes=("t", "c", "z", "y", "x"))
    create_volume(volume, {})
    assert stored_units(volume) == {}
    unit = Box(Span(8, 10), Span(32, 37), Span(0, 32))
    ((_, (size, _)),) = write_box(volume, unit, image_like(unit.shape)).items()
    assert stored_units(volume) == {unit: size}


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


def test_metadata_that_was_changed_under_a_begun_output_is_refused(tmp_path: Path) -> None:
    volume = described(tmp_path / "out.zarr")
    create_volume(volume, {})
    with pytest.raises(InputError, match="was changed since it was begun"):
        create_volume(replace(volume, dtype="uint16"), {})
    create_volume(volume, {})


def test_one_part_is_read_ahead_of_the_one_at_work() -> None:
    begun: list[int] = []

    def read(part: int) -> int:
        begun.append(part)
        if part == 4:
            raise StorageError("gone")
        return part * part

    assert [*read_ahead(read, [])] == []
    assert [*read_ahead(read, range(4))] == [0, 1, 4, 9]
    begun.clear()
    coming = read_ahead(read, range(9))
    assert next(coming) == 0
    coming.close()
    assert begun == [0, 1]
    with pytest.raises(StorageError, match="gone"):
        [*read_ahead(read, range(9))]
    assert begun == [0, 1, 0, 1, 2, 3, 4]
