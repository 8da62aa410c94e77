"""What training minimises."""

from __future__ import annotations

from torch import Tensor


def adjacent_slices_loss(from_before: Tensor, from_after: Tensor, triplet: Tensor) -> Tensor:
    """The paper's eq. 3: each branch is asked for the neighbour that it has not seen; no clean data.

    from_before = f(x[z-1], x[z]) and from_after = f(x[z+1], x[z]), (n, 1, y, x); triplet (n, 3, y, x), normalised.
    The last term takes back the branches' disagreement: what is left is quadratic in their mean alone.
    """
    before, after = triplet[:, :1], triplet[:, 2:]
    apart = (from_before - from_after).square() / 4
    return ((from_before - after).square() / 2 + (from_after - before).square() / 2 - apart).mean()
