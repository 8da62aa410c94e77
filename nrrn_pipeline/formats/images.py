"""Slices that are files of their own, TIFF or PNG, in a folder: in natural order, with what is lacking or unlike."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, StorageError, few
from nrrn_pipeline.formats.parts import Part, opened, size_of
from nrrn_pipeline.formats.tiff import find_tiff, plane_of
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple
from nrrn_pipeline.places import REQUESTS_AT_ONCE
from nrrn_pipeline.retrying import retried

PNG = (".png",)
Image.MAX_IMAGE_PIXELS = 2**31  # slices are larger than what Pillow takes for an attack
PNG_END = b"IEND\xaeB`\x82"
SHOWN = 5  # names in a message
MOST_MISSING = 0.5  # of the numbers from first to last; with more of them the numbers are no count, but times
NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
LACKING = ("refuse", "blank", "skip")
_DONE = {"blank": "blank slices in their place", "skip": "left out"}


@dataclass(frozen=True)
class Images(Part):
    """Slices in files of one folder, by their names; "" is a slice that is lacking, and blank."""

    folder: str
    names: tuple[str, ...]
    plane: tuple[int, int]
    dtype: str

    @property
    def url(self) -> str:  # type: ignore[override]
        """The folder's."""
        return self.folder

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """One slice a name."""
        return len(self.names), *self.plane

    @property
    def unit(self) -> Shape:
        """Whole slices."""
        return 1, *self.plane

    def read(self, box: Box) -> NDArray[Any]:
        """File by file. Raises StorageError for one that is gone, has changed or cannot be decoded."""
        found = np.zeros(box.shape, self.dtype)
        for z in range(box.z.start, box.z.stop):
            if self.names[z]:
                plane = _read_plane(f"{self.folder}/{self.names[z]}", self.plane)
                if plane.dtype.newbyteorder("=") != np.dtype(self.dtype):
                    raise StorageError(f"{self.names[z]} holds {plane.dtype}, not {self.dtype}: it has changed")
                found[z - box.z.start] = plane[box.y.start : box.y.stop, box.x.start : box.x.stop]
        return found


@dataclass(frozen=True)
class Header:
    """What one file says of itself, or what is wrong with it."""

    plane: tuple[int, int] = (0, 0)
    dtype: str = ""
    voxel_nm: Triple | None = None
    wrong: str = ""


def natural(name: str) -> list[Any]:
    """A key to sort by: slice_2 before slice_10."""
    parts = re.split(f"({NUMBER.pattern})", name)
    return [Fraction(part) if odd % 2 else part.lower() for odd, part in enumerate(parts)]


def find_images(folder: str, names: Sequence[str], lacking: str) -> tuple[Images, Triple | None, tuple[str, ...]]:
    """The slices that these files of a folder are, the size of their voxels in nm, and what a user should know.

    A slice lacks where the files' numbers jump, and where a file is cut short or unlike most others. `lacking`:
    "refuse" such a folder, put a "blank" slice in its place, or "skip" it, so that its neighbours touch. Raises
    InputError.
    """
    names = sorted(names, key=natural)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        headers = list(pool.map(partial(_header, folder), names))
    kinds = Counter((each.plane, each.dtype) for each in headers if not each.wrong)
    if not kinds:
        raise InputError(f"{folder}: no slice can be read; {names[0]} {headers[0].wrong}")
    (plane, dtype), _ = kinds.most_common(1)[0]
    numbers = running_numbers(folder, names)
    slices, bad = list[str](), list[str]()
    for place, (name, header) in enumerate(zip(names, headers, strict=True)):
        if numbers and place and (missing := numbers.missing_before(place)):
            bad.append(f"{numbers.text(place)} between {names[place - 1]} and {name}")
            slices += [""] * missing
        wrong = header.wrong or _unlike(header, plane, dtype)
        bad += [f"{name} {wrong}"] if wrong else []
        slices.append("" if wrong else name)
    if bad and lacking == "refuse":
        raise InputError(
            f"{folder} is not whole: {few(bad, SHOWN, '; ')}. Mend it, or give --lacking blank (a blank slice in each "
            "place, which denoising leaves out) or --lacking skip (their neighbours touch)"
        )
    if lacking == "skip":
        slices = [name for name in slices if name]
    notes = [f"{few(bad, SHOWN, '; ')}: {_DONE[lacking]}"] if bad else []
    if not numbers and len(names) > 1:
        notes.append("the files' names hold no number that counts: slices that are missing cannot be told")
    sizes = {each.voxel_nm for each in headers if not each.wrong}
    if len(sizes) > 1:
        notes.append(f"the files say that voxels are of {len(sizes)} sizes, such as {sorted(map(str, sizes))[:2]} nm")
    return Images(folder, tuple(slices), plane, dtype), sizes.pop() if len(sizes) == 1 else None, tuple(notes)


@dataclass(frozen=True)
class Numbers:
    """The number of each slice, and their step from one to the next."""

    numbers: tuple[Fraction, ...]
    step: Fraction

    def missing_before(self, place: int) -> int:
        """How many slices are missing right before the one at `place`."""
        return int((self.numbers[place] - self.numbers[place - 1]) / self.step) - 1

    @property
    def missing(self) -> float:
        """The share of all numbers from first to last."""
        return 1 - len(self.numbers) / (int((self.numbers[-1] - self.numbers[0]) / self.step) + 1)

    def text(self, place: int) -> str:
        """Which are missing right before the one at `place`."""
        count = self.missing_before(place)
        first, last = (float(self.numbers[at] + way * self.step) for at, way in ((place - 1, 1), (place, -1)))
        return f"slice {first:g} is missing" if count == 1 else f"{count} slices {first:g} to {last:g} are missing"


def running_numbers(folder: str, names: Sequence[str]) -> Numbers | None:
    """The number in each name that counts slices; None if there is none that does.

    Names are in natural order. Of several numbers the one that jumps the least. Raises InputError if the names hold
    numbers, but not one a slice: they are of several detectors, channels or tiles.
    """
    if len(names) < 2 or not any(NUMBER.search(name) for name in names):
        return None
    patterns = Counter(NUMBER.sub("#", name) for name in names)
    if len(patterns) > 1:
        shown = ", ".join(f"{pattern} ({count})" for pattern, count in patterns.most_common(SHOWN))
        raise InputError(f"{folder} holds files of several kinds of names, {shown}: give those of one kind, by name")
    rising = []
    for column in zip(*(NUMBER.findall(name) for name in names), strict=True):
        numbers = tuple(map(Fraction, column))
        steps = [after - before for before, after in pairwise(numbers)]
        if min(steps) > 0:
            whole = math.lcm(*(step.denominator for step in steps))
            rising.append(Numbers(numbers, Fraction(math.gcd(*(int(step * whole) for step in steps)), whole)))
    if not rising:
        raise InputError(
            f"{folder}: no number in the names rises from each to the next, such as {names[0]}, {names[1]}: is there "
            "more than one file a slice? Give those of one detector, channel or tile by their names"
        )
    best = min(rising, key=lambda each: each.missing)
    return best if best.missing <= MOST_MISSING else None


def _unlike(header: Header, plane: tuple[int, int], dtype: str) -> str:
    if (header.plane, header.dtype) == (plane, dtype):
        return ""
    own, others = (f"{y} x {x} {kind}" for (y, x), kind in ((header.plane, header.dtype), (plane, dtype)))
    return f"is {own}, not {others}"


def _header(folder: str, name: str) -> Header:
    url = f"{folder}/{name}"
    try:
        if name.lower().endswith(PNG):
            return retried(url, lambda _: _png_header(url))
        found = retried(url, lambda _: find_tiff(url))
    except InputError as error:
        return Header(wrong=str(error).removeprefix(url).strip())
    except (FileNotFoundError, IsADirectoryError) as error:  # a broken link; all else may be another time
        return Header(wrong=f"cannot be read: {error.strerror}")
    slices, height, width = found.part.shape
    if slices != 1:
        return Header(wrong=f"holds {slices} slices: give such files by their own names")
    return Header((height, width), found.part.dtype, found.voxel_nm)


def _png_header(url: str) -> Header:
    with opened(url) as file:
        try:
            image = Image.open(file, formats=["PNG"])
        except Exception as error:  # Pillow raises all kinds of errors
            return Header(wrong=f"is no PNG image, or a damaged one ({error})")
        file.seek(max(0, size_of(file) - len(PNG_END)))
        if file.read() != PNG_END:
            return Header(wrong="is cut short")
        if image.mode not in _MODES:
            return Header(wrong="holds colours: expected grey values")
        return Header((image.height, image.width), _MODES[image.mode])


_MODES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16"}  # Pillow's


def _read_plane(url: str, shape: tuple[int, int]) -> NDArray[Any]:
    """(y, x) voxels of a file of one slice."""
    data = storage.read_file(url)
    if data is None:
        raise StorageError(f"{url} is gone")
    if not url.lower().endswith(PNG):
        return plane_of(BytesIO(data), url, shape)
    try:
        plane = np.asarray(Image.open(BytesIO(data), formats=["PNG"]))
    except Exception as error:  # Pillow raises all kinds of errors
        raise StorageError(f"{url} cannot be decoded ({error})") from error
    if plane.shape != shape:
        raise StorageError(f"{url} has {plane.shape} voxels, not {shape}: it has changed")
    return plane
