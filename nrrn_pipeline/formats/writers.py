"""Volumes as other tools want them: TIFF, MRC, HDF5, .npy; slice after slice, whatever their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import mrcfile
import numpy as np
import tifffile
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.formats import hdf5, mrc, numpy_file, tiff
from nrrn_pipeline.geometry import Shape
from nrrn_pipeline.ome import Triple

Planes = Iterator[NDArray[Any]]  # (y, x) voxels, slice after slice
CLASSIC = 2**32 - 2**25  # bytes of voxels up to which a TIFF need not be a BigTIFF
MRC_MODES = {"uint8": 6, "uint16": 6, "float32": 2}  # MRC has signed bytes only: uint8 is stored as uint16
HDF5_DATASET = "volume"


@dataclass(frozen=True)
class Written:
    """What is to be written: shape, dtype, and the size of voxels in nm, None if it is not known."""

    shape: Shape
    dtype: str
    voxel_nm: Triple | None

    @property
    def bytes(self) -> int:
        """Of all voxels."""
        z, y, x = self.shape
        return z * y * x * np.dtype(self.dtype).itemsize


Writer = Callable[[str, Written, Planes], None]


def write_tiff(path: str, what: Written, planes: Planes) -> None:
    """One file: ImageJ's, so that Fiji shows voxels in their size; a BigTIFF with OME's metadata where that is larger.

    A name that ends with .ome.tif gets OME's in any case.
    """
    ome = what.bytes > CLASSIC or path.lower().endswith((".ome.tif", ".ome.tiff"))
    metadata: dict[str, Any] = {"axes": "ZYX"}
    if ome and what.voxel_nm:
        for axis, size in zip("ZYX", what.voxel_nm, strict=True):
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "nm"}
    elif not ome:
        metadata |= _imagej(what)
    with tifffile.TiffWriter(path, bigtiff=what.bytes > CLASSIC, ome=ome, imagej=not ome) as file:
        file.write(
            planes,
            shape=what.shape,
            dtype=what.dtype,
            photometric="minisblack",
            metadata=metadata,
            **({} if ome else _resolution(what)),
        )


def write_folder(path: str, what: Written, planes: Planes) -> None:
    """A folder of TIFF files, one a slice, numbered from 0."""
    os.mkdir(path)
    options = {"metadata": _imagej(what), **_resolution(what)}
    digits = max(4, len(str(what.shape[0] - 1)))
    for z, plane in enumerate(planes):
        name = os.path.join(path, f"slice_{z:0{digits}}.tif")
        tifffile.imwrite(name, plane, photometric="minisblack", imagej=True, **options)


def write_mrc(path: str, what: Written, planes: Planes) -> None:
    """MRC2014; 8-bit voxels as 16-bit ones."""
    with mrcfile.new_mmap(path, what.shape, mrc_mode=MRC_MODES[what.dtype], overwrite=True) as file:
        file.set_volume()
        if what.voxel_nm:
            file.voxel_size = tuple(10 * size for size in what.voxel_nm[::-1])
        dtype, offset = file.data.dtype, file.header.nbytes + file.extended_header.nbytes
    low, high, sums, squares = np.inf, -np.inf, 0.0, 0.0
    with open(path, "r+b") as raw:
        raw.seek(offset)
        for plane in planes:
            raw.write(plane.astype(dtype).tobytes())
            low, high = min(low, float(plane.min())), max(high, float(plane.max()))
            sums += float(plane.sum(dtype=np.float64))
            squares += float(np.square(plane, dtype=np.float64).sum())
    count = what.bytes / np.dtype(what.dtype).itemsize
    with mrcfile.mmap(path, "r+") as file:
        file.header.dmin, file.header.dmax, file.header.dmean = low, high, sums / count
        file.header.rms = max(0.0, squares / count - (sums / count) ** 2) ** 0.5


def write_hdf5(path: str, what: Written, planes: Planes) -> None:
    """One dataset, in chunks, with the size of voxels as Fiji and ilastik read it."""
    y, x = what.shape[1:]
    with h5py.File(path, "w") as file:
        chunk = (1, min(y, 256), min(x, 256))
        options = {"chunks": chunk, "compression": "gzip", "shuffle": True}
        dataset = file.create_dataset(HDF5_DATASET, what.shape, what.dtype, **options)
        if what.voxel_nm:
            dataset.attrs["element_size_um"] = tuple(size / 1000 for size in what.voxel_nm)
        for number, plane in enumerate(planes):
            dataset[number] = plane


def write_npy(path: str, what: Written, planes: Planes) -> None:
    """NumPy's; the size of voxels has no place in it."""
    header = {"descr": np.dtype(what.dtype).str, "fortran_order": False, "shape": what.shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for plane in planes:
            file.write(plane.tobytes())


WRITERS: dict[tuple[str, ...], Writer] = {
    tiff.SUFFIXES: write_tiff,
    mrc.SUFFIXES: write_mrc,
    hdf5.SUFFIXES: write_hdf5,
    numpy_file.SUFFIXES: write_npy,
}


def writer_for(path: str) -> Writer:
    """By a file's name; a name without a suffix is a folder's. Raises InputError for others."""
    for suffixes, writer in WRITERS.items():
        if path.lower().endswith(suffixes):
            return writer
    if not os.path.splitext(path)[1]:
        return write_folder
    known = ", ".join([*(suffixes[0] for suffixes in WRITERS), ".zarr"])
    raise InputError(f"{path} is of no kind that can be written: use {known}, or a name without a suffix for a folder")


def _imagej(what: Written) -> dict[str, Any]:
    return {"spacing": what.voxel_nm[0] / 1000, "unit": "um"} if what.voxel_nm else {}


def _resolution(what: Written) -> dict[str, Any]:
    if what.voxel_nm is None:
        return {}
    return {"resolution": (1000 / what.voxel_nm[2], 1000 / what.voxel_nm[1])}
