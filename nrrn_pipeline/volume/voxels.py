"""Voxels in, voxels out: boxes of a volume, whatever storage does meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ShardingCodecIndexLocation
from zarr.storage import StorePath

from nrrn_pipeline import storage
from nrrn_pipeline.errors import StorageError
from nrrn_pipeline.geometry import Box, Span, cells_of
from nrrn_pipeline.retrying import FIRST_PAUSE_S, is_final, reason_of
from nrrn_pipeline.stopwatch import note
from nrrn_pipeline.volume.metadata import Volume, name_of, zarr_metadata
from nrrn_pipeline.volume.stores import ReadChunks, WriteChunks

if TYPE_CHECKING:
    import xarray

DECODE_ATTEMPTS = 6  # of one write unit whose bytes came, but damaged

T = TypeVar("T")
R = TypeVar("R")
Written = dict[str, tuple[int, str]]  # an object's key -> its bytes, and their digest


def read_box(volume: Volume, box: Box) -> NDArray[Any]:
    """The box's voxels, (z, y, x), in the volume's dtype and the machine's byte order.

    Raises StorageError if storage fails, or an object cannot be decoded however often it is read; it names the object.
    """
    try:
        return _read(volume, box)
    except Exception as error:
        if is_final(error):
            raise
    # something came damaged: unit by unit it is found, and read until it is whole
    voxels = np.empty(box.shape, volume.dtype)
    for unit in cells_of(box, volume.write_unit):
        voxels[unit.within(box)] = _read_patiently(volume, unit)
    return voxels


def read_ahead(read: Callable[[T], R], parts: Iterable[T]) -> Iterator[R]:
    """What `read` gives of each part, in order; while one is at work on it, the next is read."""
    rest = iter(parts)
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(read, part) for part in islice(rest, 1))
        while coming:
            found = coming.popleft().result()
            coming.extend(pool.submit(read, part) for part in islice(rest, 1))
            yield found


def _read_patiently(volume: Volume, part: Box) -> NDArray[Any]:
    """A part of one write unit."""
    for attempt in range(1, DECODE_ATTEMPTS + 1):
        try:
            return _read(volume, part)
        except Exception as error:
            if is_final(error):
                raise
            if attempt == DECODE_ATTEMPTS:
                where = f"{volume.url}/{object_key(volume, part)}"
                raise StorageError(f"{where}: cannot be decoded ({reason_of(error)})") from error
        time.sleep(FIRST_PAUSE_S * attempt)
    raise AssertionError("unreachable: the last attempt raises")


def _read(volume: Volume, box: Box) -> NDArray[Any]:
    longest = 2 * prod(volume.chunk) * volume.itemsize + 2**16  # however badly it compresses
    store = ReadChunks(volume.url, _wanted(volume, box), longest)
    array: Any = zarr.Array(zarr.AsyncArray(cast("Any", zarr_metadata(volume)), StorePath(store)))
    found = np.asarray(array[_full_selection(volume, box)]).reshape(box.shape)
    note("fetch", store.busy.seconds)
    return np.ascontiguousarray(found, dtype=volume.dtype)


def write_box(volume: Volume, box: Box, voxels: NDArray[Any]) -> Written:
    """Overwrite whole write units with (z, y, x) voxels; what was stored there is never read. What was written.

    Raises ValueError if the box does not consist of whole write units, clipped only by the volume's end, or the voxels
    do not fit it: zarr would drop or convert them without a word. Raises StorageError or OSError if storage fails.
    """
    for span, unit, end in zip(box.spans, volume.write_unit, volume.shape, strict=True):
        if span.start % unit or span.stop > end or (span.stop % unit and span.stop != end):
            raise ValueError(f"box {box} is not made of whole write units {volume.write_unit} of {volume.shape}")
    if voxels.shape != box.shape or voxels.dtype != volume.dtype:
        raise ValueError(f"{voxels.dtype} voxels {voxels.shape} do not fit box {box} of {volume.dtype}")
    lead = (1,) * volume.lead_axes
    store = WriteChunks(volume.url)
    # an absent chunk must mean "not written", never "black"
    config: Any = {"write_empty_chunks": True, "order": "C"}
    array: Any = zarr.Array(zarr.AsyncArray(cast("Any", zarr_metadata(volume)), StorePath(store), config))
    array[_full_selection(volume, box)] = voxels.reshape(lead + voxels.shape)
    note("store", store.busy.seconds)
    return store.written


def object_key(volume: Volume, part: Box) -> str:
    """The key, below the array's URL, of the object that holds the (first) write unit of a box."""
    place = tuple(span.start // size for span, size in zip(part.spans, volume.write_unit, strict=True))
    return zarr_metadata(volume).encode_chunk_key((0,) * volume.lead_axes + place)


def stored_units(volume: Volume) -> dict[Box, int]:
    """The write units that storage lists, as boxes of voxels, with the bytes they take; none is looked into."""
    found = {}
    folder = volume.url if volume.zarr_format == 2 else f"{volume.url}/c"
    for name, stored_bytes in storage.list_tree(folder).items():
        place = name.split("/")[-3:]
        if all(part.isdecimal() for part in place) and len(place) == 3:
            starts = [int(part) * unit for part, unit in zip(place, volume.write_unit, strict=True)]
            ends = [min(a + n, m) for a, n, m in zip(starts, volume.write_unit, volume.shape, strict=True)]
            found[Box(*(Span(start, end) for start, end in zip(starts, ends, strict=True)))] = stored_bytes
    return found


def written_slices(volume: Volume) -> int:
    """Slices before the last layer of write units that storage lists, which a writer may be at work on; a listing.

    Blank chunks may be absent, so a layer counts as written when there is anything of a later one.
    """
    place = object_key(volume, volume.box).split("/")
    if len(place) >= 3:  # each layer is a folder
        layers = storage.list_folders("/".join([volume.url, *place[:-3]]))
    else:  # keys such as c.0.0.0
        layers = [".".join(name.split(".")[-3:-2]) for name in storage.list_sizes(volume.url)]
    numbers = [int(layer) for layer in layers if layer.isdecimal()]
    return min(max(numbers, default=0) * volume.write_unit[0], volume.shape[0])


def to_xarray(volume: Volume) -> xarray.DataArray:
    """See Volume.to_xarray."""
    import dask.array
    import xarray

    def block(block_info: Any = None) -> NDArray[Any]:
        return read_box(volume, Box(*(Span(*ends) for ends in block_info[None]["array-location"])))

    chunks = dask.array.core.normalize_chunks(volume.chunk, volume.shape)
    lazy = dask.array.map_blocks(block, chunks=chunks, dtype=volume.dtype, meta=np.empty((0, 0, 0), volume.dtype))
    unit = {"units": "nm" if volume.in_nm else "unknown"}
    coordinates = {
        axis: (axis, origin + size * np.arange(length), unit)
        for axis, length, size, origin in zip("zyx", volume.shape, volume.voxel_size, volume.origin, strict=True)
    }
    return xarray.DataArray(lazy, coords=coordinates, dims=("z", "y", "x"), name=name_of(volume.group_url))


def _wanted(volume: Volume, box: Box) -> dict[str, list[int]]:
    """For each shard that the box holds in part: where in the shard's index the chunks stand that it needs."""
    codec = next(iter(getattr(zarr_metadata(volume), "codecs", ())), None)
    if not isinstance(codec, ShardingCodec) or codec.index_location != ShardingCodecIndexLocation.end:
        return {}
    if [type(step) for step in codec.index_codecs] != [BytesCodec, Crc32cCodec]:
        return {}
    wanted: dict[str, list[int]] = {}
    grid = [size // chunk for size, chunk in zip(volume.write_unit, volume.chunk, strict=True)]
    places = np.arange(prod(grid)).reshape(grid)
    for part in cells_of(box, volume.write_unit):
        chunks = [
            range(span.start % unit // chunk, (span.start % unit + len(span) - 1) // chunk + 1)
            for span, unit, chunk in zip(part.spans, volume.write_unit, volume.chunk, strict=True)
        ]
        wanted[object_key(volume, part)] = [int(place) for place in places[np.ix_(*chunks)].ravel()]
    return wanted


def _full_selection(volume: Volume, box: Box) -> tuple[slice, ...]:
    lead = (slice(0, 1),) * volume.lead_axes
    return lead + box.within(volume.box)
