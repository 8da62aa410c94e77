"""TIFF: one slice or many a file, BigTIFF, OME-TIFF and ImageJ's; by tifffile."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.formats.parts import Found, Part, Raw, opened, size_of
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple, nm_of

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".tf2")
BROKEN = re.compile(r"page offset|series|corrupt", re.IGNORECASE)  # of what tifffile says; all else is of tags
GREY = (0, 1)  # photometric interpretations: white is zero, black is zero


@dataclass(frozen=True)
class Pages(Part):
    """Slices that are pages of a TIFF file: (series, page) each, as tifffile counts them."""

    url: str
    shape: Shape
    dtype: str
    pages: tuple[tuple[int, int], ...]

    @property
    def unit(self) -> Shape:
        """Whole slices."""
        return 1, *self.shape[1:]

    def read(self, box: Box) -> NDArray[Any]:
        """Page by page. Raises StorageError for one that cannot be decoded."""
        found = np.empty(box.shape, self.dtype)
        with opened(self.url) as file, tifffile.TiffFile(file, _multifile=False) as tiff:
            for z in range(box.z.start, box.z.stop):
                series, page = self.pages[z]
                plane = decoded(tiff.series[series].pages[page], f"{self.url}, page {z}", self.shape[1:])
                found[z - box.z.start] = plane[box.y.start : box.y.stop, box.x.start : box.x.stop]
        return found


def find_tiff(url: str) -> Found:
    """What is in a TIFF file. Raises InputError if it is no TIFF, no grey slices of one size, or cut short."""
    try:
        with _complaints() as said, opened(url) as file, tifffile.TiffFile(file, _multifile=False) as tiff:
            if not tiff.series:
                raise InputError(f"{url} holds no image")
            pages = _pages_of(url, tiff)
            _refuse_cut_short(url, tiff, size_of(file))
            if broken := [text for text in said if BROKEN.search(text)]:
                raise InputError(f"{url} is damaged or cut short: {broken[0]}")
            first = tiff.series[0]
            height, width = first.keyframe.shape[:2]
            shape, dtype = (len(pages), int(height), int(width)), first.dtype
            part: Part = Pages(url, shape, dtype.name, tuple(pages))
            if len(tiff.series) == 1 and first.dataoffset is not None:
                part = Raw(url, shape, np.dtype(dtype).newbyteorder(tiff.byteorder).str, first.dataoffset)
            return Found(part, _voxel_nm(tiff), tuple(f"{url}: {text}" for text in said))
    except tifffile.TiffFileError as error:
        raise InputError(f"{url} is no TIFF file, or a damaged one: {error}") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:  # of a file that is cut short, or worse
        raise InputError(f"{url} is a damaged TIFF file ({type(error).__name__}: {error})") from error


def decoded(page: Any, where: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A page's voxels, (y, x). Raises StorageError if they cannot be decoded."""
    try:
        plane = np.asarray(page.asarray())
    except Exception as error:  # its decoders raise all kinds of errors
        raise StorageError(f"{where} cannot be decoded ({type(error).__name__}: {error})") from error
    if plane.shape != shape:
        raise StorageError(f"{where} has {plane.shape} voxels, not {shape}: it has changed")
    return plane


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What tifffile says of a file within the block: it goes on with what is left of one that is cut short."""
    said, here, log = list[str](), threading.get_ident(), logging.getLogger("tifffile")

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == here:
                said.append(" ".join(record.getMessage().split()))

    listener = Listener(logging.ERROR)
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


def _pages_of(url: str, tiff: tifffile.TiffFile) -> list[tuple[int, int]]:
    """The pages that are the slices, in their order."""
    first, pages = tiff.series[0], list[tuple[int, int]]()
    for number, series in enumerate(tiff.series):
        colour = series.keyframe.samplesperpixel > 1 or int(series.keyframe.photometric) not in GREY
        if colour:
            raise InputError(f"{url} holds colours: expected grey values, one a voxel; convert it to grey first")
        lead = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YX"]
        if sum(size > 1 for _, size in lead) > 1 or len(series.axes) - len(lead) != 2:
            sizes = ", ".join(f"{axis} {size}" for axis, size in zip(series.axes, series.shape, strict=True))
            raise InputError(f"{url} has the axes {sizes}: expected one beside y and x; export one channel or time")
        alike = (series.keyframe.shape[:2], series.dtype) == (first.keyframe.shape[:2], first.dtype)
        if not alike:
            raise InputError(
                f"{url}: page {len(pages)} has {series.keyframe.shape} voxels of {series.dtype}, the first "
                f"{first.keyframe.shape} of {first.dtype}: expected slices of one size"
            )
        pages += [(number, page) for page in range(math.prod(size for _, size in lead))]
    return pages


def _refuse_cut_short(url: str, tiff: tifffile.TiffFile, size: int) -> None:
    for series in tiff.series:
        ends = [
            offset + count
            for page in series.pages
            if page is not None
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        if series.dataoffset is not None:
            ends.append(series.dataoffset + math.prod(series.shape) * series.dtype.itemsize)
        if max(ends, default=0) > size:
            raise InputError(f"{url} is cut short: it has {size} bytes of {max(ends)}; copy it again")


def _voxel_nm(tiff: tifffile.TiffFile) -> Triple | None:
    """By OME or ImageJ; what plain TIFF says of dots an inch is meant for printers."""
    if tiff.is_ome and tiff.ome_metadata:
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
        units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]
        return nm_of(sizes, units)
    if tiff.is_imagej and tiff.imagej_metadata:
        told, page = tiff.imagej_metadata, tiff.pages.first
        unit = str(told.get("unit", "")).replace("\\u00B5", "µ")
        across = [_size_of_resolution(page, name) for name in ("YResolution", "XResolution")]
        return nm_of([told.get("spacing"), *across], [unit] * 3)
    return None


def _size_of_resolution(page: Any, name: str) -> float | None:
    tag = page.tags.get(name)
    if tag is None:
        return None
    voxels, length = tag.value
    return length / voxels if voxels else None


def plane_of(file: BinaryIO, url: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The one slice of a file. Raises StorageError if it cannot be decoded."""
    try:
        with tifffile.TiffFile(file, is_ome=False) as tiff:
            return decoded(tiff.pages.first, url, shape)
    except (tifffile.TiffFileError, ValueError, LookupError) as error:
        raise StorageError(f"{url} cannot be read ({type(error).__name__}: {error})") from error
