"""xarray arrays that denoise lazily, for notebooks: `import nrrn_pipeline.accessor`, then `array.nrrn.denoise(...)`.

    chunks  -> moments of each slice's part in a chunk -> mean and std of whole slices
                                                                     |
    a block's own chunk, and those that hold its halo -> normalise, tile, run, crop -> the block

Blocks are those of the array, and each task takes the chunks that it needs whole: no chunk is too thin for the halo.
"""

from __future__ import annotations

from functools import partial, reduce
from itertools import accumulate, pairwise, product
from typing import Any

import dask.array
import numpy as np
import xarray
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import refuse_unknown_device
from nrrn_pipeline.planning import DenoisePlan, Method, tile_for
from nrrn_pipeline.preparing import Location, describe_weights
from nrrn_pipeline.slab import SlabTask, computing, denoise_voxels, load_network
from nrrn_pipeline.slabs import CHUNK, Slab
from nrrn_pipeline.statistics import MeasuredBox, SliceStatistics, merge_boxes, moments_of
from nrrn_pipeline.volume import DTYPES, Volume


@xarray.register_dataarray_accessor("nrrn")
class Accessor:
    """`array.nrrn` of a (z, y, x) DataArray."""

    def __init__(self, array: xarray.DataArray) -> None:
        self._array = array

    def denoise(self, weights: Location, device: str = "auto", images: int = 3) -> xarray.DataArray:
        """The array denoised by NRRN, lazily, in blocks like its own; coordinates, attributes and dtype stay.

        weights: a file, a URL, or the name of shipped weights. images: slices that an estimate is made from: 3, 2 or 1.
        What is computed of the result reads its slices whole, as their mean and std are those of whole slices, as they
        are in this array: denoise first, then crop. What is too large for a notebook is for nrrn_pipeline.denoise.

        The voxels are those of nrrn denoise --precision float32. Where blocks are cut otherwise than its slabs, sums of
        floats are rounded otherwise: float32 voxels then differ by some 1e-6 of a slice's std, and an integer by one
        level where an estimate lies that close to the middle of two.

        Raises InputError for other arrays than (z, y, x) of uint8, uint16 or float32, and for what are no weights; once
        computed, also for voxels that are not finite.
        """
        refuse_unknown_device(device)
        array, denoiser = _in_blocks(self._array), describe_weights(weights)
        denoiser.architecture.refuse_images(images)
        z, y, x = (max(sizes) for sizes in array.data.chunks)
        what = f"the array {array.name}" if array.name else "the array"
        volume = Volume(what, array.data.shape, array.dtype.name, (z, y, x), (z, y, x))
        method, halo = Method(images, precision="float32"), denoiser.reach
        tile = tile_for(denoiser, method, (z, y, x), halo)
        plan = DenoisePlan(volume, volume, volume.box, denoiser, (z, y, x), tile, halo, method)
        return array.copy(data=_denoised(array.data, plan, device))


def _in_blocks(array: xarray.DataArray) -> xarray.DataArray:
    """The array on Dask. Raises InputError if it is no volume."""
    if array.dims != ("z", "y", "x"):
        raise InputError(
            f"the array has dimensions {', '.join(map(str, array.dims)) or 'none'}: expected z, y, x; select one of "
            "any other, as .isel(c=0), and order them by .transpose('z', 'y', 'x')"
        )
    if array.dtype.name not in DTYPES:
        raise InputError(f"the array holds {array.dtype.name} voxels: expected {', '.join(DTYPES)}; use .astype")
    if np.isnan(array.shape).any():
        raise InputError("the array has chunks of unknown sizes: call its .data.compute_chunk_sizes() first")
    if array.size == 0:
        raise InputError(f"the array is empty: its shape is {array.shape}")
    if not array.chunks:
        return array.chunk(dict(zip("zyx", CHUNK, strict=True)))
    return array.chunk({axis: tuple(filter(None, sizes)) for axis, sizes in zip("zyx", array.chunks, strict=True)})


def _denoised(data: Any, plan: DenoisePlan, device: str) -> dask.array.Array:
    """The graph is written out: a task a chunk to measure it and one to denoise it, without copies of halos."""
    name = f"nrrn-denoise-{tokenize(data.name, plan, device)}"
    grid = [[Span(*ends) for ends in pairwise(accumulate(sizes, initial=0))] for sizes in data.chunks]
    slabs = plan.slabs_on(*grid)
    # for each block along an axis, those that it reads
    near = [
        [[i for i, span in enumerate(spans) if span.meets(cut.read)] for cut in cuts]
        for cuts, spans in zip(slabs.axes, grid, strict=True)
    ]
    measure, denoise = partial(_measured, plan.source.url), partial(_denoised_block, plan, device)
    graph: dict[Any, Any] = {}
    for place, slab in zip(product(*map(range, data.numblocks)), slabs, strict=True):
        graph[(f"{name}-moments", *place)] = (measure, slab.keep, (data.name, *place))
        z, y, x = (near[axis][at] for axis, at in enumerate(place))
        read = Box(*(Span(spans[at[0]].start, spans[at[-1]].stop) for spans, at in zip(grid, (z, y, x), strict=True)))
        chunks = [[[(data.name, i, j, k) for k in x] for j in y] for i in z]
        graph[(name, *place)] = (denoise, slab, read, chunks, [(f"{name}-statistics", i) for i in z])
    for i in range(data.numblocks[0]):
        rows = product(*map(range, data.numblocks[1:]))
        graph[(f"{name}-statistics", i)] = (merge_boxes, [(f"{name}-moments", i, *place) for place in rows])
    whole = HighLevelGraph.from_collections(name, graph, dependencies=[data])
    return dask.array.Array(whole, name, chunks=data.chunks, dtype=data.dtype)


def _measured(url: str, box: Box, voxels: NDArray[Any]) -> MeasuredBox:
    return box, tuple(moments_of(voxels, box.z.start, url))


def _denoised_block(
    plan: DenoisePlan,
    device: str,
    slab: Slab,
    read: Box,
    chunks: list[list[list[NDArray[Any]]]],
    statistics: list[SliceStatistics],
) -> NDArray[Any]:
    """The chunks that make up `read`, and statistics of their slices -> the denoised voxels of slab.keep."""
    noisy = np.block(chunks)[slab.read.within(read)]
    task = SlabTask(slab, reduce(SliceStatistics.followed_by, statistics).of(slab.read.z))
    network, _ = load_network(plan, device)
    with computing:
        return denoise_voxels(noisy, task, network, plan)
