"""Which slabs to denoise, how, and into what: decided before any voxel is read.

A plan is small and pickles: it goes with every task. Two plans with equal settings give the same voxels, up to rounding
between devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, overload

from nrrn_pipeline.denoisers import Denoiser, stack_bytes, working_bytes
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.geometry import Box, Cut, Shape, Span, spans_of, tiles_of
from nrrn_pipeline.network import HALVES, KINDS, refuse_unknown_precision
from nrrn_pipeline.places import absolute
from nrrn_pipeline.volume import MAX_AXIS, Volume, refuse_unwritable

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before

CHUNK: Shape = (16, 256, 256)  # 1 MiB of uint8: what a viewer fetches at a time
SHARD: Shape = (64, 512, 512)  # 16 MiB of uint8: few files, yet one task's worth
TILE_BYTES = 2**30  # for one tile: its stack of slices, and what the network makes of it
MAX_SLABS = 2**22  # a driver keeps about a kB of each


STITCHES = ("crop", "blend")


@dataclass(frozen=True)
class Method:
    """How a slice is estimated: from `images` slices (3: the paper's; 2; 1), with "slice" or "volume" statistics.

    name: a filter's, in the network's place, or the kind of network that the weights must hold; None: what they hold.
    stitch: "crop", the paper's; or "blend": tiles are weighted where they overlap, which keeps what their edges spoil.
    precision: of a network's arithmetic, "float32", "float16" or "bfloat16", whatever comes of it; or "auto": on a GPU
    one of the last two if it gives all but the same, which each worker measures, so that it may change as devices may.
    """

    images: int = 3
    statistics: str = "slice"
    name: str | None = None
    stitch: str = "crop"
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Raises InputError for what is no method."""
        if self.images not in (1, 2, 3):
            raise InputError(f"images {self.images} is not possible: use 3 (the paper's method), 2 or 1")
        if self.statistics not in ("slice", "volume"):
            raise InputError(f"statistics {self.statistics!r} is unknown: use slice or volume")
        if self.name is not None and self.name not in (*KINDS, *FILTERS):
            raise InputError(f"method {self.name!r} is unknown: use one of {', '.join((*KINDS, *FILTERS))}")
        if self.filter and self.images != 3:
            raise InputError(f"images {self.images} are for networks: the filter {self.name} takes what its name says")
        if self.stitch not in STITCHES:
            raise InputError(f"stitch {self.stitch!r} is unknown: use {' or '.join(STITCHES)}")
        refuse_unknown_precision(self.precision)

    @property
    def filter(self) -> bool:
        """Whether a filter does it, without weights."""
        return self.name in FILTERS


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


@dataclass(frozen=True)
class DenoisePlan:
    """Everything that one run does. `box` is the part of the source that becomes the whole of the target.

    growing: the source will have more slices, and the output with it; `box` ends where a slab and a neighbour do.
    """

    source: Volume
    target: Volume
    box: Box
    denoiser: Denoiser
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
    def slabs(self) -> Slabs:
        """All slabs, in storage order."""
        axes = []
        for span, step, bound, axis in zip(self.box.spans, self.slab, self.source.box.spans, "zyx", strict=True):
            halo, grid = (1, 1) if axis == "z" else (self.halo, self.denoiser.grid)
            axes.append([Cut(keep, keep.grown(halo, bound).aligned(grid)) for keep in spans_of(span, step)])
        return Slabs(*axes)

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
            **self.denoiser.settings,
            "slab": list(self.slab),
            "shard": list(self.target.write_unit),
            "chunk": list(self.target.chunk),
            "tile": self.tile,
            "halo": self.halo,
            "images": self.method.images,
            "statistics": self.method.statistics,
            **({} if self.method.stitch == "crop" else {"stitch": self.method.stitch}),
            **({"precision": self.method.precision} if self.method.precision in HALVES else {}),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def tiles(self, slab: Slab) -> Iterator[tuple[Cut, Cut]]:
        """The (y, x) cuts of a slab's planes that the network sees one at a time."""
        return product(self.tiles_along(Cut(slab.keep.y, slab.read.y)), self.tiles_along(Cut(slab.keep.x, slab.read.x)))

    def tiles_along(self, slab: Cut) -> tuple[Cut, ...]:
        """The same along y or x, by a slab's cut there."""
        return tiles_of(slab.keep, slab.read, self.tile, self.halo, self.denoiser.grid)


def slab_key(keep: Box) -> str:
    """What the ledger calls the slab that writes `keep`."""
    return f"z{keep.z.start}-y{keep.y.start}-x{keep.x.start}"


def plan_denoise(
    source: Volume,
    group_url: str,
    denoiser: Denoiser,
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
    refuse_outside(box, source.box)
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
    reach = denoiser.reach
    halo = reach if layout.halo is None else layout.halo
    if halo < reach:
        raise InputError(f"halo {halo} is less than the method's reach {reach}: seams would show; use {reach} or more")
    tile = tile_for(denoiser, method, slab, halo) if layout.tile is None else layout.tile
    if tile < (least := 2 * halo + denoiser.grid):
        raise InputError(f"tile {tile} keeps nothing beside a halo of {halo} on each side: use {least} or more")
    return DenoisePlan(source, target, box, denoiser, slab, tile, halo, method, layout.growing)


def tile_for(denoiser: Denoiser, method: Method, slab: Shape, halo: int) -> int:
    """Side of the windows, as few and large as a slab's planes can be cut into within TILE_BYTES of memory."""
    side = max(slab[1:])
    for pieces in range(1, side + 1):
        tile = -(-side // pieces) + 2 * (halo + denoiser.grid - 1)
        taken = working_bytes(denoiser, tile**2, method.images) + stack_bytes(slab[0] + 2, tile**2)
        if taken <= TILE_BYTES:
            break
    return tile


def refuse_outside(part: Box, whole: Box, name: str = "roi") -> None:
    """Raises InputError for a part that is empty, or not inside the whole; `name`: what the user calls it."""
    for span, bound, axis in zip(part.spans, whole.spans, "zyx", strict=True):
        if not bound.start <= span.start < span.stop <= bound.stop:
            raise InputError(f"{name} {axis}={span} is empty or not inside the volume: use a part of {bound}")


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


def _refuse_overlap(source_url: str, group_url: str) -> None:
    for inner, outer in ((source_url, group_url), (group_url, source_url)):
        if inner == outer or inner.startswith(outer.rstrip("/") + "/"):
            raise InputError(f"the output {group_url} lies on top of the input {source_url}: choose another path")
