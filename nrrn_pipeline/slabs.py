"""What every run works off: slabs, each made by itself and written as whole storage units; how they are cut and stored.

A plan is small and pickles: it goes with every task.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, overload

from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Cut, Shape, spans_of
from nrrn_pipeline.volume import MAX_AXIS, Volume, refuse_unwritable

CHUNK: Shape = (16, 256, 256)  # 1 MiB of uint8: what a viewer fetches at a time
SHARD: Shape = (64, 512, 512)  # 16 MiB of uint8: few files, yet one task's worth
MAX_SLABS = 2**22  # a driver keeps about a kB of each


@dataclass(frozen=True)
class Layout:
    """How the work is cut and the output stored, in voxels; None takes the default.

    tile: side of the largest window that the network sees; by default what computes the least within TILE_BYTES.
    growing: for a source that will have more slices, so that its depth of today decides nothing.
    """

    slab: Shape | None = None
    chunk: Shape | None = None
    shard: Shape | None = None
    tile: int | None = None
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


class Slabs(Sequence[Slab]):
    """All slabs of a plan, in storage order, x fastest; each made when it is asked for, as there may be millions."""

    def __init__(self, z: Sequence[Cut], y: Sequence[Cut], x: Sequence[Cut]) -> None:
        self.axes = (z, y, x)

    def __len__(self) -> int:
        return prod(map(len, self.axes))

    def __iter__(self) -> Iterator[Slab]:
        return (_slab(*cuts) for cuts in product(*self.axes))

    @overload
    def __getitem__(self, place: int) -> Slab: ...

    @overload
    def __getitem__(self, place: slice) -> list[Slab]: ...

    def __getitem__(self, place: int | slice) -> Slab | list[Slab]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        of_z, of_y, of_x = self.axes
        rest, x = divmod(range(len(self))[place], len(of_x))
        return _slab(of_z[rest // len(of_y)], of_y[rest % len(of_y)], of_x[x])

    def total(self, along: Callable[[Cut, int], int]) -> int:
        """The sum over all slabs of a product over z, y, x (0, 1, 2) of what `along` says of their cuts."""
        return prod(sum(along(cut, axis) for cut in cuts) for axis, cuts in enumerate(self.axes))

    def largest(self) -> Slab:
        """The one that reads the most."""
        return _slab(*(max(cuts, key=lambda cut: len(cut.read)) for cuts in self.axes))


def _slab(z: Cut, y: Cut, x: Cut) -> Slab:
    return Slab(Box(z.keep, y.keep, x.keep), Box(z.read, y.read, x.read))


class Plan(ABC):
    """Everything that one run does: the array that it makes, slab by slab, and out of what."""

    stage: str  # a word for what is done
    target: Volume
    growing: bool = False  # there will be more slices, and more slabs with them

    @property
    def group_url(self) -> str:
        """The OME-Zarr group that holds the target."""
        return self.target.group_url

    @property
    def root_url(self) -> str:
        """What is made, or made anew, as a whole, and tells in its attribute `nrrn` how: the group, or a level."""
        return self.target.url if self.is_level else self.group_url

    @property
    def is_level(self) -> bool:
        """Whether it adds a level of lower resolution to a group that is there."""
        return False

    @property
    @abstractmethod
    def slabs(self) -> Sequence[Slab]:
        """All slabs, in storage order."""

    def target_box(self, slab: Slab) -> Box:
        """Where the slab's kept voxels lie in the target."""
        return slab.keep

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Whatever changes a voxel of the output, or which task writes it; JSON.

        For whoever checks the output: roi, slab, chunk, shard and dtype. Slabs are pieces of the roi, counted from it.
        """

    @property
    @abstractmethod
    def origins(self) -> dict[str, Any]:
        """What people will want to know of where the output came from, beside its settings; JSON."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


class CopyPlan(Plan):
    """A plan whose voxels go from storage to storage, resampled at most. `source_url`: where from, for people.

    measures: the slices' mean and std are kept with the output, which is read as a source next.
    """

    source_url: str
    slab: Shape
    measures: bool = False

    @property
    def box(self) -> Box:
        """The part of the source that becomes the whole of the target."""
        return self.target.box

    @property
    def slabs(self) -> Slabs:
        """All slabs, in storage order; they read what they write."""
        axes = zip(self.box.spans, self.slab, strict=True)
        return Slabs(*([Cut(keep, keep) for keep in spans_of(span, step)] for span, step in axes))

    def target_box(self, slab: Slab) -> Box:
        """See Plan."""
        return slab.keep.shifted(self.box)

    @property
    def target_settings(self) -> dict[str, Any]:
        """Those of the settings that are of the target alone, and its place."""
        return {
            "dtype": self.target.dtype,
            "roi": str(self.box),
            "slab": list(self.slab),
            "shard": list(self.target.write_unit),
            "chunk": list(self.target.chunk),
            **({} if self.target.zarr_format == 3 else {"zarr format": self.target.zarr_format}),
        }

    @property
    @abstractmethod
    def slab_bytes(self) -> int:
        """Memory that a slab takes until it is encoded."""

    @abstractmethod
    def voxels(self, slab: Slab) -> NDArray[Any]:
        """The voxels of slab.keep, in the target's dtype; read now."""


class VolumeCopyPlan(CopyPlan):
    """A CopyPlan whose source is a volume."""

    source: Volume

    @property
    def source_url(self) -> str:  # type: ignore[override]
        """The array's."""
        return self.source.url

    @property
    def origins(self) -> dict[str, Any]:
        """See Plan."""
        return {"source group": self.source.group_url}


def slab_key(keep: Box) -> str:
    """What the ledger calls the slab that writes `keep`."""
    return f"z{keep.z.start}-y{keep.y.start}-x{keep.x.start}"


def refuse_outside(part: Box, whole: Box, name: str = "roi") -> None:
    """Raises InputError for a part that is empty, or not inside the whole; `name`: what the user calls it."""
    for span, bound, axis in zip(part.spans, whole.spans, "zyx", strict=True):
        if not bound.start <= span.start < span.stop <= bound.stop:
            raise InputError(f"{name} {axis}={span} is empty or not inside the volume: use a part of {bound}")


def cut(source: Volume, group_url: str, box: Box, layout: Layout) -> tuple[Volume, Shape]:
    """The array that will hold `box` of a source, in a new group at `group_url`, and the slabs that it is made in.

    Raises InputError if tasks would share a write unit, or there are too many of them, or it could not be read again.
    """
    refuse_overlap(source.group_url, group_url)
    refuse_outside(box, source.box)
    target = _target_volume(source, group_url, box, layout)
    refuse_unwritable(target)
    slab = layout.slab or target.write_unit
    _refuse_unaligned(slab, target)
    slabs, units = (
        prod(-(-length // size) for length, size in zip(box.shape, each, strict=True))
        for each in (slab, target.write_unit)
    )
    if units > MAX_SLABS:
        larger = "--chunk" if layout.shard and layout.shard == layout.chunk else "--shard"
        raise InputError(
            f"{units} shards of {target.write_unit} are too many to keep account of: use a larger {larger}"
        )
    if slabs > MAX_SLABS:
        raise InputError(f"{slabs} slabs of {slab} are too many to keep account of: use a larger --slab, or a --roi")
    return target, slab


def _target_volume(source: Volume, group_url: str, box: Box, layout: Layout) -> Volume:
    """The array that will hold the denoised `box`: the source's dtype, axes and voxel size, in its own storage units.

    Raises InputError if the shard is not made of whole chunks.
    """
    extent = (MAX_AXIS, *box.shape[1:]) if layout.growing else box.shape
    chunk = layout.chunk or fitted(CHUNK, extent, (1, 1, 1))
    shard = layout.shard or fitted(SHARD, extent, chunk)
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


def fitted(wanted: Shape, extent: Shape, unit: Shape) -> Shape:
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


def refuse_overlap(source_url: str, group_url: str) -> None:
    """Raises InputError if one lies in the other."""
    for inner, outer in ((source_url, group_url), (group_url, source_url)):
        if inner == outer or inner.startswith(outer.rstrip("/") + "/"):
            raise InputError(f"the output {group_url} lies on top of the input {source_url}: choose another path")
