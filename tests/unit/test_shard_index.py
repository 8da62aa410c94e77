"""A shard's index is written by whoever wrote the volume: none may lead a reader astray."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from nrrn_pipeline.errors import StorageError
from nrrn_pipeline.geometry import Box, Span, box_of
from nrrn_pipeline.volume import open_volume, read_box, voxels
from tests.support import bare_zarr


def index_of(shard: bytes, chunks: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(shard[-16 * chunks - 4 : -4], "<u8").reshape(-1, 2).copy()


def with_index(shard: bytes, index: np.ndarray[Any, Any]) -> bytes:
    stored = index.astype("<u8").tobytes()
    return shard[: -len(stored) - 4] + stored + google_crc32c.value(stored).to_bytes(4, "little")


def everywhere(offset: int, length: int) -> Callable[[np.ndarray[Any, Any], int], None]:
    def change(index: np.ndarray[Any, Any], _: int) -> None:
        index[:] = offset, length

    return change


def whole_shard(index: np.ndarray[Any, Any], size: int) -> None:
    index[:] = 0, size


def overlapping(index: np.ndarray[Any, Any], _: int) -> None:
    index[1:, 0] -= 1


HOSTILE = {
    "far away": everywhere(2**63, 100),
    "farthest away": everywhere(2**64 - 101, 100),
    "beyond the end": everywhere(2**40, 100),
    "endless": everywhere(0, 2**60),
    "overflowing": everywhere(2**64 - 2, 2**64 - 2),
    "nothing": everywhere(0, 0),
    "half absent": everywhere(5, 2**64 - 1),
    "whole shard": whole_shard,
    "overlapping": overlapping,
}


@pytest.mark.parametrize("box", [box_of((128, 128, 128)), Box(Span(5, 100), Span(0, 128), Span(0, 128))], ids=str)
@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_shard_index_is_an_error_that_names_the_shard_and_takes_no_time_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, box: Box
) -> None:
    monkeypatch.setattr(voxels, "DECODE_ATTEMPTS", 2)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 128), np.uint8)
    volume = open_volume(bare_zarr(tmp_path / "a.zarr", noise, (16, 16, 16), shards=(128, 128, 128)))
    file = Path(volume.url) / "c/0/0/0"
    shard = file.read_bytes()
    index = index_of(shard, 512)
    HOSTILE[change](index, len(shard))
    file.write_bytes(with_index(shard, index))
    tracemalloc.start()
    try:
        started = time.monotonic()
        with pytest.raises(StorageError, match=f"^{volume.url}/c/0/0/0"):
            read_box(volume, box)
        assert time.monotonic() - started < 20
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
