"""HDF5: one dataset of a file, by h5py; voxel sizes as in files of ilastik and Fiji, or of CREMI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.formats.parts import Found, Part, opened, refuse_unfit
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple, nm_of

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
SIZES = {"element_size_um": "um", "resolution": "nm", "voxel_size": "nm"}  # attributes, and what they are in
SHOWN = 10


@dataclass(frozen=True)
class Dataset(Part):
    """A dataset of an HDF5 file, with `lead` single axes before z, y, x."""

    url: str
    shape: Shape
    dtype: str
    name: str
    chunk: Shape
    lead: int

    @property
    def unit(self) -> Shape:
        """A chunk, or rows of what has none."""
        return self.chunk

    def read(self, box: Box) -> NDArray[Any]:
        """Its chunks, as h5py reads them. Raises StorageError for those that cannot be decoded."""
        with opened(self.url) as raw, h5py.File(raw, "r") as file:
            try:
                found = file[self.name][(0,) * self.lead + tuple(slice(span.start, span.stop) for span in box.spans)]
            except (OSError, KeyError) as error:
                raise StorageError(
                    f"{self.url}, dataset {self.name}, voxels {box}: cannot be read ({error})"
                ) from error
        return np.ascontiguousarray(found, self.dtype)


def find_hdf5(url: str, dataset: str | None) -> Found:
    """What is in a dataset of an HDF5 file, or in its only one of three axes or more. Raises InputError."""
    with opened(url) as raw:
        try:
            with h5py.File(raw, "r") as file:
                name = dataset or _only_volume(url, file)
                found = file.get(name)
                if not isinstance(found, h5py.Dataset):
                    raise InputError(f"{url} has no dataset {name}: {_datasets(file)}")
                shape = refuse_unfit(url, found.shape, f"dataset {name}")
                chunk = tuple(found.chunks or (1, 1, shape[2]))[-3:]
                unit = (int(chunk[0]), int(chunk[1]), int(chunk[2]))
                part = Dataset(url, shape, found.dtype.name, name, unit, found.ndim - 3)
                return Found(part, _voxel_nm(found))
        except OSError as error:
            raise InputError(f"{url} is no HDF5 file, or a damaged one: {error}") from error


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
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"it holds {', '.join(names[:SHOWN])}{more}" if names else "it holds none"


def _voxel_nm(dataset: h5py.Dataset) -> Triple | None:
    for name, unit in SIZES.items():
        sizes = np.atleast_1d(np.asarray(dataset.attrs.get(name, ())))
        if sizes.shape == (3,) and sizes.dtype.kind in "fiu":
            return nm_of([float(size) for size in sizes], [unit] * 3)
    return None
