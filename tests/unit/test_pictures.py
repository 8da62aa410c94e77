from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline.report.pictures import CAPTION, MARGIN, removed_picture, save_panels
from tests.support import image_like


def drawn(path: Path, panels: dict[str, NDArray[Any]], enlarge: int = 1) -> NDArray[Any]:
    """The grey levels of the picture on disk."""
    save_panels(path, panels, enlarge)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "L"
        return np.asarray(picture)


def panel(sheet: NDArray[Any], column: int, height: int, width: int) -> NDArray[Any]:
    left = MARGIN + column * (width + MARGIN)
    return sheet[CAPTION : CAPTION + height, left : left + width]


@pytest.mark.parametrize("enlarge", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_panels_stand_in_one_row_each_under_its_caption(tmp_path: Path, count: int, enlarge: int) -> None:
    panels = {f"panel {i}": image_like((1, 20, 30), seed=i)[0] for i in range(count)}
    sheet = drawn(tmp_path / "a.png", panels, enlarge)
    height, width = 20 * enlarge, 30 * enlarge
    assert sheet.shape == (CAPTION + height + MARGIN, MARGIN + count * (width + MARGIN))
    for column in range(count):
        left = MARGIN + column * (width + MARGIN)
        assert sheet[:CAPTION, left : left + width].min() < 128
        assert (sheet[CAPTION:, left - MARGIN : left] == 255).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_one_grey_scale_serves_all_panels(tmp_path: Path, dtype: str) -> None:
    image = image_like((1, 40, 40), dtype)[0]
    rolled = np.roll(image, 7, axis=1)
    sheet = drawn(tmp_path / "a.png", {"before": rolled, "brighter": image + image.dtype.type(1), "after": image})
    np.testing.assert_array_equal(panel(sheet, 0, 40, 40), np.roll(panel(sheet, 2, 40, 40), 7, axis=1))
    assert panel(sheet, 1, 40, 40).mean() > panel(sheet, 2, 40, 40).mean()


def test_the_grey_scale_is_the_last_panel_s_percentiles(tmp_path: Path) -> None:
    last = np.linspace(100, 200, 1001, dtype=np.float32).reshape(7, 143)
    first = np.zeros_like(last)
    first[0, :4] = 1000, 100.5, 199.5, 150
    sheet = drawn(tmp_path / "a.png", {"first": first, "last": last})
    assert panel(sheet, 0, 7, 143)[0, :5].tolist() == [255, 0, pytest.approx(255, abs=1), pytest.approx(127, abs=1), 0]
    assert np.ptp(panel(sheet, 1, 7, 143)) == 255


def test_the_grey_scale_does_not_depend_on_the_other_panels(tmp_path: Path) -> None:
    last = image_like((1, 20, 30))[0]
    sheets = [drawn(tmp_path / f"{v}.png", {"first": np.full_like(last, v), "last": last}) for v in (0, 255)]
    np.testing.assert_array_equal(panel(sheets[0], 1, 20, 30), panel(sheets[1], 1, 20, 30))


def test_enlarging_repeats_voxels_and_invents_none(tmp_path: Path) -> None:
    image = image_like((1, 20, 30))[0]
    small = panel(drawn(tmp_path / "small.png", {"a": image}), 0, 20, 30)
    large = panel(drawn(tmp_path / "large.png", {"a": image}, enlarge=3), 0, 60, 90)
    np.testing.assert_array_equal(large, small.repeat(3, axis=0).repeat(3, axis=1))


def test_a_blank_last_panel_is_drawn_all_the_same(tmp_path: Path) -> None:
    blank = np.full((20, 30), 7, np.uint8)
    assert len(np.unique(panel(drawn(tmp_path / "a.png", {"a": blank}), 0, 20, 30))) == 1


def test_what_was_removed_is_shown_around_middle_grey() -> None:
    residual = np.random.default_rng(0).normal(0, 5, (40, 50))
    residual[0, :3] = -100, 0, 100
    png, limit = removed_picture(residual)
    assert limit == pytest.approx(3 * residual.std())
    with Image.open(io.BytesIO(png)) as picture:
        shown = np.asarray(picture)
    assert shown.shape == (40, 50)
    assert shown[0, :3].tolist() == [0, 127, 255]


def test_nothing_that_was_removed_is_grey_all_over() -> None:
    png, _ = removed_picture(np.zeros((4, 5)))
    with Image.open(io.BytesIO(png)) as picture:
        assert set(np.asarray(picture).ravel().tolist()) == {127}
