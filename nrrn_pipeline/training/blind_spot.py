"""Pixels hidden from a network, for training on noisy images alone.

Source: Krull, Buchholz & Jug, "Noise2Void: Learning denoising from single noisy images" (2019). A network that has to
tell a pixel's noisy value from its surroundings alone can learn the signal, but not the noise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nrrn_pipeline.errors import InputError

RADIUS = 5  # of the square that a hidden pixel's new value comes from
SPACING = 8  # of hidden pixels, 1.6 % of all; more than RADIUS, so that none gets the noise of another one


def with_blind_spots(triplet: Tensor, randoms: Iterable[torch.Generator]) -> tuple[Tensor, Tensor]:
    """(n, 3, y, x) triplets -> the same with pixels of the centre slice hidden, and which, (n, 1, y, x) true or false.

    A hidden pixel takes the value of a random other one, at most RADIUS away in y and x, that is not hidden itself: so
    no hidden value is left anywhere in the input. Hidden are the places of a lattice, displaced at random in every
    triplet, by its own generator of `randoms`. The neighbour slices stay whole: their noise is independent of the
    centre slice's, and so tells nothing of a hidden pixel's.

    Raises InputError for crops too small to find another pixel in.
    """
    before, centre, after = triplet.split(1, dim=1)
    height, width = centre.shape[2:]
    if min(height, width) < 2 * RADIUS:
        raise InputError(f"crops of {height} x {width} are too small for loss blind-spot: use {2 * RADIUS} or more")
    y, x = torch.arange(height)[:, None], torch.arange(width)
    side = 2 * RADIUS + 1
    firsts, steps = [], []
    for _, random in zip(triplet, randoms, strict=True):
        firsts.append(torch.randint(SPACING, (2, 1, 1, 1), generator=random))
        steps.append(torch.randint(1, side**2, (1, height, width), generator=random))  # 0 would be the pixel itself
    first_y, first_x = torch.stack(firsts, dim=1)
    hidden = (y % SPACING == first_y) & (x % SPACING == first_x)
    step = (torch.stack(steps) + side**2 // 2) % side**2
    from_y = _inside(y, step // side - RADIUS, height)
    from_x = _inside(x, step % side - RADIUS, width)
    others = centre.flatten(1).gather(1, (from_y * width + from_x).flatten(1).to(centre.device)).view_as(centre)
    hidden = hidden.to(centre.device)
    return torch.cat([before, torch.where(hidden, others, centre), after], dim=1), hidden


def _inside(place: Tensor, step: Tensor, length: int) -> Tensor:
    """The places a step away, or as far to the other side where that one leaves 0:length."""
    moved = place + step
    return torch.where((moved < 0) | (moved >= length), place - step, moved)
