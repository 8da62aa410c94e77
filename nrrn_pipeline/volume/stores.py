"""Between zarr and storage: chunks come and go whole, counted and checked, in few requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.places import REQUESTS_AT_ONCE
from nrrn_pipeline.stopwatch import Busy

MAX_OBJECT_BYTES = 2**31
GAP_BYTES = 2**18  # read rather than ask again: what a request costs in time

_requests = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="storage")

Range = tuple[int, int]


class ReadChunks(MemoryStore):
    """The chunks of one array, for one reading; its own memory stays empty.

    `wanted` tells, for a shard that is wanted in part, where in its index the wanted chunks stand: then they come with
    few requests as soon as the index is there, where zarr would ask for one after the other. `longest`: bytes that one
    may have; a longer one is left to zarr to refuse.
    """

    def __init__(
        self, url: str, wanted: Mapping[str, list[int]] | None = None, longest: int = MAX_OBJECT_BYTES
    ) -> None:
        super().__init__(read_only=True)
        self.longest = longest
        self.url = url
        self.wanted = wanted or {}
        self.held: dict[str, list[tuple[Range, bytes]]] = {}
        self.busy = Busy()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """An object's bytes; None if it is not there. Raises StorageError, also for fewer bytes than asked for."""
        if isinstance(byte_range, RangeByteRequest):
            for (start, stop), data in self.held.get(key, []):
                if start <= byte_range.start and byte_range.end <= stop:
                    return _buffer(data[byte_range.start - start : byte_range.end - start], prototype)
        found = await self._read(key, byte_range)
        if found is not None and isinstance(byte_range, SuffixByteRequest) and key in self.wanted:
            ranges = merged(_slices(found, self.wanted[key], self.longest))
            parts = await asyncio.gather(*(self._read(key, RangeByteRequest(*part)) for part in ranges))
            self.held[key] = [(part, piece) for part, piece in zip(ranges, parts, strict=True) if piece is not None]
        return None if found is None else _buffer(found, prototype)

    async def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        url = _inside(self.url, key)
        start, stop, expected = 0, None, None
        if isinstance(byte_range, RangeByteRequest):
            start, stop, expected = byte_range.start, byte_range.end, byte_range.end - byte_range.start
            if not 0 <= start < stop or expected > MAX_OBJECT_BYTES:
                raise ValueError(f"{url}: its index names bytes {start} to {stop}")
        elif isinstance(byte_range, SuffixByteRequest):
            start, expected = -byte_range.suffix, byte_range.suffix
        elif byte_range is not None:
            start = byte_range.offset
        with self.busy:
            data = await asyncio.get_running_loop().run_in_executor(_requests, storage.read_file, url, start, stop)
        # zarr would take an empty answer for an absent chunk, and fill it in
        if data is not None and (not data or (expected is not None and len(data) != expected)):
            raise ValueError(f"{url}: {len(data)} bytes came where {expected or 'some'} were expected")
        return data


class WriteChunks(MemoryStore):
    """Takes the chunks of one array, and notes the size and digest of each object; shows none.

    zarr 3.1 reads every shard back before it writes it, whole or not (`ShardingCodec._encode_partial_single`); one torn
    by a killed worker would fail every retry. A task owns whole write units: there is never anything to keep.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.written: dict[str, tuple[int, str]] = {}
        self.busy = Busy()

    async def get(self, *_: Any, **__: Any) -> None:
        """Nothing, whatever is there."""
        return

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:  # noqa: ARG002
        """Write one object whole. Raises StorageError, or a disk's own OSError."""
        data = value.to_bytes()
        write = partial(storage.write_file, _inside(self.url, key), data)
        with self.busy:
            await asyncio.get_running_loop().run_in_executor(_requests, write)
        self.written[key] = (len(data), storage.digest(data))

    async def delete(self, key: str) -> None:
        """Never: zarr deletes chunks that are all fill value, which must not look absent."""
        raise NotImplementedError(f"a chunk of an output was to be deleted: {key}")


def _buffer(data: bytes, prototype: BufferPrototype | None) -> Buffer:
    return (prototype or default_buffer_prototype()).buffer.from_bytes(data)


def merged(ranges: list[Range]) -> list[Range]:
    """The ranges, with neighbours no further apart than GAP_BYTES joined, in order."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1] + GAP_BYTES:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _slices(index: bytes, places: list[int], longest: int) -> list[Range]:
    """Where the chunks at some places of a shard's index lie in the shard, but for those that are absent.

    The index holds an offset and a length in bytes for each chunk, uint64, both all ones if it is absent; then four
    bytes of CRC-32C (Zarr v3, sharding codec).
    """
    entries = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)[places]
    return [(int(offset), int(offset) + int(length)) for offset, length in entries if length <= longest]


def _inside(url: str, key: str) -> str:
    """An object's URL. Raises InputError if a link on disk leads out of the array."""
    inner = f"{url}/{key}"
    if "://" not in url and not os.path.realpath(inner).startswith(url.rstrip("/") + "/"):
        raise InputError(f"{inner} is a link out of the volume: what it shows is not the volume's; remove the link")
    return inner
