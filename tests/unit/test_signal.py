from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.signal import box_plot, interquartile_range, line, region, rise_distance
from nrrn_pipeline.geometry import Box, Span


def ramp(rise: int, before: int = 16, after: int = 16) -> NDArray[np.float64]:
    """0 for `before` voxels and 100 for `after`, with a straight rise of `rise` voxels' length between."""
    return np.concatenate([np.zeros(before - 1), np.linspace(0, 100, rise + 1), np.full(after - 1, 100.0)])


# --- box plots


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_a_box_plot_of_known_values(dtype: str) -> None:
    values = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 100]], dtype)
    plot = box_plot(values)
    assert (plot.lower_quartile, plot.median, plot.upper_quartile) == (3.25, 5.5, 7.75)
    assert (plot.lower_whisker, plot.upper_whisker, plot.outliers) == (1, 9, 1)
    assert plot.interquartile_range == interquartile_range(values) == 4.5


def test_outliers_on_both_sides_are_counted() -> None:
    plot = box_plot(np.array([-50.0, 10, 10, 10, 11, 12, 12, 12, 90, 91]))
    assert (plot.lower_whisker, plot.upper_whisker, plot.outliers) == (10, 12, 3)


def test_whiskers_never_end_inside_the_box() -> None:
    plot = box_plot(np.array([0.0, 1, 1, 100]))  # quartiles 0.75 and 25.75: the last value within reach is 1
    assert (plot.upper_quartile, plot.upper_whisker, plot.outliers) == (25.75, 25.75, 1)


def test_a_constant_signal_has_no_spread() -> None:
    plot = box_plot(np.full((3, 4), 7, np.uint8))
    assert (plot.lower_whisker, plot.median, plot.upper_whisker, plot.outliers) == (7, 7, 7, 0)
    assert plot.interquartile_range == 0


def test_interquartile_range_of_normal_noise_is_1_349_sigma() -> None:
    noise = np.random.default_rng(0).normal(100, 9, 200_000)
    assert interquartile_range(noise) == pytest.approx(1.349 * 9, rel=0.01)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 2.0]])
@pytest.mark.parametrize("measure", [box_plot, interquartile_range])
def test_no_box_plot_of_nothing_or_of_what_is_not_finite(measure: Any, values: list[float]) -> None:
    with pytest.raises(InputError, match="finite numbers"):
        measure(np.array(values))


# --- lines and regions


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_line_along_an_axis_has_that_axis_voxels(dtype: str) -> None:
    image = np.arange(200, dtype=dtype).reshape(10, 20)
    assert line(image, (3, 2), (3, 7)).tolist() == image[3, 2:8].tolist()
    assert line(image, (7, 5), (2, 5)).tolist() == image[7:1:-1, 5].tolist()
    assert line(image, (0, 0), (0, 19)).tolist() == image[0].tolist()


def test_a_wide_line_is_the_mean_across() -> None:
    image = np.random.default_rng(0).integers(0, 255, (10, 20), np.uint8)
    np.testing.assert_allclose(line(image, (5, 2), (5, 12), 3), image[4:7, 2:13].mean(0))
    np.testing.assert_allclose(
        line(image, (1, 4), (9, 4), 2), image[1:10, 3:5].mean(1) / 2 + image[1:10, 4:6].mean(1) / 2
    )


def test_a_slanted_line_is_interpolated_and_not_rounded() -> None:
    y, x = np.indices((20, 20))
    image = (3 * y + 4 * x).astype(np.uint8)  # along (3, 4) / 5 it rises by 5 a voxel
    np.testing.assert_allclose(line(image, (2, 3), (11, 15)), 18 + 5 * np.arange(16.0), atol=1e-9)


@pytest.mark.parametrize(
    ("start", "stop", "width", "message"),
    [
        ((0, 0), (0, 20), 1, "leaves the image"),
        ((-1, 0), (5, 5), 1, "leaves the image"),
        ((0, 0), (0, 19), 3, "leaves the image"),
        ((5, 5), (5, 5), 1, "two different points"),
        ((5, 5), (5, 9), 0, "width of at least 1"),
        ((5, 5), (5, math.nan), 1, "two different points"),
    ],
)
def test_a_line_that_has_no_length_or_leaves_the_image_is_refused(
    start: Any, stop: Any, width: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        line(np.zeros((10, 20)), start, stop, width)


def test_a_line_lies_in_a_slice() -> None:
    with pytest.raises(InputError, match=r"\(y, x\) image"):
        line(np.zeros((3, 10, 20)), (1, 1), (1, 5))


def test_a_region_is_the_box_of_voxels() -> None:
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    assert np.array_equal(region(volume, Box(Span(1, 3), Span(0, 5), Span(2, 6))), volume[1:3, :, 2:6])


@pytest.mark.parametrize("text", ["0:5,0:5,0:6", "0:4,2:2,0:6", "0:4,-1:5,0:6", "0:4,0:5,5:4"])
def test_a_region_outside_the_volume_or_empty_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"region {text}"):
        region(np.zeros((4, 5, 6)), Box.parse(text))


def test_a_region_of_a_slice_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(5, 6\)"):
        region(np.zeros((5, 6)), Box.parse("0:1,0:5,0:6"))


# --- edges


@pytest.mark.parametrize("rise", [1, 2, 5, 10])
def test_a_straight_rise_takes_eight_tenths_of_its_length(rise: int) -> None:
    assert rise_distance(ramp(rise)) == pytest.approx(0.8 * rise)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_falling_edges_and_other_levels_measure_the_same(dtype: str) -> None:
    values = (100 + ramp(5)).astype(dtype)
    assert rise_distance(values) == pytest.approx(4)
    assert rise_distance(values[::-1]) == pytest.approx(4)


def test_levels_are_the_medians_of_the_first_and_last_quarter() -> None:
    # 12 voxels of a straight line: levels 1 and 10, 10 % at 1.9, 90 % at 9.1
    assert rise_distance(np.arange(12)) == pytest.approx(7.2)


def test_a_blurred_step_rises_over_2_563_sigma() -> None:
    x = np.arange(80) - 39.5
    profile = np.array([0.5 * (1 + math.erf(value / (4 * math.sqrt(2)))) for value in x])
    assert rise_distance(profile) == pytest.approx(
        2 * 1.28155 * 4, rel=0.01
    )  # straight lines between voxels cost 0.7 %


def test_blur_widens_the_rise() -> None:
    step = ramp(1, 30, 30)
    found = [rise_distance(np.convolve(step, np.full(n, 1 / n), "valid")) for n in (1, 3, 5, 9)]
    assert found == pytest.approx([0.8 * n for n in (1, 3, 5, 9)])


def test_outliers_away_from_the_edge_change_nothing() -> None:
    profile = ramp(5)
    profile[0], profile[3], profile[-2] = 130, -40, 10
    assert rise_distance(profile) == pytest.approx(4)


def test_the_first_of_several_rises_counts() -> None:
    profile = np.array([0, 0, 0, 0, 50, 100, 0, 100, 100, 100, 100, 100.0])
    assert rise_distance(profile) == pytest.approx(1.6)


@pytest.mark.parametrize(
    "profile",
    [
        np.full(16, 7.0),
        np.array(
            [0, 0, 0, 0, 0, 0, 90, 90, 90, 90, 0, 0, 0, 0, 0, 0.0]
        ),  # a membrane: two edges, none between the ends
        np.random.default_rng(0).normal(100, 9, 64),
    ],
    ids=["flat", "membrane", "noise"],
)
def test_a_profile_without_an_edge_is_refused(profile: NDArray[Any]) -> None:
    with pytest.raises(InputError, match="no edge"):
        rise_distance(profile)


@pytest.mark.parametrize(
    "profile", [np.arange(7.0), np.zeros((16, 2)), np.array([0.0] * 8 + [math.nan] * 8)], ids=["short", "2-D", "NaN"]
)
def test_what_is_no_profile_is_refused(profile: NDArray[Any]) -> None:
    with pytest.raises(InputError, match="at least 8 finite values"):
        rise_distance(profile)


def test_the_rise_of_an_edge_in_an_image_is_found_through_a_line() -> None:
    image = np.tile(ramp(4, 20, 20).astype(np.uint8), (9, 1))
    assert rise_distance(line(image, (4, 5), (4, 36), width=5)) == pytest.approx(3.2)
