"""The page of an evaluation: as HTML, and in a real browser."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline.report.page import Column, Figure, Report, Row, display_range, grey_levels, html_of, write_page
from tests.browser import Browser, chromium

HOSTILE = """</script><script>document.title = 'taken'</script><img src=x onerror="document.title = 'taken'">"""
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect width="30" height="20"/></svg>'
PSNR, TIME = Column("PSNR", "dB", "higher"), Column("time", "s", "lower", 1)
SIDE = 120
INPUT_GREY, NRRN_GREY, REFERENCE_GREY = 60, 120, 180
VOID = {"meta", "link", "img", "br"}


def flat(grey: int) -> NDArray[np.uint8]:
    """One grey level, of which the corner pixels span the scale from 0 to 255."""
    image = np.full((SIDE, SIDE), grey, np.uint8)
    image[:3], image[-3:] = 0, 255
    return image


def one_view(**pictures: NDArray[Any]) -> dict[str, dict[str, NDArray[Any]]]:
    return {"The slice": pictures}


def evaluation(**changes: Any) -> Report:
    plain = Report(
        title="Of four methods",
        facts={"source": "s3://bucket/volume.zarr", "command": "nrrn evaluate a.zarr"},
        columns=(PSNR, TIME),
        rows=(
            Row("input", {"PSNR": 20.0, "time": None}),
            Row("BM3D", {"PSNR": 9.5, "time": 24.04}),
            Row("NRRN", {"PSNR": 30.25, "time": 3.0}),
            Row("equal", {"PSNR": math.inf}),
        ),
        views=one_view(input=flat(INPUT_GREY), NRRN=flat(NRRN_GREY), reference=flat(REFERENCE_GREY)),
        figures=(Figure(SVG, "A black box."),),
        notes=("Nothing was tuned.",),
    )
    return replace(plain, **changes)


class Page(HTMLParser):
    """What a browser would see: texts by element, attributes, and whether elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.path: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.path == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.path and data.strip():
            self.texts.append((self.path[-1], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_in(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def table(page: Page) -> str:
    return " ".join(page.text_in("button", "th", "td", "strong", "span"))


def decoded(source: str) -> NDArray[Any]:
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as picture:
        return np.asarray(picture)


def test_every_row_column_fact_note_and_figure_is_on_the_page() -> None:
    page = Page(html_of(evaluation()))
    assert page.text_in("h1", "title") == ["Of four methods"] * 2
    assert page.text_in("dt", "dd") == ["source", "s3://bucket/volume.zarr", "command", "nrrn evaluate a.zarr"]
    shown = table(page).replace("\N{EN DASH}", "none")
    assert "input 20.00 none BM3D 9.50 24.0 NRRN 30.25 3.0  (best) equal ∞  (best) none" in shown
    assert "[dB]" in table(page)
    assert "Nothing was tuned." in page.text_in("li")
    assert " A black box." in page.text_in("figcaption")
    assert "Figure 1" in [image["alt"] for image in page.of("img")]


def test_the_page_needs_nothing_from_elsewhere_and_its_policy_allows_nothing() -> None:
    text = html_of(evaluation())
    page = Page(text)
    sources = [value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href")]
    assert len(sources) == 5
    assert all(value is not None and value.startswith("data:") for value in sources)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not [attrs for _, attrs in page.elements if "style" in attrs or any(name.startswith("on") for name in attrs)]
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_hostile_text_is_shown_as_text() -> None:
    hostile = evaluation(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        columns=(Column(HOSTILE, HOSTILE),),
        rows=(Row("input", {}), Row(HOSTILE, {HOSTILE: 1.0})),
        views=one_view(**{"input": flat(1), HOSTILE: flat(2)}),
        figures=(Figure(SVG, HOSTILE),),
        notes=(HOSTILE,),
    )
    page = Page(html_of(hostile))
    assert len(page.of("script")) == 1
    assert not [attributes for attributes in page.of("img") if "onerror" in attributes]
    whole = [text for _, text in page.texts if HOSTILE in text]
    assert len(whole) == 12  # title twice, fact twice, column and unit, row, two options, image, figure, note


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\udcffb", r"a\udcffb"), ("a\u202eb", r"a\u202eb"), ("a\x00b", r"a\x00b"), ("é µ\xa0m", "é µ\xa0m")],
)
def test_what_cannot_be_seen_is_shown_by_its_code(tmp_path: Path, name: str, shown: str) -> None:
    write_page(tmp_path / "a.html", evaluation(title=name))
    assert Page((tmp_path / "a.html").read_text("utf-8")).text_in("h1") == [shown]


def test_images_are_on_the_page_pixel_by_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    ramp = np.resize(np.arange(256, dtype=np.uint8), (40, 50))
    page = Page(html_of(evaluation(views=one_view(input=image, NRRN=ramp), figures=())))
    shown = [attributes for attributes in page.of("img") if attributes.get("src")]
    assert [(each["width"], each["height"], each["alt"]) for each in shown] == [
        ("50", "40", "The slice: input"),
        ("50", "40", "The slice: NRRN"),
    ]
    low, high = np.percentile(image, [0.5, 99.5])
    expected = np.clip((ramp.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(decoded(str(shown[1]["src"])), expected)


def test_the_grey_scale_is_that_of_the_reference_if_there_is_one() -> None:
    images = {"input": np.full((20, 20), 1000, np.uint16), "NRRN": np.full((20, 20), 3000, np.uint16)}
    reference = np.linspace(0, 4000, 400, dtype=np.float32).reshape(20, 20)
    page = Page(html_of(evaluation(views=one_view(**images, reference=reference))))
    greys = [int(decoded(str(each["src"]))[0, 0]) for each in page.of("img") if each.get("width") == "20"]
    assert greys == [pytest.approx(255 / 4, abs=1), pytest.approx(255 * 3 / 4, abs=1), 0]


def test_the_display_range_is_of_finite_pixels() -> None:
    image = np.append(np.arange(1001.0), [math.nan, math.inf, -math.inf])
    assert display_range(image) == (5.0, 995.0)
    assert display_range(np.full((2, 2), math.nan)) == (0.0, 1.0)


def test_grey_levels_clip_and_draw_what_is_no_number_black() -> None:
    image = np.array([[0.0, 10.0, 15.0], [20.0, 99.0, math.nan]])
    assert grey_levels(image, 10, 20).tolist() == [[0, 0, 127], [255, 255, 0]]
    assert grey_levels(np.full((1, 2), 7, np.uint8), 7, 7).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("better", "values", "best"),
    [
        ("higher", [1.0, 3.0, 2.0], "3.0"),
        ("lower", [1.0, None, 2.0], "1.0"),
        ("lower", [1.01, 0.99, 2.0], "1.0"),
        ("higher", [1.0, math.nan, math.inf], "∞"),
        ("higher", [1.0, 1.0], None),
        ("higher", [None, None], None),
        (None, [1.0, 2.0], None),
    ],
)
def test_the_best_value_is_the_one_that_the_measure_calls_better(better: Any, values: Any, best: str | None) -> None:
    rows = [Row(str(number), {"a": value}) for number, value in enumerate(values)]
    assert Column("a", better=better, decimals=1).best(rows) == best


def test_an_evaluation_of_images_that_differ_in_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one \(y, x\) slice"):
        evaluation(views=one_view(input=flat(0), reference=np.zeros((3, 4))))
    with pytest.raises(ValueError, match=r"one \(y, x\) slice"):
        evaluation(views=one_view(input=np.zeros((3, 4, 5))))
    with pytest.raises(ValueError, match="no image 'input' among NRRN"):
        evaluation(views=one_view(NRRN=flat(0)))
    with pytest.raises(ValueError, match="the same methods in the same order"):
        evaluation(views={"a": {"input": flat(0)}, "b": {"input": flat(0), "NRRN": flat(0)}})
    with pytest.raises(ValueError, match="there must be a view"):
        evaluation(views={})


def test_warnings_come_first_and_settings_are_folded_away() -> None:
    page = Page(html_of(evaluation(warnings=("1 slab failed.",), folded={"Settings": {"halo": "16"}})))
    assert page.text_in("li") == ["1 slab failed.", "Nothing was tuned."]
    assert page.text_in("summary") == ["Settings"]
    assert page.text_in("dd")[-1] == "16"
    assert [details for details in page.of("details") if "open" not in details]


def test_figures_stand_under_their_titles_and_a_page_needs_no_table() -> None:
    titles = ("Noise", "Noise", "Speed")
    figures = [Figure(SVG, f"of {number}", title) for number, title in enumerate(titles)]
    page = Page(html_of(evaluation(figures=figures, columns=(), rows=(), notes=())))
    assert page.text_in("h2") == ["Side by side", "The same slice", "Noise", "Speed"]
    assert page.text_in("b") == ["Figure 1.", "Figure 2.", "Figure 3."]
    assert page.of("table") == []


def test_what_was_removed_has_its_own_greys_and_nothing_is_middle_grey() -> None:
    removed = np.zeros((20, 20), np.float32)
    removed[::2], removed[1::2] = -4, 4
    removed[0, 0] = 0
    pictures = {"input": np.full((20, 20), 1000, np.uint16), "NRRN": np.full((20, 20), 900, np.uint16)}
    text = html_of(evaluation(views=one_view(**pictures, removed=removed)))
    shown = [each for each in Page(text).of("img") if each.get("width") == "20"]
    greys = decoded(str(shown[-1]["src"]))
    assert greys[:2, :2].tolist() == [[127, 84], [170, 170]]
    assert "middle grey is nothing, black 11.98 below" in text
    assert '<option value="1" selected>NRRN' in text, "what was removed is no method"


def test_floats_of_any_size_have_their_greys() -> None:
    large = np.linspace(-1e37, 1e37, 4096, dtype=np.float32).reshape(64, 64)
    assert "black 1.732e+37 below" in html_of(evaluation(views=one_view(input=large, NRRN=large, removed=large)))


def test_a_figure_is_png_or_svg() -> None:
    with pytest.raises(ValueError, match="PNG or SVG, but it begins with b'GIF89a'"):
        Figure(b"GIF89a", "moving")


def test_a_page_of_ten_methods_is_below_5_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["input", *(f"method {number}" for number in range(9))]
    images = {name: np.clip(rng.normal(128, 40, (512, 512)), 0, 255).astype(np.uint8) for name in names}
    write_page(tmp_path / "a.html", evaluation(views=one_view(**images, reference=images["input"])))
    assert 1e6 < (tmp_path / "a.html").stat().st_size < 5e6


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as there:
        yield there


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Browser]:
    """The page, from disk; it complains of nothing and asks for nothing."""
    write_page(tmp_path / "page.html", evaluation())
    browser.open(tmp_path / "page.html")
    yield browser
    assert browser.complaints == []
    assert browser.requests == [(tmp_path / "page.html").as_uri()]


def methods(page: Browser) -> list[str]:
    found: list[str] = page.value("[...document.querySelectorAll('tbody th')].map(e => e.textContent)")
    return found


def greys(page: Browser) -> NDArray[np.uint8]:
    """The grey levels across the frame, well above the divider's knob and below the names."""
    left, top, width, height = (round(value) for value in page.box("#view"))
    row = page.picture()[top + height // 4, left : left + width]
    assert (np.ptp(row, axis=1) == 0).all()
    return row[:, 0]


def share(page: Browser, grey: int) -> float:
    return float((greys(page) == grey).mean())


def select(page: Browser, control: str, value: str) -> None:
    page.value(
        f"(e => {{e.value = {value!r}; e.dispatchEvent(new Event('change'))}})(document.getElementById({control!r}))"
    )


def test_a_click_on_a_column_sorts_best_first_and_another_turns_the_order(page: Browser) -> None:
    assert methods(page) == ["input", "BM3D", "NRRN", "equal"]
    page.click("thead th:nth-child(2) button")
    assert methods(page) == ["equal", "NRRN", "input", "BM3D"]
    page.click("thead th:nth-child(2) button")
    assert methods(page) == ["BM3D", "input", "NRRN", "equal"]
    page.click("thead th:nth-child(3) button")
    assert methods(page) == ["NRRN", "BM3D", "input", "equal"], "what was not measured comes last"
    page.click("thead th:nth-child(3) button")
    assert methods(page) == ["BM3D", "NRRN", "input", "equal"]
    page.click("thead th:nth-child(1) button")
    assert methods(page) == ["BM3D", "equal", "input", "NRRN"]
    states = page.value("[...document.querySelectorAll('thead th')].map(e => e.getAttribute('aria-sort'))")
    assert states == ["ascending", "none", "none"]


def test_the_divider_shows_the_input_on_its_left_and_the_method_on_its_right(page: Browser) -> None:
    row = greys(page)
    quarter = len(row) // 4
    assert set(row[5 : quarter - 40].tolist()) | set(row[quarter : quarter + 5].tolist()) == {INPUT_GREY}
    assert set(row[-quarter:-5].tolist()) == {NRRN_GREY}


def test_dragging_the_divider_moves_the_border_between_the_images(page: Browser) -> None:
    before = page.picture()
    left, top, width, height = page.box("#view")
    page.drag((left + width / 2, top + height / 2), (left + 0.9 * width, top + height / 2))
    after = page.picture()
    changed = np.nonzero((before != after).any(-1))
    assert share(page, INPUT_GREY) > 0.8
    frame = page.value("(b => [b.left, b.right])(document.querySelector('.desk').getBoundingClientRect())")
    assert frame[0] <= changed[1].min() <= changed[1].max() <= frame[1]
    page.drag((left + 0.9 * width, top + height / 2), (left - 50, top + height / 2))
    assert share(page, INPUT_GREY) == 0
    assert page.value("document.getElementById('divider').getAttribute('aria-valuenow')") == "0"


def test_a_finger_moves_the_divider_too(page: Browser) -> None:
    left, top, width, height = page.box("#divider")
    _, _, whole, _ = page.box("#view")
    middle = (left + width / 2, top + height / 2)
    page.swipe(middle, (middle[0] - 0.2 * whole, middle[1]), (middle[0] - 0.4 * whole, middle[1]))
    assert page.value("seen.split") == pytest.approx(0.1, abs=0.01)


def test_keys_move_the_divider(page: Browser) -> None:
    page.value("divider.focus()")
    for key, code, split in (("ArrowRight", 39, 0.51), ("PageUp", 33, 0.61), ("ArrowLeft", 37, 0.6), ("End", 35, 1.0)):
        page.press(key, code)
        assert page.value("seen.split") == pytest.approx(split)
    assert share(page, NRRN_GREY) == 0
    page.press("Home", 36)
    assert share(page, INPUT_GREY) == 0
    assert page.value("divider.getAttribute('aria-valuetext')") == "0 % input, the rest NRRN"


def test_either_side_shows_what_is_chosen_and_swap_changes_them_over(page: Browser) -> None:
    select(page, "left", "2")
    assert share(page, REFERENCE_GREY) > 0.3
    assert share(page, INPUT_GREY) == 0
    page.click("#swap")
    row = greys(page)
    assert row[6] == NRRN_GREY
    assert row[-6] == REFERENCE_GREY
    assert page.value("[...document.querySelectorAll('.side .name')].map(e => e.textContent)") == ["reference", "NRRN"]


@pytest.mark.parametrize("ratio", [1.0, 1.25, 2.0])
def test_one_to_one_is_one_voxel_a_pixel_of_the_screen(browser: Browser, tmp_path: Path, ratio: float) -> None:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (200, 200), np.uint8) for name in ("input", "NRRN")}
    write_page(tmp_path / "page.html", evaluation(views=one_view(**images)))
    browser.open(tmp_path / "page.html", 800, 600, ratio)
    select(browser, "zoom", "1")
    browser.value("seen.split = 1; show()")
    left, top, *_ = (round(value * ratio) for value in browser.box("#view"))
    shown = browser.picture()[top : top + 200, left : left + 200, 0]
    expected = grey_levels(images["input"], *display_range(images["input"]))
    below_the_lens = slice(150, 200), slice(0, 120)
    np.testing.assert_array_equal(shown[below_the_lens], expected[below_the_lens])


def test_at_a_large_zoom_a_drag_moves_the_images_and_not_the_divider(page: Browser) -> None:
    select(page, "zoom", "8")
    left, top, *_ = page.box("#view")
    page.drag((left + 100, top + 100), (left + 84, top + 60))
    assert page.value("[seen.split, seen.x, seen.y]") == pytest.approx([0.5, SIDE / 2 + 16 / 8, SIDE / 2 + 40 / 8])
    page.press("ArrowLeft", 37)
    assert page.value("seen.x") == pytest.approx(SIDE / 2 + 16 / 8 - 40 / 8)
    page.press("-", 189)
    assert page.value("zoom.value") == "6"


def test_the_details_follow_the_pointer(page: Browser) -> None:
    left, top, width, height = page.box("#view")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 4, y=top + height / 4)
    at = page.value("[seen.lensX, seen.lensY]")
    assert at == pytest.approx([SIDE / 4, SIDE / 4], abs=1)
    moved = page.value("document.querySelector('.detail img').style.transform")
    assert moved == f"translate({-6 * (round(at[0]) - 20)}px, {-6 * (round(at[1]) - 20)}px)"


def test_views_of_several_shapes_are_chosen_from(browser: Browser, tmp_path: Path) -> None:
    wide = np.zeros((60, 200), np.uint8)
    views = {
        "z = 3": {"input": flat(INPUT_GREY), "NRRN": flat(NRRN_GREY)},
        "z = 5": {"input": flat(NRRN_GREY), "NRRN": flat(INPUT_GREY)},
        "y = 7": {"input": wide + 50, "NRRN": wide + 200},
    }
    write_page(tmp_path / "page.html", evaluation(views=views))
    browser.open(tmp_path / "page.html")
    assert browser.value("[...which.options].map(e => e.textContent)") == [*views]
    assert greys(browser)[[6, -6]].tolist() == [INPUT_GREY, NRRN_GREY]
    browser.value("seen.x = 20; zoom.value = '8'; show()")
    select(browser, "which", "1")
    assert greys(browser)[[6, -6]].tolist() == [NRRN_GREY, INPUT_GREY]
    assert browser.value("[seen.x, zoom.value]")[1] == "8", "the same place of another slice"
    select(browser, "right", "0")
    select(browser, "which", "2")
    *_, width, height = browser.box("#view")
    assert width / height == pytest.approx(200 / 60)
    assert len(set(greys(browser).tolist())) == 3, "the input on both sides, and the divider's two greys"
    alts = browser.value("[...document.querySelectorAll('#gallery figure:not([hidden]) img')].map(e => e.alt)")
    assert alts == ["y = 7: input", "y = 7: NRRN"]
    assert browser.complaints == []


def test_one_view_is_nothing_to_choose_from(page: Browser) -> None:
    assert page.value("which.closest('label').checkVisibility()") is False


def test_hostile_names_run_nothing_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    views = one_view(**{"input": flat(1), HOSTILE: flat(2)})
    write_page(tmp_path / "page.html", evaluation(title="kept", rows=(Row(HOSTILE, {}),), views=views))
    browser.open(tmp_path / "page.html")
    select(browser, "left", "1")
    assert browser.value("document.title") == "kept"
    assert browser.value("document.querySelector('.side .name').textContent") == HOSTILE
    assert browser.complaints == []


def test_the_policy_stops_a_script_that_is_not_the_page_s_own(browser: Browser, tmp_path: Path) -> None:
    text = html_of(evaluation()).replace("</main>", "<script>document.title = 'taken'</script></main>")
    (tmp_path / "page.html").write_text(text, "utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.value("document.title") == "Of four methods"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_dark_and_printed_pages_are_readable(page: Browser) -> None:
    light = page.picture().mean()
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.picture().mean() < 128 < light
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.picture().mean() > 128
    shown = page.value("['#compare', '#gallery'].map(e => getComputedStyle(document.querySelector(e)).display)")
    assert shown == ["none", "grid"]
    page.send("Emulation.setEmulatedMedia", media="", features=[])


@pytest.mark.parametrize("width", [390, 800, 1600])
def test_nothing_is_wider_than_the_window(page: Browser, width: int) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    select(page, "zoom", "8")
    assert page.value("document.documentElement.scrollWidth") <= width
