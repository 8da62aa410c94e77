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
from nrrn_pipeline.formats.parts import Found, Part, Raw, opened, refuse_cut_short, size_of
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple, nm_of

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".tf2")
PALETTE = 3
# of what tifffile says; all else is of tags
BROKEN = re.compile(r"page offset|series|corrupt|missing data", re.IGNORECASE)
DEPTH = "ZTIQ"  # axes that slices may lie along: z, time, a sequence, or of no name
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
            if broken := [text for text, _ in said if BROKEN.search(text)]:
                raise InputError(f"{url} is damaged or cut short: {broken[0]}")
            first = tiff.series[0]
            height, width = first.keyframe.shape[:2]
            shape, dtype = (len(pages), int(height), int(width)), first.dtype
            part: Part = Pages(url, shape, dtype.name, tuple(pages))
            if len(tiff.series) == 1 and first.dataoffset is not None:
                part = Raw(url, shape, np.dtype(dtype).newbyteorder(tiff.byteorder).str, first.dataoffset)
            errors = [text for text, level in said if level >= logging.ERROR]
            return Found(part, _voxel_nm(tiff), tuple(f"{url}: {text}" for text in errors))
    except tifffile.TiffFileError as error:
        raise InputError(f"{url} is no TIFF file, or a damaged one: {error}") from error
    except (InputError, OSError):
        raise
    except Exception as error:  # tifffile raises all kinds of errors for a file that is cut short, or worse
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
def _complaints() -> Iterator[list[tuple[str, int]]]:
    """What tifffile says of a file within the block: it goes on with what is left of one that is cut short."""
    said, here, log = list[tuple[str, int]](), threading.get_ident(), logging.getLogger("tifffile")

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == here:
                said.append((" ".join(record.getMessage().split()), record.levelno))

    listener = Listener(logging.WARNING)
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


def _pages_of(url: str, tiff: tifffile.TiffFile) -> list[tuple[int, int]]:
    """The pages that are the slices, in their order."""
    first, pages = tiff.series[0], list[tuple[int, int]]()
    if tiff.is_ome and len(tiff.series) > 1:
        raise InputError(f"{url} holds {len(tiff.series)} images: export one of them")
    for number, series in enumerate(tiff.series):
        if series.keyframe.samplesperpixel > 1 or not _is_grey(series.keyframe):
            raise InputError(f"{url} holds colours: expected grey values, one a voxel; convert it to grey first")
        axes = list(zip(series.axes, series.shape, strict=True))
        many = [axis for axis, size in axes[:-2] if size > 1]
        if not series.axes.endswith("YX") or len(many) > 1 or not set(many) <= set(DEPTH):
            sizes = ", ".join(f"{axis} {size}" for axis, size in axes)
            raise InputError(f"{url} has the axes {sizes}: expected Z before Y and X; export one channel")
        if len(series.keyframe.shape) != 2 or any(page is None for page in series.pages):
            raise InputError(f"{url} holds no whole slices of its own, page by page: save it as a plain stack")
        lead = axes[:-2]
        alike = (series.keyframe.shape[:2], series.dtype) == (first.keyframe.shape[:2], first.dtype)
        if not alike:
            raise InputError(
                f"{url}: page {len(pages)} has {series.keyframe.shape} voxels of {series.dtype}, the first "
                f"{first.keyframe.shape} of {first.dtype}: expected slices of one size"
            )
        pages += [(number, page) for page in range(math.prod(size for _, size in lead))]
    return pages


def _is_grey(page: Any) -> bool:
    """Whether a voxel's number is its brightness: also of a palette that is a ramp of greys."""
    colours = page.colormap
    if int(page.photometric) != PALETTE or colours is None:
        return int(page.photometric) in GREY
    ramp = np.arange(colours.shape[1]) * 65535 // (colours.shape[1] - 1)
    return bool((np.abs(colours.astype(np.int64) - ramp) < 257).all())


def _refuse_cut_short(url: str, tiff: tifffile.TiffFile, size: int) -> None:
    for series in tiff.series:
        end = 0 if series.dataoffset is None else series.dataoffset + math.prod(series.shape) * series.dtype.itemsize
        pages: list[Any] = [page for page in series.pages if page is not None]
        for page in pages:
            end = max(end, *map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)))
        refuse_cut_short(url, size, end)


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
        across = [_size_of_resolution(page, name) for name in ("YResolution", "XResolution")]
        units = [str(told.get(name, told.get("unit"))).replace("\\u00B5", "µ") for name in ("zunit", "yunit", "unit")]
        return nm_of([told.get("spacing"), *across], units)
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
