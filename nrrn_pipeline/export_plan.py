"""Which slabs to copy from a volume into one that older tools read: OME-Zarr 0.4, whose Zarr 2 has chunks alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.places import absolute
from nrrn_pipeline.slabs import CHUNK, SHARD, Layout, Slab, VolumeCopyPlan, cut, fitted
from nrrn_pipeline.volume import Volume, read_box

ALGORITHM = 1  # raised whenever the same settings would give other voxels than before
SLAB_BYTES = 2**28  # of one slab's voxels, unless the source's chunks are so wide that its flattest slab takes more
MAX_CHUNK_BYTES = 2**31 - 17  # what Blosc takes at a time


@dataclass(frozen=True)
class ExportPlan(VolumeCopyPlan):
    """A part of a volume as another volume, voxel by voxel."""

    source: Volume
    target: Volume
    part: Box
    slab: Shape
    stage: ClassVar[str] = "exporting"  # type: ignore[misc]

    @property
    def box(self) -> Box:
        """See CopyPlan."""
        return self.part

    @property
    def settings(self) -> dict[str, Any]:
        """See Plan."""
        return {
            "algorithm": ALGORITHM,
            "exported": self.source.url,
            "source shape": list(self.source.shape),
            **self.target_settings,
        }

    @property
    def slab_bytes(self) -> int:
        """See CopyPlan."""
        return self.slabs.largest().keep.size * self.target.itemsize

    def voxels(self, slab: Slab) -> NDArray[Any]:
        """The slab's voxels."""
        return read_box(self.source, slab.keep)


def plan_export(source: Volume, output: str, layout: Layout = Layout(), roi: Box | None = None) -> ExportPlan:
    """The plan that copies a volume, or its part `roi`, into a new OME-Zarr 0.4 group at `output`.

    Raises InputError if that cannot be; reads and writes nothing.
    """
    box = roi or source.box
    if layout.shard is not None:
        raise InputError(f"shard {layout.shard} cannot be: Zarr 2 knows chunks alone; give a chunk instead")
    chunk = layout.chunk or fitted(CHUNK, box.shape, (1, 1, 1))
    if prod(chunk) * source.itemsize > MAX_CHUNK_BYTES:
        raise InputError(f"chunk {chunk} is larger than a chunk can be, {MAX_CHUNK_BYTES} bytes: use a smaller one")
    slab = layout.slab or _slab_for(source, chunk)
    target, slab = cut(source, absolute(output), box, replace(layout, chunk=chunk, shard=chunk, slab=slab))
    return ExportPlan(source, replace(target, zarr_format=2), box, slab)


def _slab_for(source: Volume, chunk: Shape) -> Shape:
    """As much as a shard, or a chunk of the source if that is wider, so that few of these are read twice."""
    z, y, x = (-(-max(least, own) // unit) * unit for least, own, unit in zip(SHARD, source.chunk, chunk, strict=True))
    layer = chunk[0] * y * x * source.itemsize
    return min(z, max(1, SLAB_BYTES // layer) * chunk[0]), y, x
