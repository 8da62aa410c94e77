"""HDF5: one dataset of a file, by h5py; voxel sizes as in files of ilastik and Fiji, or of CREMI."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError, StorageError, few
from nrrn_pipeline.formats.parts import Found, Part, opened, refuse_unfit
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple, nm_of

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
SIZES = {"element_size_um": "um", "resolution": "nm", "voxel_size": "nm"}  # attributes, and what they are in
SHOWN = 10


@dataclass(frozen=True)
class Dataset(Part):
    """A dataset of an HDF5 file, with `lead` single axes before z, y, x, and `trail` after them."""

    url: str
    shape: Shape
    dtype: str
    name: str
    chunk: Shape
    lead: int
    trail: int

    @property
    def unit(self) -> Shape:
        """A chunk, or rows of what has none."""
        return self.chunk

    def read(self, box: Box) -> NDArray[Any]:
        """Its chunks, as h5py reads them. Raises StorageError for those that cannot be read."""
        spans = tuple(slice(span.start, span.stop) for span in box.spans)
        try:
            with _opened(self.url) as file:
                found = file[self.name][(0,) * self.lead + spans + (0,) * self.trail]
        except Exception as error:  # h5py raises all kinds of errors
            where = f"{self.url}{self.name}, voxels {box}"
            raise StorageError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error
        return np.ascontiguousarray(found, self.dtype)


@contextmanager
def _opened(url: str) -> Iterator[h5py.File]:
    """By its path if it has one: else h5py finds no other files that it refers to."""
    if "://" not in url:
        with h5py.File(url, "r") as file:
            yield file
        return
    with opened(url) as raw, h5py.File(raw, "r") as file:
        yield file


def find_hdf5(url: str, dataset: str | None) -> Found:
    """What is in a dataset of an HDF5 file, or in its only one of three axes or more. Raises InputError."""
    if "://" not in url:
        os.stat(url)  # h5py would say that it is no HDF5 file
    try:
        with _opened(url) as file:
            name = dataset or _only_volume(url, file)
            found = file.get(name)
            if not isinstance(found, h5py.Dataset):
                raise InputError(f"{url} has no dataset {name}: {_datasets(file)}")
            _refuse_other_files(url, found)
            lead, trail = _single_axes(url, name, found)
            stop = found.ndim - trail
            shape = refuse_unfit(url, found.shape[:stop], f"dataset {name}")
            chunk = tuple(found.chunks or (*[1] * (stop - 1), shape[2]))[stop - 3 : stop]
            unit = (int(chunk[0]), int(chunk[1]), int(chunk[2]))
            return Found(Dataset(url, shape, found.dtype.name, name, unit, lead, trail), _voxel_nm(found))
    except InputError:
        raise
    except Exception as error:  # h5py raises all kinds of errors
        raise InputError(f"{url} is no HDF5 file, or a damaged one ({type(error).__name__}: {error})") from error


def _refuse_other_files(url: str, dataset: h5py.Dataset) -> None:
    """Raises InputError if voxels lie in files that are not there: h5py would give fill values for them."""
    if not dataset.is_virtual:
        return
    folder = os.path.dirname(url)
    names = {source.file_name for source in dataset.virtual_sources()} - {"."}
    if "://" in url or (missing := sorted(name for name in names if not os.path.exists(os.path.join(folder, name)))):
        lacking = ", ".join((sorted(names) if "://" in url else missing)[:SHOWN])
        raise InputError(f"{url} refers to voxels in other files, which cannot be read from here: {lacking}")


def _single_axes(url: str, name: str, dataset: h5py.Dataset) -> tuple[int, int]:
    """How many single axes stand before and after z, y, x: by ilastik's axistags, or a last one of several."""
    tags = dataset.attrs.get("axistags")
    if tags is not None:
        keys = "".join(str(each["key"]) for each in json.loads(tags)["axes"])
        at = keys.find("zyx")
        if at < 0 or any(size != 1 for size in (*dataset.shape[:at], *dataset.shape[at + 3 :])):
            raise InputError(f"{url}: dataset {name} has axes {keys} {dataset.shape}: expected zyx, others single")
        return at, len(keys) - at - 3
    trail = 1 if dataset.ndim > 3 and dataset.shape[-1] == 1 else 0
    return max(0, dataset.ndim - trail - 3), trail


def _only_volume(url: str, file: h5py.File) -> str:
    names = [name for name, shape in _all(file) if len(shape) >= 3]
    if len(names) != 1:
        raise InputError(f"{url}: which dataset? give its --dataset; {_datasets(file)}")
    return names[0]


def _all(file: h5py.File) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found.append((f"/{name}", node.shape or ()))

    file.visititems(visit)
    return found


def _datasets(file: h5py.File) -> str:
    names = [f"{name} {shape}" for name, shape in _all(file)]
    return f"it holds {few(names, SHOWN)}" if names else "it holds none"


def _voxel_nm(dataset: h5py.Dataset) -> Triple | None:
    for name, unit in SIZES.items():
        sizes = np.atleast_1d(np.asarray(dataset.attrs.get(name, ())))
        if sizes.shape == (3,) and sizes.dtype.kind in "fiu":
            return nm_of([float(size) for size in sizes], [unit] * 3)
    return None
