"""What a run can apply to every slab: NRRN, another trained network, a classical filter; or noise, to make test data.

All but noise fit the same slot (network.slot): a stack of normalised slices in, estimates out, and a known reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import Filter, noise_sigma, tuned
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.volume import Volume, read_box


@dataclass(frozen=True)
class Weights:
    """A trained network: its file, and what a plan must know of it; see network.Architecture."""

    path: str
    sha256: str
    units: int
    channels: int
    kind: str = "nrrn"
    inputs: str = "neighbours"

    @property
    def architecture(self) -> Architecture:
        """The network without its weights."""
        return Architecture(self.kind, self.units, self.channels, self.inputs)

    @property
    def reach(self) -> int:
        """The network's, in voxels."""
        return self.architecture.reach

    @property
    def grid(self) -> int:
        """Voxels that lie between two places where a tile may begin."""
        return self.architecture.grid

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from others; JSON."""
        return {"weights sha256": self.sha256}


Denoiser = Weights | Filter | Noise

CROPS, CROP = 8, (3, 256, 256)  # how many a filter's strength is set from, and their voxels along z, y, x


def filter_for(name: str, volume: Volume, statistics: str) -> Filter:
    """The filter with its strength set from the noise of a volume, measured on crops spread over it.

    Of the whole volume, whatever part is denoised: a trial on a part is to be that part of the whole. In units of what
    slices will be divided by, their own standard deviation or the volume's (`statistics`: slice or volume). Raises
    InputError if the filter is unknown or lacks its package, or there is no noise to be measured.
    """
    found = [*_crops(volume)]
    if not all(np.isfinite(crop).all() for crop in found):
        raise InputError(f"{volume.url} holds NaN or infinite voxels: replace them (with 0, say) before denoising")
    crops = [crop for crop in found if crop.std((1, 2)).min() > 0]
    if not crops:
        raise InputError(f"{volume.url} is blank where its noise is measured: no filter's strength can be set from it")
    level = [crop - crop.mean((1, 2), keepdims=True) for crop in crops]  # slices may differ in brightness
    std = float(np.std(np.concatenate([crop.ravel() for crop in (crops if statistics == "volume" else level)])))
    stacks = [(crop / std).astype(np.float32) for crop in level]
    return tuned(name, stacks, noise_sigma(np.concatenate(stacks)))


def _crops(volume: Volume) -> Iterator[NDArray[np.float64]]:
    """Of three slices each, from the first voxel to the last along a diagonal of the volume."""
    sizes = [min(size, length) for size, length in zip(CROP, volume.shape, strict=True)]
    for along in np.linspace(0, 1, CROPS):
        starts = [round(along * (length - size)) for size, length in zip(sizes, volume.shape, strict=True)]
        z, y, x = (Span(start, start + size) for start, size in zip(starts, sizes, strict=True))
        slices = read_box(volume, Box(z, y, x)).astype(np.float64)
        yield slices if len(slices) == CROP[0] else slices[[-1, 0, -1]]  # what is missing, the other neighbour replaces
