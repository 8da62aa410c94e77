"""Volumes in Zarr: OME-Zarr 0.5 and 0.4 groups and bare arrays, in z, y, x order. The only file that knows zarr."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.errors import ArrayNotFoundError, GroupNotFoundError, NodeTypeValidationError
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from nrrn_pipeline import ome, storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, Span, box_of, boxes_of

if TYPE_CHECKING:
    import xarray

DTYPES = ("uint8", "uint16", "float32")
_AXES = {3: ("z", "y", "x"), 4: ("c", "z", "y", "x"), 5: ("t", "c", "z", "y", "x")}


@dataclass(frozen=True)
class Volume:
    """A description of one stored 3-D array; it holds nothing open, so it pickles.

    shape, chunk and write_unit are voxels in z, y, x order; write_unit is the shard if sharded, else the chunk.
    voxel_size and origin are nm if in_nm; where a file names no unit they are the file's own numbers. level_path is the
    array's place in its OME-Zarr group; a bare array has none.
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

        They are in nm if `in_nm`, else in the file's own numbers; their attribute `units` says which.
        """
        import dask.array
        import xarray

        lead = (0,) * self.lead_axes
        lazy = dask.array.from_zarr(_open_array(self.url, "r"))[lead]
        unit = {"units": "nm" if self.in_nm else "unknown"}
        coordinates = {
            axis: (axis, origin + size * np.arange(length), unit)
            for axis, length, size, origin in zip("zyx", self.shape, self.voxel_size, self.origin, strict=True)
        }
        return xarray.DataArray(lazy, coords=coordinates, dims=("z", "y", "x"), name=os.path.basename(self.group_url))


def open_volume(url: str | os.PathLike[str], level: int = 0) -> Volume:
    """Describe the volume at a path or URL: level `level` of an OME-Zarr image, or a bare Zarr array.

    Raises InputError if nothing is there, it is no Zarr, has no such level, or is no single-channel 3-D volume of
    uint8, uint16 or float32.
    """
    url = storage.absolute(url)
    node = _open_node(url)
    if isinstance(node, zarr.Array):
        if level != 0:
            raise InputError(f"{url} has no level {level}: it is a bare array, not an OME-Zarr image with levels")
        axes = _AXES.get(node.ndim, ("?",) * node.ndim)
        named = getattr(node.metadata, "dimension_names", None)
        if named and all(named):
            axes = tuple(str(name).lower() for name in named)
        return _describe(node, url, ome.Level("", axes, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), in_nm=False))
    try:
        levels = ome.read_levels(node.attrs.asdict())
    except InputError as error:
        raise InputError(f"{url} cannot be used: {error}") from error
    if not levels:
        arrays = ", ".join(sorted(node.array_keys())) or "none"
        raise InputError(
            f"{url} is a Zarr group without OME-Zarr multiscales metadata: name one of its arrays ({arrays})"
        )
    if not 0 <= level < len(levels):
        raise InputError(f"{url} has no level {level}: its levels are 0 to {len(levels) - 1}")
    chosen = levels[level]
    inner = f"{url}/{chosen.path}"
    array = _open_node(inner)
    if not isinstance(array, zarr.Array):
        raise InputError(f"{inner} is named as level {level} of {url} but is no array")
    return _describe(array, inner, chosen)


def read_box(volume: Volume, box: Box) -> NDArray[Any]:
    """The box's voxels, (z, y, x), in the volume's dtype and the machine's byte order."""
    array = _open_array(volume.url, "r")
    found = np.asarray(array[_full_selection(volume, box)]).reshape(box.shape)
    return np.ascontiguousarray(found, dtype=volume.dtype)


def write_box(volume: Volume, box: Box, voxels: NDArray[Any]) -> None:
    """Overwrite whole write units with (z, y, x) voxels; what was stored there is never read.

    Raises ValueError if the box does not consist of whole write units, clipped only by the volume's end, or the voxels
    do not fit it: zarr would drop or convert them without a word.
    """
    for span, unit, end in zip(box.spans, volume.write_unit, volume.shape, strict=True):
        if span.start % unit or span.stop > end or (span.stop % unit and span.stop != end):
            raise ValueError(f"box {box} is not made of whole write units {volume.write_unit} of {volume.shape}")
    if voxels.shape != box.shape or voxels.dtype != volume.dtype:
        raise ValueError(f"{voxels.dtype} voxels {voxels.shape} do not fit box {box} of {volume.dtype}")
    lead = (1,) * volume.lead_axes
    # an absent chunk must mean "not written", never "black"
    array = _open_array(volume.url, "r+").with_config({"write_empty_chunks": True})
    array[_full_selection(volume, box)] = voxels.reshape(lead + voxels.shape)


def create_volume(volume: Volume, provenance: dict[str, Any]) -> None:
    """Create the OME-Zarr 0.5 group and the array that `volume` describes; no voxels yet. What exists stays as it is.

    Raises InputError if what exists is not what `volume` describes.
    """
    group_url, path = volume.group_url, volume.level_path
    level = ome.Level(path, volume.axes, volume.voxel_size, volume.origin, volume.in_nm)
    lead = (1,) * volume.lead_axes
    name = os.path.basename(group_url)
    attributes: dict[str, Any] = {"ome": ome.image_attributes(name, level), "nrrn": provenance}
    group = zarr.open_group(_store(group_url), mode="a", zarr_format=3, attributes=attributes)
    if storage.exists(f"{volume.url}/zarr.json"):
        found = open_volume(group_url)
        if (found.shape, found.dtype, found.write_unit) != (volume.shape, volume.dtype, volume.write_unit):
            raise InputError(f"{volume.url} was changed since it was begun: start again with --overwrite")
        return
    group.create_array(
        path,
        shape=lead + volume.shape,
        dtype=volume.dtype,
        chunks=lead + volume.chunk,
        shards=None if volume.write_unit == volume.chunk else lead + volume.write_unit,
        compressors=ZstdCodec(level=3, checksum=True),  # without it most flipped bits decode unnoticed
        dimension_names=volume.axes,
        fill_value=0,
    )


def set_provenance(group_url: str, provenance: dict[str, Any]) -> None:
    """Store under the group's attribute `nrrn` how its voxels came to be."""
    zarr.open_group(_store(group_url), mode="r+").attrs["nrrn"] = provenance


def get_provenance(group_url: str) -> dict[str, Any] | None:
    """What set_provenance stored; None for other groups."""
    node = _open_node(storage.absolute(group_url))
    found = node.attrs.asdict().get("nrrn")
    return found if isinstance(found, dict) else None


def is_zarr(url: str) -> bool:
    """Whether a Zarr group or array is at the URL."""
    try:
        _open_node(url)
    except InputError:
        return False
    return True


def missing_chunks(volume: Volume, unit: Box) -> list[str]:
    """Which chunks of one write unit were never written, each as the box of its voxels.

    zarr would fill them in silently. Of a shard only the index is read: (offset, length) as uint64 for every chunk,
    then four bytes of crc32c (Zarr v3 sharding codec, index at the end); a chunk that is absent has all bits set.
    """
    array = _open_array(volume.url, "r")
    place = tuple(span.start // size for span, size in zip(unit.spans, volume.write_unit, strict=True))
    key = array.metadata.encode_chunk_key((0,) * volume.lead_axes + place)
    grid = [size // chunk for size, chunk in zip(volume.write_unit, volume.chunk, strict=True)]
    index_bytes = 16 * int(np.prod(grid)) + 4
    stored = storage.read_file(f"{volume.url}/{key}", last=index_bytes)
    chunks = list(boxes_of(unit, volume.chunk))
    if stored is None:
        return [str(chunk) for chunk in chunks]
    if volume.chunk == volume.write_unit:
        return []
    if len(stored) < index_bytes:
        raise ValueError(f"its shard of {len(stored)} bytes is shorter than a shard's index of {index_bytes}")
    index = np.frombuffer(stored[:-4], "<u8").reshape(*grid, 2)
    absent = np.iinfo(np.uint64).max

    def entry(chunk: Box) -> tuple[int, ...]:
        spans = zip(chunk.spans, unit.spans, volume.chunk, strict=True)
        return tuple((inner.start - outer.start) // size for inner, outer, size in spans)

    return [str(chunk) for chunk in chunks if index[entry(chunk)][0] == absent]


def stored_units(volume: Volume) -> set[Box]:
    """The write units that storage lists, as boxes of voxels; what is in them is not looked at."""
    found = set()
    for name in storage.list_tree(f"{volume.url}/c"):
        place = name.split("/")[-3:]
        if all(part.isdigit() for part in place) and len(place) == 3:
            starts = [int(part) * unit for part, unit in zip(place, volume.write_unit, strict=True)]
            ends = [min(a + n, m) for a, n, m in zip(starts, volume.write_unit, volume.shape, strict=True)]
            found.add(Box(*(Span(start, end) for start, end in zip(starts, ends, strict=True))))
    return found


class _ChunksLookAbsent(WrapperStore[Any]):
    """A store that is written to and shows no chunk.

    zarr 3.1 reads every shard back before it writes it, whole or not (`ShardingCodec._encode_partial_single`); one torn
    by a killed worker would fail every retry. A task owns whole write units: there is never anything to keep.
    """

    async def get(self, key: str, prototype: BufferPrototype, byte_range: Any = None) -> Buffer | None:
        if key.endswith(("zarr.json", ".zarray", ".zattrs")):
            return await super().get(key, prototype, byte_range)
        return None


def _store(url: str, read_only: bool = False) -> LocalStore | FsspecStore:
    if "://" in url:
        return FsspecStore.from_url(url, read_only=read_only)
    return LocalStore(url, read_only=read_only)


def _open_array(url: str, mode: str) -> Any:
    if mode == "r":
        return zarr.open_array(_store(url, read_only=True), mode="r")
    return zarr.open_array(_ChunksLookAbsent(_store(url)), mode="r+")


def _open_node(url: str) -> Any:
    """The Zarr array or group there, or an InputError that says why there is none."""
    if not storage.exists(url):
        raise InputError(f"no volume at {url}: there is nothing there")
    try:
        return zarr.open(_store(url, read_only=True), mode="r")
    except (FileNotFoundError, NotADirectoryError, ArrayNotFoundError, GroupNotFoundError, NodeTypeValidationError):
        raise InputError(f"{url} is not a Zarr volume: expected a Zarr array or an OME-Zarr group") from None
    # zarr raises any of these for malformed metadata
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{url} is a damaged Zarr: its metadata cannot be read ({error})") from error


def _describe(array: Any, url: str, level: ome.Level) -> Volume:
    lead = array.ndim - 3
    if lead < 0 or level.axes[-3:] != ("z", "y", "x") or len(level.axes) != array.ndim:
        raise InputError(
            f"{url} has axes {','.join(level.axes)}: expected z,y,x, with single t and c axes before at most"
        )
    for axis, length in zip(level.axes[:lead], array.shape, strict=False):
        if length != 1 or axis not in ("t", "c"):
            raise InputError(f"{url} has {length} entries along axis {axis}: expected single t and c axes before z,y,x")
    dtype = np.dtype(array.dtype).newbyteorder("=").name
    if dtype not in DTYPES:
        raise InputError(f"{url} holds {dtype} voxels: expected {', '.join(DTYPES)}")
    if 0 in array.shape:
        raise InputError(f"{url} is empty: its shape is {array.shape}")
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
    )


def _last3(values: tuple[int, ...]) -> Shape:
    return cast("Shape", tuple(int(value) for value in values[-3:]))


def _full_selection(volume: Volume, box: Box) -> tuple[slice, ...]:
    lead = (slice(0, 1),) * volume.lead_axes
    return lead + box.within(volume.box)
