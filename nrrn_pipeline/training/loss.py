"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor


def adjacent_slices_loss(from_before: Tensor, from_after: Tensor, triplet: Tensor) -> Tensor:
    """The paper's eq. 3: each branch is asked for the neighbour that it has not seen; no clean data.

    Where the slices are repeated scans of one surface, it is the paper's eq. 2: what is asked for is then the same
    signal with other noise, and nothing is smoothed.

    from_before = f(x[z-1], x[z]) and from_after = f(x[z+1], x[z]), (n, 1, y, x); triplet (n, 3, y, x), normalised.
    The last term takes back the branches' disagreement: what is left is quadratic in their mean alone.
    """
    before, after = triplet[:, :1], triplet[:, 2:]
    apart = (from_before - from_after).square() / 4
    return ((from_before - after).square() / 2 + (from_after - before).square() / 2 - apart).mean()


def clean_loss(estimate: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error against the clean slice ("N2C"), or one that stands for it; (n, 1, y, x), normalised alike."""
    return (estimate - clean).square().mean()


def blind_spot_loss(estimate: Tensor, noisy: Tensor, blind: Tensor) -> Tensor:
    """Mean squared error against the noisy slice on the `blind` pixels alone, which the network has not seen.

    Every slice counts alike, however many of its pixels are blind (one or more): so a batch's loss is the mean of its
    parts'.

    All (n, 1, y, x). Source: Krull, Buchholz & Jug, "Noise2Void" (2019). No clean data, and one noisy image of each
    slice; but a pixel's noise has to be independent of that of the pixels around it.
    """
    apart = torch.where(blind, estimate - noisy, 0).square()
    return (apart.sum((1, 2, 3)) / blind.sum((1, 2, 3))).mean()
