"""Decoders that give no more than a chunk holds: a hostile or damaged chunk of a few kB must not decode to many GB.

zarr decodes a chunk before it looks at the size. Here what a chunk says of its own size (zstd, blosc, lz4) is compared
before it is decoded; the streams that say nothing (gzip, zlib, bz2, lzma) are decoded only so far.
"""

from __future__ import annotations

import asyncio
import bz2
import functools
import gzip
import io
import lzma
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numcodecs  # type: ignore[import-untyped]
import numpy as np
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.abc.store import ByteGetter, ByteRequest, RangeByteRequest
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

from nrrn_pipeline.errors import InputError

_Metadata = TypeVar("_Metadata", bound=ArrayV2Metadata | ArrayV3Metadata)
_Config = Mapping[str, Any]

MAX_CODECS = 16  # in one list
_MOST_SHARDINGS = 4  # within each other: each holds a whole shard in memory while the next one is decoded
_MOST_INDEX_BYTES = 64 << 20
_MOST_LZMA_BYTES = 128 << 20  # its dictionary, whatever the chunk's size; preset 9 takes 65 MiB
_MOST_ZSTD_PARTS = 1 << 20  # frames and blocks; a block is 128 KiB unless it is the last

_CHECKSUMS = ("crc32c", "crc32", "adler32", "fletcher32")  # four bytes each
_SAME_SIZE = ("bytes", "shuffle", "bitround")
_CONVERSIONS = ("delta", "fixedscaleoffset", "quantize", "astype")  # from one number type to another


def bounded(metadata: _Metadata) -> _Metadata:
    """A copy whose decompressors raise ValueError instead of giving more than the chunk's bytes and a little slack.

    It encodes and turns into JSON as the original does. Raises InputError if a codec is not one of those that can be
    bounded, or its parameters alone would take memory out of proportion.
    """
    if isinstance(metadata, ArrayV3Metadata):
        shape = getattr(metadata.chunk_grid, "chunk_shape", None)
        if shape is None:
            raise InputError(f"the array has chunk grid {metadata.chunk_grid}: expected a regular one")
        chunk = _Chunk(shape, metadata.data_type.to_native_dtype().itemsize)
        return replace(metadata, codecs=_bound_chain(metadata.codecs, chunk, depth=0)[0])
    chunk = _Chunk(metadata.chunks, metadata.dtype.to_native_dtype().itemsize)
    filters = metadata.filters or ()
    _check_length(filters)
    bound: list[Any] = []
    for codec in (*filters, metadata.compressor):
        if codec is None:
            bound.append(None)
            continue
        config = codec.get_config()
        after = chunk.after(config["id"], config)
        bound.append(_BoundedNumcodec(codec, config["id"], chunk.size) if config["id"] in _DECODERS else codec)
        chunk = after
    return replace(metadata, filters=tuple(bound[:-1]) or None, compressor=bound[-1])


@dataclass(frozen=True)
class _Chunk:
    """A chunk on its way through a chain of codecs; `extra` is bytes of checksums and shard indexes."""

    shape: tuple[int, ...]
    itemsize: int
    extra: int = 0

    @property
    def size(self) -> int:
        """Its bytes, if nothing compressed it."""
        return math.prod(self.shape) * self.itemsize + self.extra

    def after(self, name: str, config: _Config) -> _Chunk:
        """The chunk as a codec leaves it, compression left out; InputError if the codec cannot be trusted."""
        if name in _CHECKSUMS:
            return replace(self, extra=self.extra + 4)
        if name == "transpose":
            order = config["order"]
            if sorted(order) != list(range(len(self.shape))):
                raise InputError(
                    f"the array's codec transpose has order {order} for chunks {self.shape}: it is damaged"
                )
            return replace(self, shape=tuple(self.shape[axis] for axis in order))
        if name in _CONVERSIONS:
            return replace(self, itemsize=self._converted(name, config))
        if name == "lzma":
            dictionaries = [part.get("dict_size", 0) for part in config.get("filters") or ()]
            if max(dictionaries, default=0) > _MOST_LZMA_BYTES:
                raise InputError(
                    f"the array's codec lzma has a dictionary of {max(dictionaries)} bytes: at most {_MOST_LZMA_BYTES} "
                    "are supported; store it with a smaller one"
                )
        elif name not in _SAME_SIZE and name not in _DECODERS:
            known = ", ".join(sorted({*_DECODERS, *_CHECKSUMS, *_SAME_SIZE, *_CONVERSIONS, "transpose"}))
            raise InputError(
                f"the array's codec {name} is not supported: store it with any of {known}, sharding_indexed"
            )
        return self

    def _converted(self, name: str, config: _Config) -> int:
        """Bytes of a number as the filter stores it.

        That what it gives back are numbers of the size it was given keeps a chain of filters from growing a chunk by a
        factor each; that they are numbers, that one is not a string of a GB.
        """
        plain = config.get("decode_dtype") or config.get("dtype")
        stored = config.get("encode_dtype") or config.get("astype") or plain
        try:
            types = np.dtype(plain), np.dtype(stored)
        except TypeError as error:
            raise InputError(f"the array's filter {name} names no number type: {error}") from error
        if any(kind.kind not in "biuf" for kind in types) or types[0].itemsize != self.itemsize:
            raise InputError(
                f"the array's filter {name} turns {plain} into {stored}: expected numbers, the first of "
                f"{self.itemsize} bytes as what it is given; the metadata is damaged"
            )
        return types[1].itemsize


def _bound_chain(codecs: Iterable[Codec], chunk: _Chunk, depth: int) -> tuple[tuple[Codec, ...], _Chunk]:
    """Zarr v3 codecs with bounds, and the chunk as they leave it."""
    codecs = tuple(codecs)
    _check_length(codecs)
    bound: list[Codec] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            sharding, chunk = _bound_sharding(codec, chunk, depth)
            bound.append(sharding)
            continue
        name, config = _named(codec)
        after = chunk.after(name, config)
        bound.append(_Bounded(codec, name, chunk.size) if name in _DECODERS else codec)  # type: ignore[arg-type]
        chunk = after
    return tuple(bound), chunk


def _bound_sharding(codec: ShardingCodec, shard: _Chunk, depth: int) -> tuple[_BoundedSharding, _Chunk]:
    if depth == _MOST_SHARDINGS:
        raise InputError(f"the array has shards within shards more than {_MOST_SHARDINGS} deep: it is damaged")
    inner = codec.chunk_shape
    if len(inner) != len(shard.shape) or any(n <= 0 or m % n for m, n in zip(shard.shape, inner, strict=True)):
        raise InputError(f"the array's chunks {inner} do not divide its shards {shard.shape}: it is damaged")
    index = 16 * math.prod(m // n for m, n in zip(shard.shape, inner, strict=True))
    if index > _MOST_INDEX_BYTES:
        raise InputError(
            f"the array has chunks {inner} in shards {shard.shape}, an index of {index} bytes in each: at most "
            f"{_MOST_INDEX_BYTES} are supported; store it with larger chunks or smaller shards"
        )
    for name, _ in map(_named, codec.index_codecs):
        if name not in ("bytes", "crc32c"):
            raise InputError(f"the array's shards have an index in codec {name}: expected bytes and crc32c only")
    _check_length(codec.index_codecs)
    index += 4 * len(codec.index_codecs)
    codecs, chunk = _bound_chain(codec.codecs, replace(shard, shape=inner, extra=0), depth + 1)
    fields = {"chunk_shape": inner, "index_codecs": codec.index_codecs, "index_location": codec.index_location}
    bound = _BoundedSharding(codecs=codecs, longest_read=max(_limit(chunk.size), index), **fields)
    return bound, replace(shard, extra=shard.extra + index)


def _named(codec: Codec) -> tuple[str, _Config]:
    """A Zarr v3 codec's name, as Zarr v2 would have it, and parameters."""
    found: dict[str, Any] = codec.to_dict()
    return found["name"].removeprefix("numcodecs."), found.get("configuration", {})


def _check_length(codecs: tuple[Any, ...]) -> None:
    if len(codecs) > MAX_CODECS:
        raise InputError(f"the array has {len(codecs)} codecs in one list: at most {MAX_CODECS} are supported")


@dataclass(frozen=True)
class _Bounded(BytesBytesCodec):
    """A Zarr v3 compressor that decodes within bounds and is `inner` otherwise."""

    inner: BytesBytesCodec
    name: str
    size: int
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)

    async def _encode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await self.inner._encode_single(chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        config = _named(self.inner)[1]
        plain = await asyncio.to_thread(_decode, chunk_data.as_numpy_array(), self.name, config, self.size)
        return chunk_spec.prototype.buffer.from_bytes(plain)


@dataclass(frozen=True)
class _BoundedNumcodec:
    """A Zarr v2 compressor that decodes within bounds and is `inner` otherwise."""

    inner: Any
    name: str
    size: int
    codec_id = "bounded"  # zarr wants one of the class; what is stored comes from get_config

    def encode(self, buf: Any) -> Any:
        return self.inner.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        if out is not None:
            raise NotImplementedError("decoding into a buffer: zarr does not ask for it")
        return _decode(buf, self.name, self.get_config(), self.size)

    def get_config(self) -> Any:
        return self.inner.get_config()

    @classmethod
    def from_config(cls, config: Any) -> _BoundedNumcodec:
        raise NotImplementedError(f"{config}: use bounded() to make one")


@dataclass(frozen=True)
class _BoundedSharding(ShardingCodec):
    """A sharding codec that reads no part of a shard longer than a chunk may be.

    An index may name the whole shard as every one of its chunks, and zarr reads each into memory before it decodes one.
    """

    longest_read: int = 0

    def __init__(self, *, longest_read: int, **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "longest_read", longest_read)

    def __reduce__(self) -> tuple[Any, ...]:
        # zarr's own pickles JSON, and comes back without bounds
        names = ("longest_read", "chunk_shape", "codecs", "index_codecs", "index_location")
        return functools.partial(type(self), **{name: getattr(self, name) for name in names}), ()

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: Any, shard_spec: ArraySpec
    ) -> NDBuffer | None:
        getter = _ShortReads(byte_getter, self.longest_read)
        return await super()._decode_partial_single(getter, selection, shard_spec)


@dataclass(frozen=True)
class _ShortReads:
    inner: ByteGetter
    longest: int

    async def get(self, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if isinstance(byte_range, RangeByteRequest) and not 0 <= byte_range.end - byte_range.start <= self.longest:
            start, end = byte_range.start, byte_range.end
            raise ValueError(f"a shard's index gives a chunk bytes {start} to {end}, more than {self.longest}: damaged")
        return await self.inner.get(prototype, byte_range)


def _limit(size: int) -> int:
    """How many bytes are taken for a chunk of `size`, as compression before this one may have made it longer."""
    return size + size // 16 + 4096


def _decode(stored: Any, name: str, config: _Config, size: int) -> Any:
    """What the stored bytes decode to; ValueError if they are damaged or it is more than a chunk of `size` may be."""
    stored = np.frombuffer(stored, np.uint8)
    if not 0 < len(stored) <= _limit(size):
        raise ValueError(f"{len(stored)} bytes of {name} are stored for the chunk's {size} bytes: it is damaged")
    try:
        plain = _DECODERS[name](stored, size, config)
    except (RuntimeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # an OSError would look like storage
        raise ValueError(f"a chunk's {name} cannot be decoded ({error}): it is damaged") from error
    _check_size(name, len(plain), size)
    return plain


def _check_size(name: str, found: int, size: int) -> None:
    if found > _limit(size):
        raise ValueError(f"a chunk's {name} decodes to more than the chunk's {size} bytes: it is damaged")


def _decode_zstd(stored: Any, size: int, _config: _Config) -> Any:
    says = _zstd_content(memoryview(stored))
    if says is not None:
        _check_size("zstd", says, size)
        return numcodecs.Zstd().decode(stored)
    try:
        # without a buffer numcodecs would grow one without end; into one it decodes what fills it exactly
        return numcodecs.Zstd().decode(stored, out=np.empty(size, np.uint8))
    except RuntimeError as error:
        raise ValueError(f"a chunk's zstd tells no size and is damaged or decodes to more than {size} bytes") from error


def _zstd_content(stored: memoryview) -> int | None:
    """How many bytes zstd frames say that they decode to; None if one does not say.

    Raises ValueError if they are no zstd frames. The layout is that of RFC 8878, 3.1.
    """
    total = at = checksum = 0
    in_frame = False
    for _ in range(_MOST_ZSTD_PARTS):
        if in_frame:
            block = int.from_bytes(stored[at : at + 3], "little")
            run_length = block >> 1 & 3 == 1  # one byte, repeated
            at += 3 + (1 if run_length else block >> 3)
            if block & 1:  # the last one
                in_frame = False
                at += checksum
        elif at == len(stored):
            return total
        elif (magic := int.from_bytes(stored[at : at + 4], "little")) >> 4 == 0x184D2A5:  # to be skipped
            at += 8 + int.from_bytes(stored[at + 4 : at + 8], "little")
        elif magic == 0xFD2FB528 and at + 4 < len(stored):
            flags = stored[at + 4]
            single_segment = flags >> 5 & 1
            checksum = flags & 4
            width = (single_segment, 2, 4, 8)[flags >> 6]
            if width == 0:
                return None
            at += 5 + (1 - single_segment) + (0, 1, 2, 4)[flags & 3]
            total += int.from_bytes(stored[at : at + width], "little") + (256 if width == 2 else 0)
            at += width
            in_frame = True
        else:
            raise ValueError("a chunk is no zstd: it is damaged")
        if at > len(stored):
            raise ValueError("a chunk's zstd ends too early: it is damaged")
    raise ValueError(f"a chunk's zstd has more than {_MOST_ZSTD_PARTS} blocks: it is damaged")


def _decode_blosc(stored: Any, size: int, _config: _Config) -> Any:
    # numcodecs does not tell c-blosc where the chunk ends: a header that says too much would be read beyond it
    says, _, length = struct.unpack_from("<3i", stored, 4) if len(stored) >= 16 else (0, 0, 0)
    if says < 0 or not 16 <= length <= len(stored):
        raise ValueError(f"a chunk's blosc says it is {length} bytes long and is {len(stored)}: it is damaged")
    _check_size("blosc", says, size)
    return numcodecs.Blosc().decode(stored)


def _decode_lz4(stored: Any, size: int, _config: _Config) -> Any:
    says = int.from_bytes(bytes(stored[:4]), "little", signed=True)  # numcodecs' own header; it refuses below 1
    _check_size("lz4", says, size)
    return numcodecs.LZ4().decode(stored)


def _decode_gzip(stored: Any, size: int, _config: _Config) -> bytes:
    return gzip.GzipFile(fileobj=io.BytesIO(stored)).read(_limit(size) + 1)


def _decode_bz2(stored: Any, size: int, _config: _Config) -> bytes:
    return bz2.BZ2File(io.BytesIO(stored)).read(_limit(size) + 1)


def _decode_zlib(stored: Any, size: int, _config: _Config) -> bytes:
    return _decode_stream(zlib.decompressobj(), stored, size)


def _decode_lzma(stored: Any, size: int, config: _Config) -> bytes:
    # LZMAFile takes no limit for the dictionary; raw streams take none either, and have theirs in the metadata
    kind = config.get("format", lzma.FORMAT_XZ)
    memory = None if kind == lzma.FORMAT_RAW else _MOST_LZMA_BYTES
    return _decode_stream(lzma.LZMADecompressor(kind, memory, config.get("filters")), stored, size)


def _decode_stream(decoder: Any, stored: Any, size: int) -> bytes:
    plain: bytes = decoder.decompress(stored, _limit(size) + 1)
    if not decoder.eof and len(plain) <= _limit(size):
        raise ValueError("a chunk's compressed stream ends too early: it is damaged")
    return plain


_DECODERS: dict[str, Callable[[Any, int, _Config], Any]] = {
    "blosc": _decode_blosc,
    "bz2": _decode_bz2,
    "gzip": _decode_gzip,
    "lz4": _decode_lz4,
    "lzma": _decode_lzma,
    "zlib": _decode_zlib,
    "zstd": _decode_zstd,
}
