"""What a run can apply to every slab: NRRN, another trained network, a classical filter; or noise, to make test data.

All but noise fit the same slot (network.slot): a stack of normalised slices in, estimates out, and a known reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nrrn_pipeline.filters import Filter, noise_sigma, tuned
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.volume import Volume
from nrrn_pipeline.volume_noise import noise_samples


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


def working_bytes(denoiser: Denoiser, pixels: int, images: int) -> int:
    """Memory that it takes for a tile of `pixels` in y and x, beside the stack and the estimate."""
    match denoiser:
        case Weights():
            return denoiser.architecture.activation_bytes(pixels, images)
        case Filter():
            return denoiser.working_bytes(pixels)
        case Noise():
            return 0


def stack_bytes(slices: int, pixels: int) -> int:
    """Of a tile's slices, normalised, and their estimate; and of one slice on the way to and from float64."""
    return 8 * (slices + 4) * pixels


def filter_for(name: str, volume: Volume, statistics: str) -> Filter:
    """The filter with its strength set from the noise of a volume, measured on crops spread over it.

    Of the whole volume, whatever part is denoised: a trial on a part is to be that part of the whole. In units of what
    slices will be divided by, their own standard deviation or the volume's (`statistics`: slice or volume). Raises
    InputError if the filter is unknown or lacks its package, or there is no noise to be measured.
    """
    found = noise_samples(volume)
    level = found - found.mean(axis=(1, 3, 4), keepdims=True)  # slices may differ in brightness
    std = float(np.std(found if statistics == "volume" else level))
    stacks = [*(level / std).astype(np.float32).reshape(-1, *found.shape[2:])]
    return tuned(name, stacks, noise_sigma(np.concatenate(stacks)))
