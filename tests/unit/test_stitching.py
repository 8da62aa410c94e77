"""How tiles become a plane, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nrrn_pipeline.geometry import Box, Cut, Span
from nrrn_pipeline.stitching import LEAST, blended, bump

LEFT, RIGHT = Cut(Span(0, 3), Span(0, 4)), Cut(Span(3, 6), Span(2, 6))
ROW = Cut(Span(0, 1), Span(0, 1))
PLANE = Box(Span(0, 1), Span(0, 1), Span(0, 6))


def tile(x: Cut, value: float) -> tuple[Cut, Cut, np.ndarray]:
    return ROW, x, np.full((1, 1, 4), value, np.float32)


def test_blending_weighs_tiles_where_they_overlap() -> None:
    ((place, estimate),) = blended(iter([tile(LEFT, 1), tile(RIGHT, 5)]), PLANE)
    plane = np.zeros((1, 1, 6))
    plane[:, *place] = estimate
    near, far = bump(4)[2], bump(4)[3]  # of the left tile, where the right one has far and near
    third = (near * 1 + far * 5) / (near + far)
    fourth = (far * 1 + near * 5) / (near + far)
    assert plane[0, 0] == pytest.approx([1, 1, third, fourth, 5, 5])
    assert 1 < third < 3 < fourth < 5


def test_the_bump_is_symmetric_and_highest_in_the_middle_and_nowhere_zero() -> None:
    for length in (1, 2, 9, 256, 4096):
        weights = bump(length)
        assert np.array_equal(weights, weights[::-1])
        assert weights.min() >= np.float32(LEAST)
        assert weights.argmax() in (length // 2, (length - 1) // 2)
    assert bump(1) == pytest.approx([1])
    assert bump(2) == pytest.approx([np.exp(1 - 1 / 0.75)] * 2)


def test_blending_nothing_gives_nothing() -> None:
    assert list(blended(iter(()), PLANE)) == []
