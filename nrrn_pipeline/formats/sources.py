"""From what a user names, files or folders, to one stack of slices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, few
from nrrn_pipeline.formats import hdf5, images, mrc, n5, numpy_file, tiff
from nrrn_pipeline.formats.parts import Found, Part, Stored
from nrrn_pipeline.geometry import Box, Shape, Span
from nrrn_pipeline.ome import Triple
from nrrn_pipeline.places import absolute
from nrrn_pipeline.volume import is_zarr, open_volume

IMAGES = tiff.SUFFIXES + images.PNG
FINDERS: dict[tuple[str, ...], Callable[[str], Found]] = {
    tiff.SUFFIXES: tiff.find_tiff,
    mrc.SUFFIXES: mrc.find_mrc,
    numpy_file.SUFFIXES: numpy_file.find_npy,
}
KNOWN = ", ".join(suffixes[0] for suffixes in (*FINDERS, images.PNG, hdf5.SUFFIXES)) + ", N5, Zarr"
READABLE = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")
LEFT_OUT = 3  # names in a message


@dataclass(frozen=True)
class Stack:
    """All slices of a volume, as parts one after the other. `url`: where from, for people.

    voxel_nm: None if nothing says. notes: what a user should know.
    """

    url: str
    parts: tuple[Part, ...]
    voxel_nm: Triple | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError for parts that do not fit together."""
        first = self.parts[0]
        for part in self.parts:
            if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
                own, others = (f"{each.shape[1]} x {each.shape[2]} {each.dtype}" for each in (part, first))
                raise InputError(f"{part.url} holds slices of {own}, {first.url} of {others}: expected all alike")

    @property
    def shape(self) -> Shape:
        """Slices, rows, columns."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def dtype(self) -> str:
        """As it is stored."""
        return self.parts[0].dtype

    @property
    def unit(self) -> Shape:
        """Voxels that are decoded together, along z, y, x; the most of any part."""
        z, y, x = (max(sizes) for sizes in zip(*(part.unit for part in self.parts), strict=True))
        return z, y, x

    @cached_property
    def fingerprint(self) -> str:
        """Of what is read, file by file, but for what is in the files."""
        return hashlib.sha256(repr(self.parts).encode()).hexdigest()

    def read(self, box: Box) -> NDArray[Any]:
        """(z, y, x) voxels as they are stored. Raises StorageError for what cannot be read, naming the file."""
        found, first_z = np.empty(box.shape, self.dtype), 0
        for part in self.parts:
            own = Span(max(box.z.start, first_z), min(box.z.stop, first_z + part.shape[0]))
            if own.start < own.stop:
                here = Box(Span(own.start - first_z, own.stop - first_z), box.y, box.x)
                found[own.within(box.z)] = part.read(here)
            first_z += part.shape[0]
        return found


def find_stack(
    sources: Sequence[str | os.PathLike[str]], dataset: str | None = None, lacking: str = "refuse", level: int = 0
) -> Stack:
    """What is at some paths or URLs: a folder of slices, files of slices, or volumes, one after the other.

    Files are taken in natural order (slice_2 before slice_10). dataset: of HDF5 and N5. lacking: what to do about
    slices that are missing, cut short or unlike the others: refuse, blank, skip. level: of an OME-Zarr source.

    Raises InputError, naming the files, if that is no volume.
    """
    if lacking not in images.LACKING:
        raise InputError(f"lacking {lacking!r} is unknown: use {', '.join(images.LACKING)}")
    urls = [absolute(source) for source in sources]
    try:
        if len(urls) == 1:
            return _stack_at(urls[0], dataset, lacking, level)
        return _stack_of(sorted(urls, key=images.natural), lacking, dataset)
    except OSError as error:
        where = getattr(error, "filename", None) or urls[0]
        raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _stack_at(url: str, dataset: str | None, lacking: str, level: int) -> Stack:
    if is_zarr(url):
        volume = open_volume(url, level, dtypes=READABLE)
        return Stack(volume.url, (Stored(volume),), volume.voxel_nm)
    if n5.is_n5(url):
        return _stack(url, [n5.find_n5(url, dataset)])
    names = _names_in(url)
    if not names:
        if not storage.exists(url):
            raise InputError(f"no volume at {url}: there is nothing there")
        return _stack_of([url], lacking, dataset)
    chosen = [name for name in names if name.lower().endswith(IMAGES) and not name.startswith(".")]
    others = sorted(set(names) - set(chosen))
    if not chosen:
        raise InputError(
            f"{url} holds no slices: expected files of {', '.join(IMAGES)}; there are {few(others, LEFT_OUT)}"
        )
    kinds = sorted({os.path.splitext(name)[1].lower() for name in chosen})
    if len({kind in images.PNG for kind in kinds}) > 1:
        raise InputError(f"{url} holds images of several kinds ({', '.join(kinds)}): give those of one, by their names")
    made = _stack_of([f"{url}/{name}" for name in sorted(chosen, key=images.natural)], lacking, dataset)
    note = (f"left out, as they are no images: {few(others, LEFT_OUT)}",) if others else ()
    return Stack(url, made.parts, made.voxel_nm, (*made.notes, *note))


def _names_in(url: str) -> list[str]:
    """All that a folder holds, also links that lead nowhere; nothing of what is no folder."""
    if "://" not in url:
        return os.listdir(url) if os.path.isdir(url) else []
    return [] if storage.listed(url) else list(storage.list_sizes(url))


def _stack_of(urls: Sequence[str], lacking: str, dataset: str | None) -> Stack:
    """Of files, in their order."""
    if all(url.lower().endswith(IMAGES) for url in urls) and _hold_a_slice_each(urls):
        folder = os.path.commonpath([os.path.dirname(url) for url in urls]) if "://" not in urls[0] else _folder(urls)
        names = [url[len(folder) :].lstrip("/") for url in urls]
        part, voxel_nm, notes = images.find_images(folder, names, lacking)
        return Stack(folder, (part,), voxel_nm, notes)
    return _stack(urls[0], [_found(url, dataset) for url in urls])


def _stack(url: str, found: Sequence[Found]) -> Stack:
    sizes = {each.voxel_nm for each in found}
    notes = tuple(note for each in found for note in each.notes)
    return Stack(url, tuple(each.part for each in found), sizes.pop() if len(sizes) == 1 else None, notes)


def _found(url: str, dataset: str | None) -> Found:
    if url.lower().endswith(hdf5.SUFFIXES):
        return hdf5.find_hdf5(url, dataset)
    for suffixes, find in FINDERS.items():
        if url.lower().endswith(suffixes):
            return find(url)
    if "://" not in url and os.path.isdir(url):
        raise InputError(f"{url}: several folders or Zarrs at a time cannot be read; bring in one after the other")
    raise InputError(f"{url} is of no kind that can be read: expected {KNOWN}; or a folder of slices")


def _hold_a_slice_each(urls: Sequence[str]) -> bool:
    """As the first of several that can be read does; a single file is looked into as a whole."""
    if urls[0].lower().endswith(images.PNG):
        return True
    if len(urls) == 1:
        return False
    for url in urls:
        try:
            return tiff.find_tiff(url).part.shape[0] == 1
        except InputError:  # it will be named with all others that are cut short
            continue
    return True


def _folder(urls: Sequence[str]) -> str:
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) > 1:
        raise InputError("slices of several folders: give those of one, or the folder itself")
    return folders.pop()
