"""What a volume is, and its Zarr metadata: parsed once, refused if hostile, carried along instead of read again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

from nrrn_pipeline import ome
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, box_of
from nrrn_pipeline.volume.codecs import MAX_CODECS, bounded

if TYPE_CHECKING:
    import xarray

DTYPES = ("uint8", "uint16", "float32")
MAX_AXIS = 2**24  # voxels; the longest axis ever imaged has a hundredth of that
MAX_CHUNK_BYTES = 2**31  # one chunk is decoded whole, in memory
MAX_METADATA_BYTES = 2**20
METADATA_FILE = {3: "zarr.json", 2: ".zarray"}  # of an array

Metadata = ArrayV2Metadata | ArrayV3Metadata


@dataclass(frozen=True)
class Volume:
    """A description of one stored 3-D array; it holds nothing open, so it pickles.

    shape, chunk and write_unit are voxels in z, y, x order; write_unit is the shard if sharded, else the chunk.
    voxel_size and origin are nm if in_nm; where a file names no unit they are the file's own numbers. level_path is the
    array's place in its OME-Zarr group; a bare array has none. metadata is the array's own, as JSON; one that is yet
    to be created has none. zarr_format is 3, or 2, which has no shards.
    """

    url: str
    shape: Shape
    dtype: str
    chunk: Shape
    write_unit: Shape
    axes: tuple[str, ...] = ("z", "y", "x")
    voxel_size: ome.Triple = (1.0, 1.0, 1.0)
    origin: ome.Triple = (0.0, 0.0, 0.0)
    in_nm: bool = False
    level_path: str = ""
    metadata: str = ""
    zarr_format: int = 3

    @property
    def group_url(self) -> str:
        """The OME-Zarr group that the array is a level of; a bare array's own URL."""
        return self.url.removesuffix(f"/{self.level_path}") if self.level_path else self.url

    @property
    def lead_axes(self) -> int:
        """How many single t and c axes stand before z, y, x in storage."""
        return len(self.axes) - 3

    @property
    def box(self) -> Box:
        """All of its voxels."""
        return box_of(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one voxel."""
        return np.dtype(self.dtype).itemsize

    @property
    def voxel_nm(self) -> ome.Triple | None:
        """Voxel size in nm, if the file says."""
        return self.voxel_size if self.in_nm else None

    def to_xarray(self) -> xarray.DataArray:
        """A lazy (z, y, x) DataArray in the array's own chunks, with coordinates of the voxels' centres.

        They are in nm if `in_nm`, else in the file's own numbers; their attribute `units` says which. xarray.open_zarr
        opens groups too, without coordinates, if it is given consolidated=False, drop_variables with the names of all
        levels but one ("1", "2", ...), as their sizes differ, and for OME-Zarr 0.4 mask_and_scale=False.
        """
        from nrrn_pipeline.volume.voxels import to_xarray

        return to_xarray(self)


def zarr_metadata(volume: Volume) -> Metadata:
    """Zarr's metadata object of a volume that was opened, or is about to be created."""
    return _parsed(volume.metadata or new_metadata(volume))


@lru_cache(maxsize=16)
def _parsed(metadata: str) -> Metadata:
    """Raises whatever zarr raises for malformed metadata, InputError for hostile ones."""
    document = json.loads(metadata)
    _refuse_hostile(document)
    kind = ArrayV3Metadata if document["zarr_format"] == 3 else ArrayV2Metadata
    return cast("Metadata", bounded(cast("Any", kind).from_dict(document)))


def refuse_unwritable(volume: Volume) -> None:
    """Raises InputError if a volume that is to be created could not be read again: shards or indexes too large."""
    try:
        zarr_metadata(volume)
    except InputError as error:
        raise InputError(f"shards of {volume.write_unit} in chunks of {volume.chunk} cannot be: {error}") from error


@lru_cache(maxsize=16)
def new_metadata(volume: Volume) -> str:
    """zarr.json of an array that is about to be created: zstd, and a CRC-32C on each chunk and shard index.

    Of Zarr 2, whose readers know no checksums, .zarray: what they all know.
    """
    lead = (1,) * volume.lead_axes
    how: dict[str, Any] = {
        "shards": None if volume.write_unit == volume.chunk else lead + volume.write_unit,
        "compressors": [ZstdCodec(level=3), Crc32cCodec()],  # without a checksum most flipped bits decode unnoticed
        "dimension_names": volume.axes,
    }
    if volume.zarr_format == 2:
        keys = {"name": "v2", "separator": "/"}
        how = {"zarr_format": 2, "compressors": numcodecs.Blosc("zstd", 3), "chunk_key_encoding": keys}
    array = zarr.create_array(
        {}, shape=lead + volume.shape, dtype=volume.dtype, chunks=lead + volume.chunk, fill_value=0, **how
    )
    files = array.metadata.to_buffer_dict(default_buffer_prototype())
    return files[METADATA_FILE[volume.zarr_format]].to_bytes().decode()


def describe(
    document: Mapping[str, Any], url: str, level: ome.Level | None, dtypes: tuple[str, ...] = DTYPES
) -> Volume:
    """The volume of an array's metadata; `level` says what its OME-Zarr group says of it, None for a bare array.

    Raises InputError if the metadata are damaged or hostile, or it is no single-channel 3-D volume of the dtypes.
    """
    text = json.dumps({**document, "attributes": {}})  # it goes with every task; attributes may be long
    try:
        metadata = _parsed(text)
    except InputError as error:
        raise InputError(f"{url} cannot be used: {error}") from error
    except Exception as error:  # zarr raises all kinds of errors for malformed metadata
        raise InputError(f"{url} is a damaged Zarr: its metadata cannot be read ({error})") from error
    array: Any = zarr.Array(zarr.AsyncArray(metadata, zarr.storage.StorePath(zarr.storage.MemoryStore())))
    level = level or ome.Level("", _own_axes(array), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), in_nm=False)
    dtype = _refuse_unusable(array, url, level, dtypes)
    return Volume(
        url=url,
        shape=_last3(array.shape),
        dtype=dtype,
        chunk=_last3(array.chunks),
        write_unit=_last3(array.shards or array.chunks),
        axes=level.axes,
        voxel_size=level.voxel_size,
        origin=level.origin,
        in_nm=level.in_nm,
        level_path=level.path,
        metadata=text,
        zarr_format=metadata.zarr_format,
    )


def _own_axes(array: Any) -> tuple[str, ...]:
    names = getattr(array.metadata, "dimension_names", None)
    if names and all(names):
        return tuple(str(name).lower() for name in names)
    by_number = {3: ("z", "y", "x"), 4: ("c", "z", "y", "x"), 5: ("t", "c", "z", "y", "x")}
    return by_number.get(array.ndim, ("?",) * int(array.ndim))


def _refuse_unusable(array: Any, url: str, level: ome.Level, dtypes: tuple[str, ...]) -> str:
    """Its dtype's name, if it is one of these and the shape is a volume's."""
    lead = array.ndim - 3
    if lead < 0 or level.axes[-3:] != ("z", "y", "x") or len(level.axes) != array.ndim:
        raise InputError(
            f"{url} has axes {','.join(level.axes)}: expected z,y,x, with single t and c axes before at most"
        )
    for axis, length in zip(level.axes[:lead], array.shape, strict=False):
        if length != 1 or axis not in ("t", "c"):
            raise InputError(f"{url} has {length} entries along axis {axis}: expected single t and c axes before z,y,x")
    dtype = str(np.dtype(array.dtype).newbyteorder("=").name)
    if dtype not in dtypes:
        raise InputError(f"{url} holds {dtype} voxels: expected {', '.join(dtypes)}")
    if 0 in array.shape:
        raise InputError(f"{url} is empty: its shape is {array.shape}")
    return dtype


def _refuse_hostile(document: Mapping[str, Any]) -> None:
    """Raises InputError for sizes that would take all memory, or that are none, before anybody computes with them."""
    shape = document["shape"]
    grid = (
        document["chunk_grid"]["configuration"]["chunk_shape"] if document["zarr_format"] == 3 else document["chunks"]
    )
    for codecs in _codec_lists(document):
        if isinstance(codecs, Sequence) and len(codecs) > MAX_CODECS:
            raise InputError(f"it has {len(codecs)} codecs one after the other: expected {MAX_CODECS} at most")
    for name, sizes, least in (("shape", shape, 0), ("chunk", grid, 1)):
        if not isinstance(sizes, Sequence) or not all(type(size) is int and size >= least for size in sizes):
            raise InputError(f"its {name} {_short(sizes)} is not made of sizes of {least} or more")
    if len(shape) != len(grid) or len(shape) > 8 or max(shape, default=0) > MAX_AXIS:
        raise InputError(f"its shape {_short(shape)} is not that of a volume: at most {MAX_AXIS} voxels along an axis")
    if 8 * prod(grid) > 4 * MAX_CHUNK_BYTES:
        raise InputError(f"its chunks of {_short(grid)} voxels cannot be decoded in memory: rechunk it")


def _codec_lists(value: Any) -> Iterator[Any]:
    """All lists of codecs and filters, also those inside of others."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in ("codecs", "index_codecs", "filters"):
                yield inner
            yield from _codec_lists(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _codec_lists(inner)


def _short(value: Any) -> str:
    return f"{value!r:.100}"


def _last3(values: tuple[int, ...]) -> Shape:
    return cast("Shape", tuple(int(value) for value in values[-3:]))


def name_of(url: str) -> str:
    """The last part of a URL."""
    return os.path.basename(url)
