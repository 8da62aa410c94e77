"""Which slabs to denoise, how, and into what: decided before any voxel is read.

A plan is small and pickles: it goes with every task. Two plans with equal settings give the same voxels, up to rounding
between devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Cut, Shape, Span, boxes_of, tiles_of
from nrrn_pipeline.network import reach_of
from nrrn_pipeline.places import absolute
from nrrn_pipeline.volume import MAX_AXIS, Volume, refuse_unwritable

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before

CHUNK: Shape = (16, 256, 256)  # 1 MiB of uint8: what a viewer fetches at a time
SHARD: Shape = (64, 512, 512)  # 16 MiB of uint8: few files, yet one task's worth
MAX_SLABS = 2**22  # a driver keeps about a kB of each


@dataclass(frozen=True)
class Weights:
    """A weights file and what a plan must know of it."""

    path: str
    sha256: str
    units: int
    channels: int

    @property
    def reach(self) -> int:
        """The network's, in voxels."""
        return reach_of(self.units)


@dataclass(frozen=True)
class Method:
    """How a slice is estimated: from `images` slices (3: the paper's; 2; 1), with "slice" or "volume" statistics."""

    images: int = 3
    statistics: str = "slice"

    def __post_init__(self) -> None:
        """Raises InputError for what is no method."""
        if self.images not in (1, 2, 3):
            raise InputError(f"images {self.images} is not possible: use 3 (the paper's method), 2 or 1")
        if self.statistics not in ("slice", "volume"):
            raise InputError(f"statistics {self.statistics!r} is unknown: use slice or volume")


@dataclass(frozen=True)
class Layout:
    """How the work is cut and the output stored, in voxels; None takes the default.

    growing: for a source that will have more slices, so that its depth of today decides nothing.
    """

    slab: Shape | None = None
    chunk: Shape | None = None
    shard: Shape | None = None
    tile: int = 256
    halo: int | None = None
    growing: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for sizes below 1."""
        for name in ("slab", "chunk", "shard"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or min(size) < 1):
                raise InputError(f"{name} {size} is not possible: use three sizes Z,Y,X of 1 or more")


@dataclass(frozen=True, order=True)
class Slab:
    """One unit of work, in the source's voxels: `keep` is written, `read` is read for it."""

    keep: Box
    read: Box

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return slab_key(self.keep)

    def tiles(self, tile: int, halo: int) -> Iterator[tuple[Cut, Cut]]:
        """The (y, x) cuts of its planes that the network sees one at a time."""
        for y in tiles_of(self.keep.y, self.read.y, tile, halo):
            for x in tiles_of(self.keep.x, self.read.x, tile, halo):
                yield y, x


@dataclass(frozen=True)
class DenoisePlan:
    """Everything that one run does. `box` is the part of the source that becomes the whole of the target.

    growing: the source will have more slices, and the output with it; `box` ends where a slab and a neighbour do.
    """

    source: Volume
    target: Volume
    box: Box
    weights: Weights
    slab: Shape
    tile: int
    halo: int
    method: Method
    growing: bool = False

    @property
    def group_url(self) -> str:
        """The OME-Zarr group that holds the target."""
        return self.target.group_url

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """All slabs, in storage order."""
        return tuple(self._slab(keep) for keep in boxes_of(self.box, self.slab))

    @property
    def statistics_z(self) -> Span:
        """The slices whose statistics are needed: the triplets' own, or all for statistics of the volume."""
        return self.source.box.z if self.method.statistics == "volume" else self.box.z.grown(1, self.source.box.z)

    def target_box(self, slab: Slab) -> Box:
        """Where the slab's kept voxels lie in the target."""
        return slab.keep.shifted(self.box)

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever changes a voxel of the output, or which task writes it; JSON."""
        return {
            "algorithm": ALGORITHM,
            "source": self.source.url,
            "source shape": list(self.source.shape),
            "dtype": self.source.dtype,
            "roi": str(self.box),
            "weights sha256": self.weights.sha256,
            "slab": list(self.slab),
            "shard": list(self.target.write_unit),
            "chunk": list(self.target.chunk),
            "tile": self.tile,
            "halo": self.halo,
            "images": self.method.images,
            "statistics": self.method.statistics,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def _slab(self, keep: Box) -> Slab:
        bounds = self.source.box
        z, y, x = (
            span.grown(halo, bound)
            for span, halo, bound in zip(keep.spans, (1, self.halo, self.halo), bounds.spans, strict=True)
        )
        return Slab(keep, Box(z, y, x))


def slab_key(keep: Box) -> str:
    """What the ledger calls the slab that writes `keep`."""
    return f"z{keep.z.start}-y{keep.y.start}-x{keep.x.start}"


def plan_denoise(
    source: Volume,
    group_url: str,
    weights: Weights,
    layout: Layout = Layout(),
    roi: Box | None = None,
    method: Method = Method(),
) -> DenoisePlan:
    """The plan that denoises `source`, or its part `roi`, into a new OME-Zarr group at `group_url`.

    Raises InputError if the settings cannot give an exact output; reads and writes nothing.
    """
    group_url = absolute(group_url)
    _refuse_overlap(source.group_url, group_url)
    box = roi or source.box
    for span, bound, axis in zip(box.spans, source.box.spans, "zyx", strict=True):
        if not bound.start <= span.start < span.stop <= bound.stop:
            raise InputError(
                f"roi {axis}={span.start}:{span.stop} is empty or not inside the volume: use a part of 0:{bound.stop}"
            )
    target = _target_volume(source, group_url, box, layout)
    refuse_unwritable(target)
    slab = layout.slab or target.write_unit
    _refuse_unaligned(slab, target)
    slabs = prod(-(-length // size) for length, size in zip(box.shape, slab, strict=True))
    units = prod(-(-length // size) for length, size in zip(box.shape, target.write_unit, strict=True))
    if units > MAX_SLABS:
        raise InputError(f"{units} shards of {target.write_unit} are too many to keep account of: use a larger --shard")
    if slabs > MAX_SLABS:
        raise InputError(f"{slabs} slabs of {slab} are too many to keep account of: use a larger --slab, or a --roi")
    reach = weights.reach
    halo = reach if layout.halo is None else layout.halo
    if halo < reach:
        raise InputError(f"halo {halo} is less than the network's reach {reach}: seams would show; use {reach} or more")
    if layout.tile <= 2 * halo:
        raise InputError(
            f"tile {layout.tile} keeps nothing beside a halo of {halo} on each side: use a tile of more than {2 * halo}"
        )
    return DenoisePlan(source, target, box, weights, slab, layout.tile, halo, method, layout.growing)


def _target_volume(source: Volume, group_url: str, box: Box, layout: Layout) -> Volume:
    """The array that will hold the denoised `box`: the source's dtype, axes and voxel size, in its own storage units.

    Raises InputError if the shard is not made of whole chunks.
    """
    extent = (MAX_AXIS, *box.shape[1:]) if layout.growing else box.shape
    chunk = layout.chunk or _fitted(CHUNK, extent, (1, 1, 1))
    shard = layout.shard or _fitted(SHARD, extent, chunk)
    for size, unit, axis in zip(shard, chunk, "zyx", strict=True):
        if size % unit:
            near = _nearest_multiple(size, unit)
            raise InputError(f"shard {axis}={size} is not a multiple of the chunk's {unit}; use {axis}={near}")
    origin = tuple(
        start + span.start * size for start, span, size in zip(source.origin, box.spans, source.voxel_size, strict=True)
    )
    return Volume(
        url=f"{group_url}/0",
        shape=box.shape,
        dtype=source.dtype,
        chunk=chunk,
        write_unit=shard,
        axes=source.axes,
        voxel_size=source.voxel_size,
        origin=(origin[0], origin[1], origin[2]),
        in_nm=source.in_nm,
        level_path="0",
    )


def _fitted(wanted: Shape, extent: Shape, unit: Shape) -> Shape:
    """`wanted`, but no more than holds the whole extent; a multiple of `unit`."""
    z, y, x = (max(u, min(-(-n // u) * u, w // u * u)) for w, n, u in zip(wanted, extent, unit, strict=True))
    return z, y, x


def _refuse_unaligned(slab: Shape, target: Volume) -> None:
    for size, unit, length, axis in zip(slab, target.write_unit, target.shape, "zyx", strict=True):
        if size % unit and size < length:
            raise InputError(
                f"slab {axis}={size} is not a multiple of the target's write unit {unit}: two tasks would write into "
                f"one; use {axis}={_nearest_multiple(size, unit)}"
            )


def _nearest_multiple(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)


def _refuse_overlap(source_url: str, group_url: str) -> None:
    for inner, outer in ((source_url, group_url), (group_url, source_url)):
        if inner == outer or inner.startswith(outer.rstrip("/") + "/"):
            raise InputError(f"the output {group_url} lies on top of the input {source_url}: choose another path")
