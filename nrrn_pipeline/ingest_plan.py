"""Which slabs to bring into Zarr, out of a stack of slices in another format, and how they are cut for that.

A slab holds whole units of what the source decodes together, so that nothing is decoded twice: of a folder of images
whole slices, as many as memory carries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.formats import Stack
from nrrn_pipeline.geometry import Shape
from nrrn_pipeline.ome import Triple
from nrrn_pipeline.places import absolute
from nrrn_pipeline.slabs import CHUNK, SHARD, CopyPlan, Layout, Slab, cut
from nrrn_pipeline.volume import DTYPES, Volume

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before
SLAB_BYTES = 2**28  # of one slab's voxels
SIDES = {64: SHARD[1], 32: SHARD[1], 16: 1024, 8: 1024, 4: 2048, 2: 2048, 1: 2048}  # of shards, by their depth


@dataclass(frozen=True)
class IngestPlan(CopyPlan):
    """A stack as an OME-Zarr volume, voxel by voxel, in the target's dtype."""

    stack: Stack
    target: Volume
    slab: Shape
    measures: bool = True
    stage: ClassVar[str] = "ingesting"  # type: ignore[misc]

    @property
    def source_url(self) -> str:  # type: ignore[override]
        """The stack's."""
        return self.stack.url

    @property
    def settings(self) -> dict[str, Any]:
        """See Plan."""
        return {
            "algorithm": ALGORITHM,
            "ingested": self.stack.url,
            "files": self.stack.fingerprint,
            "source shape": list(self.stack.shape),
            "voxel size": list(self.target.voxel_size),
            **self.target_settings,
        }

    @property
    def origins(self) -> dict[str, Any]:
        """Where it came from, and what was wrong with it."""
        return {"source group": self.stack.url, "notes": list(self.stack.notes)}

    @property
    def slab_bytes(self) -> int:
        """One slab as it is stored, and as it will be if that is another dtype; a slice of floats that is measured."""
        largest, stored = self.slabs.largest().keep, np.dtype(self.stack.dtype)
        items = self.target.itemsize + (stored.itemsize if stored != self.target.dtype else 0)
        measured = 16 if self.target.dtype == "float32" or stored != self.target.dtype else 0
        return largest.size * items + measured * prod(largest.shape[1:])

    def voxels(self, slab: Slab) -> NDArray[Any]:
        """The slab's voxels. Raises InputError if the target's dtype cannot hold one of them."""
        return _exactly_as(self.stack.read(slab.keep), self.target.dtype, f"{self.stack.url}, voxels {slab.keep}")


def plan_ingest(
    stack: Stack, output: str, voxel_nm: Triple | None = None, dtype: str | None = None, layout: Layout = Layout()
) -> IngestPlan:
    """The plan that brings a stack into a new OME-Zarr group at `output`.

    voxel_nm: z, y, x, if the stack does not say, or not rightly. dtype: another one than it has, which must hold every
    voxel. Raises InputError if that cannot be; reads and writes nothing.
    """
    dtype = dtype or stack.dtype
    if dtype not in DTYPES:
        raise InputError(
            f"{stack.url} holds {dtype} voxels, and volumes are of {', '.join(DTYPES)}: give --as, one of these that "
            "holds every voxel"
        )
    size = voxel_nm or stack.voxel_nm
    source = Volume(stack.url, stack.shape, dtype, stack.unit, stack.unit)
    if size is not None:
        source = replace(source, voxel_size=size, in_nm=True)
    target, slab = cut(source, absolute(output), source.box, _layout_for(stack, source, layout))
    return IngestPlan(stack, target, slab)


def _layout_for(stack: Stack, source: Volume, layout: Layout) -> Layout:
    """The layout, and what it leaves open so that a slab holds whole units of the stack and fits SLAB_BYTES."""
    item = max(np.dtype(stack.dtype).itemsize, source.itemsize)
    for depth, side in SIDES.items():
        shard = layout.shard or (depth, side, side)
        for slab in (_together(stack.unit, shard), _covering((1, *stack.unit[1:]), shard)):
            if fits := prod(map(min, slab, stack.shape)) * item <= SLAB_BYTES:
                break
        if fits:
            break
    chunk = layout.chunk or (min(CHUNK[0], shard[0]), *CHUNK[1:])
    return replace(layout, chunk=chunk, shard=shard, slab=layout.slab or slab)


def _together(unit: Shape, shard: Shape) -> Shape:
    """Voxels that are whole units and whole shards."""
    z, y, x = (lcm(one, other) for one, other in zip(unit, shard, strict=True))
    return z, y, x


def _covering(unit: Shape, shard: Shape) -> Shape:
    """Whole shards, no less than a unit."""
    z, y, x = (-(-one // other) * other for one, other in zip(unit, shard, strict=True))
    return z, y, x


def _exactly_as(voxels: NDArray[Any], dtype: str, where: str) -> NDArray[Any]:
    """The same numbers in another dtype; floats may be rounded to float32."""
    if voxels.dtype == dtype:
        return voxels
    wanted = np.dtype(dtype)
    found = np.empty(voxels.shape, wanted)
    for to, plane in zip(found, voxels, strict=True):
        with np.errstate(invalid="ignore", over="ignore"):
            to[...] = plane.astype(wanted)
        if not (plane.dtype.kind == wanted.kind == "f" or np.array_equal(to.astype(np.float64), plane)):
            low, high = plane.min(), plane.max()
            raise InputError(f"{where} are {low:g} to {high:g}, not all of which {dtype} can hold: use another --as")
    return found
