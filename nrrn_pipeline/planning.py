"""Which slabs to denoise, how, and into what: decided before any voxel is read.

A plan is small and pickles: it goes with every task. Two plans with equal settings give the same voxels, up to rounding
between devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from nrrn_pipeline.denoisers import Denoiser, Weights, stack_bytes, working_bytes
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.geometry import Box, Cut, Shape, Span, spans_of, tiles_of
from nrrn_pipeline.network import HALVES, KINDS, refuse_unknown_precision
from nrrn_pipeline.places import absolute
from nrrn_pipeline.slabs import Layout, Plan, Slab, Slabs, cut
from nrrn_pipeline.volume import Volume

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before

TILE_BYTES = 2**30  # for one tile: its stack of slices, and what the network makes of it
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
class DenoisePlan(Plan):
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
    stage: ClassVar[str] = "denoising"  # type: ignore[misc]

    @property
    def slabs(self) -> Slabs:
        """All slabs, in storage order."""
        return self.slabs_on(
            *(list(spans_of(span, step)) for span, step in zip(self.box.spans, self.slab, strict=True))
        )

    def slabs_on(self, z: Sequence[Span], y: Sequence[Span], x: Sequence[Span]) -> Slabs:
        """The slabs that keep the boxes of a grid."""
        axes = []
        for spans, bound, axis in zip((z, y, x), self.source.box.spans, "zyx", strict=True):
            halo, grid = (1, 1) if axis == "z" else (self.halo, self.denoiser.grid)
            axes.append([Cut(keep, keep.grown(halo, bound).aligned(grid)) for keep in spans])
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
    def origins(self) -> dict[str, Any]:
        """Where to find weights and source again."""
        weights = self.denoiser.path if isinstance(self.denoiser, Weights) else None
        return {"weights": weights, "source group": self.source.group_url}

    def tiles(self, slab: Slab) -> Iterator[tuple[Cut, Cut]]:
        """The (y, x) cuts of a slab's planes that the network sees one at a time."""
        return product(self.tiles_along(Cut(slab.keep.y, slab.read.y)), self.tiles_along(Cut(slab.keep.x, slab.read.x)))

    def tiles_along(self, slab: Cut) -> tuple[Cut, ...]:
        """The same along y or x, by a slab's cut there."""
        return tiles_of(slab.keep, slab.read, self.tile, self.halo, self.denoiser.grid)


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
    box = roi or source.box
    target, slab = cut(source, absolute(group_url), box, layout)
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
