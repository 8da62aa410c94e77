from __future__ import annotations

import numpy as np

from nrrn_pipeline.evaluation.flat import MOST, SHARE, SIDE, flat_deviations, flat_windows

RNG = np.random.default_rng(0)


def test_flat_windows_lie_where_the_signal_is_flat() -> None:
    plane = RNG.normal(100, 5, (128, 256))
    plane[:, 128:] += 40 * np.sin(np.arange(128) / 4)
    found = flat_windows(plane)
    assert len(found) == min(MOST, 128 * 256 // SIDE**2 // SHARE)
    assert all(window.shape == (1, SIDE, SIDE) and window.x.stop <= 128 for window in found)


def test_what_is_constant_is_saturated_and_not_flat() -> None:
    plane = np.full((64, 64), 255, np.uint8)
    assert flat_windows(plane) == []
    plane[:16, :16] = RNG.integers(0, 9, (16, 16))
    assert [(window.y.start, window.x.start) for window in flat_windows(plane)] == [(0, 0)]


def test_deviations_are_from_each_window_s_own_level() -> None:
    planes = np.stack([np.full((64, 64), 50.0), np.full((64, 64), 90.0)]) + RNG.normal(0, 2, (2, 64, 64))
    windows = [flat_windows(plane) for plane in planes]
    found = flat_deviations(planes, windows)
    assert found.size == sum(map(len, windows)) * SIDE**2
    assert abs(found.mean()) < 0.3
    assert abs(found.std() - 2) < 0.2
    assert flat_deviations(planes, [[], []]).size == 0
