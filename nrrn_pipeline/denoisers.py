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

CROP = (3, 256, 256)  # voxels along z, y, x of what a filter's strength is set from
DEPTHS, PLACES = 4, (0.25, 0.75)  # as many crops along z, and where they lie along y and x


def filter_for(name: str, volume: Volume, statistics: str) -> Filter:
    """The filter with its strength set from the noise of a volume, measured on crops spread over it.

    Of the whole volume, whatever part is denoised: a trial on a part is to be that part of the whole. In units of what
    slices will be divided by, their own standard deviation or the volume's (`statistics`: slice or volume). Raises
    InputError if the filter is unknown or lacks its package, or there is no noise to be measured.
    """
    found = np.stack([*_crops(volume)])  # (depth, place, 3, y, x)
    if not np.isfinite(found).all():
        raise InputError(f"{volume.url} holds NaN or infinite voxels: replace them (with 0, say) before denoising")
    found = found[found.std(axis=(1, 3, 4)).min(axis=1) > 0]
    if not len(found):
        raise InputError(f"{volume.url} is blank where its noise is measured: no filter's strength can be set from it")
    level = found - found.mean(axis=(1, 3, 4), keepdims=True)  # slices may differ in brightness
    std = float(np.std(found if statistics == "volume" else level))
    stacks = [*(level / std).astype(np.float32).reshape(-1, *found.shape[2:])]
    return tuned(name, stacks, noise_sigma(np.concatenate(stacks)))


def _crops(volume: Volume) -> Iterator[NDArray[np.float64]]:
    """(place, 3, y, x) voxels at each depth."""
    sizes = [min(size, length) for size, length in zip(CROP, volume.shape, strict=True)]
    room = [length - size for size, length in zip(sizes, volume.shape, strict=True)]
    corners = sorted({(round(a * room[1]), round(b * room[2])) for a in PLACES for b in PLACES})
    for z in sorted({round(along * room[0]) for along in np.linspace(0, 1, DEPTHS)}):
        crops = []
        for y, x in corners:
            spans = (Span(start, start + size) for start, size in zip((z, y, x), sizes, strict=True))
            crops.append(read_box(volume, Box(*spans)).astype(np.float64))
        crop = np.stack(crops)
        yield crop if sizes[0] == CROP[0] else crop[:, [-1, 0, -1]]  # what is missing, the other neighbour replaces
