"""What peers that run our network in another way share: slices normalised as ours are, triplets, and how they end."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nrrn_pipeline.network import NRRN, load_weights


def network_of(path: str) -> NRRN:
    """As the paper writes it: each triplet on its own, both branches whole."""
    network = load_weights(path)
    assert isinstance(network, NRRN)
    return network


def triplets_of(normal: NDArray[np.float32], first: bool, last: bool) -> torch.Tensor:
    """(z, y, x) slices -> (n, 3, y, x) triplets: of all slices, where the volume begins or ends, else of the inner."""
    before, after = ([normal[1:2]] if first else []), ([normal[-2:-1]] if last else [])
    padded = torch.from_numpy(np.concatenate([*before, normal, *after]))
    return padded.unfold(0, 3, 1).movedim(-1, 1)


def in_levels(estimate: NDArray[np.float32], mean: float, std: float) -> NDArray[np.uint8]:
    """uint8 voxels of an estimate of one slice."""
    return np.clip(np.rint(estimate * std + mean), 0, 255).astype(np.uint8)
