from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline.drift import Drift
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.report.figures import (
    BINS,
    bars,
    box_plots,
    curves,
    drift_curves,
    histograms,
    noise_by_signal,
    patch_histogram,
    profile,
    residual_autocorrelation,
    training_curves,
)
from nrrn_pipeline.report.page import Column, Row

PSNR = Column("PSNR", "dB", "higher")
BLACK, ORANGE, BLUE = (0, 0, 0), (213, 94, 0), (0, 114, 178)


def spread(seed: int, size: int = 200) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(30, 3, size)


def correlation(peak: float, size: int = 9) -> NDArray[Any]:
    """1 at lag 0, `peak` right of it, else 0."""
    found = np.zeros((size, size))
    found[size // 2, size // 2 : size // 2 + 2] = 1, peak
    return found


def rows(*values: float | None) -> list[Row]:
    names = ("input", "NRRN", "BM3D", "median")
    return [Row(name, {"PSNR": value}) for name, value in zip(names, values, strict=False)]


def noise(gain: float) -> NoiseCurve:
    model = NoiseModel(gain, 9.0, 1.0, black=0.0)
    signal = np.linspace(5, 200, 8)
    return NoiseCurve(tuple(signal), tuple(model.as_seen(signal)[1]), model)


def drift(jump: float) -> Drift:
    position = np.random.default_rng(0).uniform(-0.5, 0.5, (40, 2))
    position[20:] += jump
    return Drift(5, position, np.arange(40) != 9)


FALLING = [(1.0, 90.0), (2.0, 3.0), (3.0, 2.0), (4.0, 1.5), (5.0, 1.4)]

DRAWN: dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]] = {  # a figure, and the same with other data
    "histogram": (
        lambda: patch_histogram({"input": spread(0), "NRRN": spread(1)}),
        lambda: patch_histogram({"input": spread(0), "NRRN": spread(2)}),
    ),
    "boxes": (
        lambda: box_plots({"input": spread(0), "NRRN": spread(1)}),
        lambda: box_plots({"input": spread(0), "NRRN": spread(2)}),
    ),
    "autocorrelation": (
        lambda: residual_autocorrelation({"NRRN": correlation(0.1), "BM3D": correlation(0.2)}),
        lambda: residual_autocorrelation({"NRRN": correlation(-0.1), "BM3D": correlation(0.2)}),
    ),
    "profile": (
        lambda: profile({"input": spread(0, 30), "NRRN": spread(1, 30)}, 4.0, "nm"),
        lambda: profile({"input": spread(0, 30), "NRRN": spread(2, 30)}, 4.0, "nm"),
    ),
    "bars": (lambda: bars(rows(20.0, 30.0), PSNR), lambda: bars(rows(20.0, 25.0), PSNR)),
    "noise": (lambda: noise_by_signal(noise(0.5)), lambda: noise_by_signal(noise(0.7))),
    "histograms": (
        lambda: histograms({"input": spread(0), "NRRN": spread(1)}),
        lambda: histograms({"input": spread(0), "NRRN": spread(2)}),
    ),
    "one grey level": (
        lambda: histograms({"input": np.full(9, 7, np.uint8)}),
        lambda: histograms({"input": np.full(9, 8, np.uint8)}),
    ),
    "curves": (
        lambda: curves({"input": ([1, 2, 3], [4, 5, np.nan])}, "noise", "slice", level=1.0),
        lambda: curves({"input": ([1, 2, 3], [4, 5, np.nan])}, "noise", "slice", ([2], [5])),
    ),
    "nothing known": (
        lambda: curves({"input": ([1, 2], [np.nan, np.nan])}, "noise", "slice"),
        lambda: curves({"input": ([1, 2], [3, np.nan])}, "noise", "slice"),
    ),
    "drift": (lambda: drift_curves(drift(3.0)), lambda: drift_curves(drift(4.0))),
    "one autocorrelation": (
        lambda: residual_autocorrelation({"denoised": correlation(0.1)}),
        lambda: residual_autocorrelation({"denoised": correlation(-0.1)}),
    ),
    "training": (lambda: training_curves(FALLING, FALLING[1:3]), lambda: training_curves(FALLING, FALLING[2:4])),
}


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        return np.asarray(picture.convert("RGB"))


def count(png: bytes, colour: tuple[int, int, int]) -> int:
    return int((pixels(png) == colour).all(-1).sum())


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_900_pixels_wide_and_shows_something(name: str) -> None:
    sheet = pixels(DRAWN[name][0]())
    assert sheet.shape[1] == 900
    assert 100 < sheet.shape[0] < 900
    assert (sheet[[0, -1]] == 255).all(), "the drawing leaves the sheet"
    assert (sheet < 128).any(-1).sum() > 500


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_data_give_the_same_bytes_and_other_data_others(name: str) -> None:
    first, other = DRAWN[name]
    assert first() == first()
    assert (pixels(first()) != pixels(other())).any()


def test_a_figure_is_drawn_without_pyplot_and_leaves_the_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 10}):
        own = bars(rows(20.0, 30.0), PSNR)
        assert matplotlib.rcParams["font.size"] == 30
    assert own == bars(rows(20.0, 30.0), PSNR)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [patch_histogram, box_plots])
def test_each_method_takes_a_row_of_its_own(draw: Any) -> None:
    heights = [pixels(draw({f"method {i}": spread(i) for i in range(n)})).shape[0] for n in (1, 2, 3)]
    assert heights[0] < heights[1] < heights[2]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=1)


def test_a_bar_is_as_long_as_its_value() -> None:
    def longest(sheet: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
        return int((sheet == colour).all(-1).sum(1).max())

    sheet = pixels(bars([Row("NRRN", {"PSNR": 40.0}), Row("BM3D", {"PSNR": 20.0})], PSNR))
    assert longest(sheet, BLUE) == pytest.approx(2 * longest(sheet, ORANGE), abs=3)


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
def test_a_row_without_a_finite_value_has_no_bar(value: float | None) -> None:
    assert count(bars(rows(20.0, 25.0), PSNR), BLUE) > 1000
    assert count(bars(rows(20.0, value), PSNR), BLUE) == 0


@pytest.mark.parametrize("draw", [patch_histogram, box_plots])
def test_values_that_are_not_finite_do_not_move_the_others(draw: Any) -> None:
    clean = draw({"NRRN": spread(0)})
    assert clean != draw({"NRRN": [*spread(0), 50.0]})
    marked = pixels(draw({"NRRN": [*spread(0), math.inf, math.nan]}))
    if draw is box_plots:
        np.testing.assert_array_equal(marked, pixels(clean))
    else:
        assert (marked != pixels(clean)).any(), "they are not counted"


@pytest.mark.parametrize("draw", [patch_histogram, box_plots])
@pytest.mark.parametrize("values", [[], [math.inf], [30.0] * BINS], ids=["none", "infinite", "equal"])
def test_values_without_a_spread_are_drawn_all_the_same(draw: Any, values: list[float]) -> None:
    assert pixels(draw({"NRRN": values})).shape[1] == 900


def test_the_colours_of_autocorrelations_are_of_one_scale_that_leaves_out_lag_0() -> None:
    """Doubling all lags but 0 changes the scale and no colour of a map."""

    def shades(strength: float) -> set[tuple[int, ...]]:
        sheet = pixels(residual_autocorrelation({"a": correlation(strength), "b": correlation(strength / 2)}))
        blocks = sheet[:, :700].reshape(-1, 3)
        found, counts = np.unique(blocks, axis=0, return_counts=True)
        tinted = (np.ptp(found.astype(int), axis=1) > 20) & (counts > 100)
        return set(map(tuple, found[tinted].tolist()))

    assert len(shades(0.1)) == 2, "lag 0 and the strongest lag of a, and half of it in b"
    assert shades(0.1) == shades(0.2)


def test_the_autocorrelation_of_one_method_stands_in_the_middle() -> None:
    drawn = (pixels(residual_autocorrelation({"denoised": correlation(0.1)})) < 255).any(-1).any(0).nonzero()[0]
    assert drawn[0] == pytest.approx(899 - drawn[-1], abs=20)
    assert drawn[-1] - drawn[0] > 400


def test_autocorrelations_must_be_square() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        residual_autocorrelation({"NRRN": np.zeros((3, 5))})


def test_an_autocorrelation_of_nothing_but_lag_0_is_drawn() -> None:
    assert pixels(residual_autocorrelation({"NRRN": correlation(0.0)})).shape[1] == 900


def test_the_input_is_grey_and_the_reference_black_and_methods_keep_their_colour() -> None:
    line = np.arange(20.0)
    alone, beside = profile({"NRRN": line}), profile({"input": line + 9, "NRRN": line, "reference": line - 9})
    assert count(alone, BLUE) > 200
    assert count(beside, BLUE) > 200
    assert count(beside, BLACK) > count(alone, BLACK) + 200
    assert count(beside, (118, 118, 118)) > 200 > count(alone, (118, 118, 118))


@pytest.mark.parametrize("name", ["$x$ $\\frac$", "a$b", "_hidden", "x" * 300, "<script>", "\\$"])
@pytest.mark.parametrize("draw", [patch_histogram, box_plots, profile])
def test_any_name_is_drawn_as_it_is(draw: Any, name: str) -> None:
    assert (pixels(draw({name: spread(0, 20)})) != pixels(draw({"other": spread(0, 20)}))).any()


@pytest.mark.parametrize("losses", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(1.0, -3.0), (2.0, 1e30)]])
def test_any_losses_are_drawn(losses: list[tuple[float, float]]) -> None:
    for steps, looks in ((losses, []), (losses, losses), ([], losses)):
        assert pixels(training_curves(steps, looks)).shape[1] == 900


@pytest.mark.parametrize("draw", [patch_histogram, box_plots, profile, residual_autocorrelation])
def test_a_figure_of_nothing_is_refused(draw: Any) -> None:
    with pytest.raises(ValueError, match="one method or more"):
        draw({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.style", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install nrrn-pipeline\[evaluation\]"):
        bars(rows(20.0, 30.0), PSNR)
