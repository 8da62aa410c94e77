"""OME-Zarr metadata as plain dictionaries, 0.4 and 0.5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nrrn_pipeline.errors import InputError

Triple = tuple[float, float, float]

_NM = {
    "angstrom": 0.1,
    "å": 0.1,
    "picometer": 1e-3,
    "pm": 1e-3,
    "nanometer": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "um": 1e3,
    "\N{MICRO SIGN}m": 1e3,
    "\N{GREEK SMALL LETTER MU}m": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "millimeter": 1e6,
    "mm": 1e6,
    "meter": 1e9,
}
MAX_PATH = 250  # characters
_TYPES = {"t": "time", "c": "channel"}


@dataclass(frozen=True)
class Level:
    """One array of a multiscale image; sizes in nm if `in_nm`, else in whatever the file's author meant."""

    path: str
    axes: tuple[str, ...]
    voxel_size: Triple
    origin: Triple
    in_nm: bool


def read_levels(attributes: Mapping[str, Any]) -> tuple[Level, ...]:
    """The levels of a group's first multiscale image, finest first; none if the group is no OME-Zarr image.

    Raises InputError if there is multiscale metadata that cannot be understood.
    """
    try:
        images = attributes.get("ome", attributes).get("multiscales", [])
        if not images:
            return ()
        image = images[0]
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", "tczyx")]
        whole = image.get("coordinateTransformations", [])
        return tuple(_level(dataset, axes, whole) for dataset in image["datasets"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"its OME-Zarr multiscales metadata is damaged ({type(error).__name__}: {error})") from error


def _level(dataset: Mapping[str, Any], axes: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> Level:
    scale, translation = [1.0] * len(axes), [0.0] * len(axes)
    for step in [*dataset.get("coordinateTransformations", []), *whole]:
        if step["type"] == "scale":
            scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
            translation = [a * float(b) for a, b in zip(translation, step["scale"], strict=True)]
        elif step["type"] == "translation":
            translation = [a + float(b) for a, b in zip(translation, step["translation"], strict=True)]
    if not all(size > 0 for size in scale) or not all(map(math.isfinite, [*scale, *translation])):
        raise ValueError(f"scale {scale} is not positive, or translation {translation} is no place")
    path = dataset["path"].rstrip("/")
    parts = path.split("/")
    if len(path) > MAX_PATH or not path.isprintable() or "://" in path or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"path {path[:MAX_PATH]!r} does not lead to an array below the group")
    units = [_NM.get(str(axis.get("unit")).lower()) for axis in axes[-3:]]
    in_nm = all(units)
    factors = [unit if in_nm and unit else 1.0 for unit in units]
    return Level(
        path=path,
        axes=tuple(str(axis["name"]).lower() for axis in axes),
        voxel_size=_triple([a * b for a, b in zip(scale[-3:], factors, strict=True)]),
        origin=_triple([a * b for a, b in zip(translation[-3:], factors, strict=True)]),
        in_nm=in_nm,
    )


def nm_of(sizes: Sequence[Any], units: Sequence[Any]) -> Triple | None:
    """Lengths in nm; None if one of them or its unit is not known, or it is none."""
    factors = [_NM.get(str(unit).lower()) for unit in units]
    if not all(factors) or None in sizes:
        return None
    lengths = [float(size) * factor for size, factor in zip(sizes, factors, strict=True) if factor]
    return _triple(lengths) if all(0 < length < math.inf for length in lengths) else None


def _triple(values: Sequence[float]) -> Triple:
    z, y, x = (float(f"{value:.12g}") for value in values)  # 0.0043 micrometer is 4.3 nm, not 4.299999999999999
    return z, y, x


def image_attributes(name: str, level: Level, zarr_format: int = 3) -> dict[str, Any]:
    """A group's attributes for an image of this one level: of OME-Zarr 0.5, or of 0.4 if its Zarr is of format 2."""
    unit = {"unit": "nanometer"} if level.in_nm else {}
    axes = [
        {"name": axis, "type": _TYPES[axis]} if axis in _TYPES else {"name": axis, "type": "space", **unit}
        for axis in level.axes
    ]
    image = {"name": name, "axes": axes, "datasets": [dataset_of(level)]}
    if zarr_format == 2:
        return {"multiscales": [{"version": "0.4", **image}]}
    return {"ome": {"version": "0.5", "multiscales": [image]}}


def dataset_of(level: Level) -> dict[str, Any]:
    """A level as an entry of a multiscale image's `datasets` (OME-Zarr 0.4 and 0.5)."""
    lead = len(level.axes) - 3
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0] * lead + list(level.voxel_size)}]
    if any(level.origin):
        transformations.append({"type": "translation", "translation": [0.0] * lead + list(level.origin)})
    return {"path": level.path, "coordinateTransformations": transformations}
