"""Which loss suits a volume's noise."""

from __future__ import annotations

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.volume_noise import VolumeNoise


def loss_for(noise: VolumeNoise, network: Architecture) -> tuple[str, str]:
    """A key of LOSSES that needs no clean data, and why it was chosen.

    Raises InputError if there is none: of noise that neighbouring voxels share only the slices around are free.
    """
    y, x = noise.shared
    seen = f"(that of voxels beside each other correlates by {y:.2f} along y, {x:.2f} along x)"
    if noise.white:
        return "recorrupted", f"the noise is white {seen}"
    if network.kind != "nrrn":
        raise InputError(
            f"neighbouring voxels share noise {seen}: {network.kind} would learn to keep it; train nrrn, or give a "
            "clean volume and loss clean"
        )
    return "adjacent", f"neighbouring voxels share noise {seen}, which all other losses would learn to keep"
