"""A made-up volume to measure on: blobs and noise, the same each time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Shape, cells_of
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.slabs import CHUNK, SHARD, fitted
from nrrn_pipeline.volume import Volume, create_volume, write_box

NOISE = 30.0  # grey levels


def make_volume(group: Location, shape: Shape) -> Volume:
    """An OME-Zarr of uint8 of that shape, in the chunks and shards of our outputs; a whole shard is in memory.

    Raises InputError if something is there, or the shape has no voxels.
    """
    if min(shape) < 1:
        raise InputError(f"shape {','.join(map(str, shape))} has no voxels: use three sizes Z,Y,X of 1 or more")
    url = absolute(group)
    if storage.exists(url):
        raise InputError(f"{url} exists: choose another place for the volume")
    chunk = fitted(CHUNK, shape, (1, 1, 1))
    volume = Volume(f"{url}/0", shape, "uint8", chunk, fitted(SHARD, shape, chunk), level_path="0")
    create_volume(volume, {"made by": "nrrn benchmark"})
    for number, cell in enumerate(cells_of(volume.box, volume.write_unit)):
        write_box(volume, cell, _blobs(cell, number))
    return volume


def _blobs(cell: Box, seed: int) -> NDArray[np.uint8]:
    z, y, x = np.meshgrid(*(np.arange(of.start, of.stop, dtype=np.float32) for of in cell.spans), indexing="ij")
    signal = 128 + 30 * np.sin(y / 9 + z / 5) + 30 * np.cos(x / 7)
    noise = NOISE * np.random.default_rng(seed).standard_normal(cell.shape, dtype=np.float32)
    voxels: NDArray[np.uint8] = np.clip(np.rint(signal + noise), 0, 255).astype(np.uint8)
    return voxels
