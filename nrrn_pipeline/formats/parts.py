"""Consecutive slices in a file, and how a box of them is read: what every format comes down to.

A part is a description that pickles; it holds nothing open, as tasks take it to other machines.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple
from nrrn_pipeline.places import files_of
from nrrn_pipeline.volume import Volume, read_box

HEADER_BYTES = 2**16


class Part(ABC):
    """Some consecutive slices. shape: theirs; dtype: the machine's name of what is stored.

    unit: voxels that have to be decoded together, so that to read less takes as long.
    """

    url: str
    shape: Shape
    dtype: str

    @property
    @abstractmethod
    def unit(self) -> Shape:
        """Voxels that are decoded together, along z, y, x."""

    @abstractmethod
    def read(self, box: Box) -> NDArray[Any]:
        """The box's voxels, counted from the part's first, in the machine's byte order."""


@dataclass(frozen=True)
class Found:
    """What is in a file: a part of a volume, the size of its voxels in nm if it says, and what a user should know."""

    part: Part
    voxel_nm: Triple | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raw(Part):
    """Voxels that lie in a file one after the other, x fastest, uncompressed; `stored`: NumPy's name of their dtype."""

    url: str
    shape: Shape
    stored: str
    offset: int

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """Without the byte order."""
        return np.dtype(self.stored).name

    @property
    def unit(self) -> Shape:
        """Whole rows."""
        return 1, 1, self.shape[2]

    def read(self, box: Box) -> NDArray[Any]:
        """One request a slice, for whole rows. Raises StorageError if the file ends too soon."""
        dtype, (_, height, width) = np.dtype(self.stored), self.shape
        found = np.empty(box.shape, self.dtype)
        count = len(box.y) * width * dtype.itemsize
        for z in range(box.z.start, box.z.stop):
            start = self.offset + (z * height + box.y.start) * width * dtype.itemsize
            data = storage.read_file(self.url, start, start + count)
            if data is None or len(data) != count:
                raise StorageError(f"{self.url} ends in slice {z}: it is cut short")
            rows = np.frombuffer(data, dtype).reshape(len(box.y), width)
            found[z - box.z.start] = rows[:, box.x.start : box.x.stop]
        return found


@dataclass(frozen=True)
class Stored(Part):
    """A volume in Zarr."""

    volume: Volume

    @property
    def url(self) -> str:  # type: ignore[override]
        """The array's."""
        return self.volume.url

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """All of it."""
        return self.volume.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """As it is stored."""
        return self.volume.dtype

    @property
    def unit(self) -> Shape:
        """A chunk."""
        return self.volume.chunk

    def read(self, box: Box) -> NDArray[Any]:
        """See read_box."""
        return read_box(self.volume, box)


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A file to read and to seek in, on a path or URL. Raises OSError if it cannot be opened."""
    if "://" not in url:
        with open(url, "rb") as file:
            yield file
        return
    files, path = files_of(url)
    with files.open(path, "rb", block_size=HEADER_BYTES) as file:  # else it fetches 50 MiB of S3 at a time
        yield file


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file; where it stands does not change."""
    at = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(at)
    return end


def refuse_cut_short(url: str, found: int, wanted: int) -> None:
    """Raises InputError for a file of fewer bytes than it should have."""
    if found < wanted:
        raise InputError(f"{url} is cut short: it has {found} bytes of {wanted}; copy it again")


def refuse_unfit(url: str, shape: tuple[int, ...], what: str) -> Shape:
    """Three sizes, z, y, x, of what has single axes before them at most. Raises InputError for other shapes."""
    if len(shape) < 3 or any(size != 1 for size in shape[:-3]) or 0 in shape:
        raise InputError(f"{url}: {what} is {shape}, no volume: expected slices of y, x, one after the other")
    z, y, x = shape[-3:]
    return z, y, x
