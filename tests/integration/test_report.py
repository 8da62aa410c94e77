"""nrrn report: a page of a run, from its output alone, in a real browser."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline import Box, Layout, Method, Options, denoise, write_report
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.run_page.looks import SIDE, look_at
from nrrn_pipeline.run_page.made import open_made
from tests.browser import Browser, chromium
from tests.commands import Nrrn
from tests.integration.test_page import Page, select
from tests.support import bare_zarr, image_like, ome_image, tiny_weights

SHAPE = (24, 96, 128)
BLANK, BRIGHT, NOISY = 5, 11, 17  # slices
CORNER = np.s_[:, :24, :40]  # white, at the top on the left
LAYOUT = Layout(slab=(8, 64, 64), shard=(8, 64, 64), chunk=(8, 32, 32))
SMOOTHED = Options(cluster="serial", device="cpu", layout=LAYOUT, method=Method(name="gaussian-avg"))


def marked() -> NDArray[np.uint8]:
    """Grey with noise, and what is to be seen on the page."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(*map(np.arange, SHAPE[1:]), indexing="ij")
    voxels = 90 + 15 * np.sin(y / 11) + 15 * np.cos(x / 13) + rng.normal(0, 12, SHAPE)
    voxels[CORNER] += 110
    voxels[BRIGHT] += 25
    voxels[NOISY] += rng.normal(0, 30, SHAPE[1:])
    voxels[BLANK] = 0
    return np.clip(np.rint(voxels), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw.zarr, of slices twice as thick as voxels are wide, and smooth.zarr, which was made of it."""
    folder = tmp_path_factory.mktemp("lab")
    ome_image(folder / "raw.zarr", marked(), scale=(8.0, 4.0, 4.0))
    denoise(folder / "raw.zarr", folder / "smooth.zarr", weights=None, options=SMOOTHED)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as there:
        yield there


@pytest.fixture
def page(lab: Path, tmp_path: Path, browser: Browser) -> Iterator[Browser]:
    """The page in a small laptop's window; it complains of nothing and asks for nothing."""
    write_report(lab / "smooth.zarr", tmp_path / "smooth.html")
    browser.open(tmp_path / "smooth.html", 1366, 768)
    yield browser
    assert browser.complaints == []
    assert browser.requests == [(tmp_path / "smooth.html").as_uri()]


def facts(page: Page) -> dict[str, str]:
    """Those at the top before those that are folded."""
    words = page.text_in("dt", "dd")
    return dict(reversed([*zip(words[::2], words[1::2], strict=True)]))


def warnings_of(page: Page) -> list[str]:
    """What stands above the facts."""
    return [text for text in page.text_in("li") if not text.startswith(("Noise:", "What was removed", "Pictures:"))]


def test_the_command_tells_the_run_and_names_the_slices_that_look_wrong(
    lab: Path, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = nrrn("report", lab / "smooth.zarr")
    assert said.status == 0, said.err
    assert said.out == f"smooth.html: a report of {lab / 'smooth.zarr'}\n"
    page = Page((tmp_path / "smooth.html").read_text())
    told = facts(page)
    assert page.text_in("h1") == ["smooth.zarr: raw.zarr denoised"]
    assert told["state"] == "complete, 12 of 12 slabs"
    assert told["source"] == f"{lab / 'raw.zarr'}, 24 x 96 x 128 uint8"
    assert told["output"] == f"{lab / 'smooth.zarr'}, 24 x 96 x 128, voxels of 8 x 4 x 4 nm, 294.91 KB"
    assert told["method"].startswith("gaussian-avg, sigma ")
    assert "with 1 worker" in told["run"]
    assert told["slab"] == "[8, 64, 64]"
    assert "numpy 2." in told["versions"]
    before, after = (float(word) for word in told["noise"].split() if word[0].isdigit())
    assert before == pytest.approx(12, rel=0.1)
    assert after < before / 2
    assert warnings_of(page) == [
        f"Slice {BLANK}: blank, and left as it was.",
        f"Slice {BRIGHT}: brighter or darker than the slices around.",
        f"Slice {NOISY}: of other contrast than the slices around.",
    ]
    assert page.text_in("h2") == [
        *("Side by side", "The same slice", "Measures", "Notes"),
        *("Noise and signal", "What was removed", "The run"),
    ]
    assert len([each for each in page.of("img") if str(each["alt"]).startswith("Figure ")]) == 7


def test_pictures_are_the_voxels_before_and_after_right_side_up(page: Browser, lab: Path) -> None:
    views = page.value("[...which.options].map(e => e.textContent)")
    assert views == ["z = 6", "z = 12", "z = 18", "xz, y = 47", "yz, x = 63"]
    left, top, width, height = (round(value) for value in page.box("#view"))
    assert width / height == pytest.approx(SHAPE[2] / SHAPE[1], rel=0.01)
    for split in (0, 1):
        page.value(f"seen.split = {split}; show()")
        shown = page.picture()[top : top + height, left : left + width, 0].astype(float)
        corner = shown[height // 10 : height // 5, width // 10 : width // 4]  # below the name
        others = shown[-height // 5 :, : width // 4], shown[: height // 5, width // 2 : -width // 5]
        assert corner.mean() > 1.5 * max(other.mean() for other in others)


def test_the_slider_moves_and_views_and_methods_are_chosen(page: Browser) -> None:
    left, top, width, height = page.box("#view")
    page.drag((left + width / 2, top + height / 2), (left + 0.9 * width, top + height / 2))
    assert page.value("seen.split") == pytest.approx(0.9, abs=0.01)
    select(page, "which", "3")
    *_, width, height = page.box("#view")
    assert width / height == pytest.approx(SHAPE[2] / (2 * SHAPE[0]), rel=0.02), "slices are twice as thick"
    select(page, "right", "2")
    assert page.value("[...document.querySelectorAll('.side .name')].map(e => e.textContent)") == ["removed", "input"]
    select(page, "which", "0")
    page.value("seen.split = 0; show()")
    left, top, width, height = (round(value) for value in page.box("#view"))
    shown = page.picture()[top : top + height, left : left + width, 0]
    assert 120 < shown[height // 2 :].mean() < 135, "nothing that was removed is middle grey"


def test_nothing_overlaps_and_nothing_is_wider_than_the_window(page: Browser) -> None:
    overlapping = """(() => {
        const boxes = [...document.querySelectorAll('header > *, section > *, .plot, details, #gallery figure, label')]
            .filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()]);
        const found = [];
        for (const [a, p] of boxes) for (const [b, q] of boxes)
            if (a !== b && !a.contains(b) && !b.contains(a) && p.left < q.right - 1 && q.left < p.right - 1
                && p.top < q.bottom - 1 && q.top < p.bottom - 1) found.push(a.outerHTML.slice(0, 80));
        return found;
    })()"""
    assert page.value("document.querySelectorAll('.plot, details').length") == 9
    page.value("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert page.value(overlapping) == []
    assert page.value("document.documentElement.scrollWidth") <= 1366
    assert page.value("document.querySelector('#view').getBoundingClientRect().top") < 500, "seen without scrolling"
    page.send("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=False)
    page.picture()  # drawn anew: until then the page does not know of its size
    assert page.value("document.documentElement.scrollWidth") <= 420


def test_a_partial_run_says_so_and_shows_what_is_whole(lab: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    shutil.copytree(lab / "smooth.zarr", tmp_path / "part.zarr")
    ledger = Ledger(str(tmp_path / "part.zarr/0"))
    ledger.forget("z0-y0-x0")
    ledger.put_failure("z0-y0-x0", "out of memory")
    said = nrrn("report", tmp_path / "part.zarr", "--out", tmp_path / "part.html")
    assert said.status == 0, said.err
    page = Page((tmp_path / "part.html").read_text())
    partial, failed, *_ = warnings_of(page)
    assert partial.startswith("Partial: 11 of 12 slabs are done")
    assert partial.endswith("Shown is what is whole: 8:24,0:96,0:128 (z, y, x).")
    assert failed == "Slab z0-y0-x0 failed: out of memory"
    assert [text for text in page.text_in("option") if text.startswith("z = ")] == ["z = 12", "z = 16", "z = 20"]
    for key in ledger.slabs():
        ledger.forget(key)
    said = nrrn("report", tmp_path / "part.zarr", "--out", tmp_path / "none.html")
    assert said.status == 2
    assert "no slab is done yet" in said.err


def test_of_a_part_places_are_told_in_the_source_and_a_network_is_named(lab: Path, tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path / "w.safetensors")
    options = Options(cluster="serial", device="cpu", roi=Box.parse("8:16,20:90,30:120"))
    denoise(lab / "raw.zarr", tmp_path / "part.zarr", weights, options)
    write_report(tmp_path / "part.zarr", tmp_path / "part.html")
    page = Page((tmp_path / "part.html").read_text())
    assert "of that 8:16,20:90,30:120 (z, y, x)" in facts(page)["source"]
    assert f"{weights}, an NRRN with units 1, channels 4, sha256 " in facts(page)["method"]
    assert f"Slice {BRIGHT}: brighter or darker than the slices around." in warnings_of(page)
    made = open_made(tmp_path / "part.zarr")
    looks = look_at(made)
    assert looks.z == (10, 12, 14)
    np.testing.assert_array_equal(looks.slices[0][0], marked()[10, 20:90, 30:120])
    weights.unlink()
    write_report(tmp_path / "part.zarr", tmp_path / "again.html")
    assert "they are not there any more" in facts(Page((tmp_path / "again.html").read_text()))["method"]


def test_of_large_slices_a_window_is_shown_and_a_whole_one_by_means(tmp_path: Path) -> None:
    shape = (3, SIDE + 300, SIDE + 100)
    voxels = np.zeros(shape, np.uint8)
    voxels[:, 250:, 90:] = image_like((3, SIDE + 50, SIDE + 10))
    source = bare_zarr(tmp_path / "raw.zarr", voxels, (1, 512, 512))
    options = Options(cluster="serial", device="cpu", method=Method(name="mean"))
    denoise(source, tmp_path / "mean.zarr", None, options)
    looks = look_at(open_made(tmp_path / "mean.zarr"))
    assert looks.window.shape == (1, SIDE, SIDE)
    assert looks.window.y.start >= 240
    assert list(looks.views)[-1] == "z = 1, whole slice, 1:2"
    whole = looks.views["z = 1, whole slice, 1:2"]["input"]
    assert whole.shape == (shape[1] // 2, shape[2] // 2)
    assert whole[200, 100] == pytest.approx(voxels[1, 400:402, 200:202].mean())
    assert max(max(picture["input"].shape) for picture in looks.views.values()) <= SIDE
    write_report(tmp_path / "mean.zarr", tmp_path / "mean.html")
    assert (tmp_path / "mean.html").stat().st_size < 15e6


def test_a_source_that_was_moved_is_given(lab: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    shutil.copytree(lab / "raw.zarr", tmp_path / "raw.zarr")
    denoise(tmp_path / "raw.zarr", tmp_path / "out.zarr", weights=None, options=SMOOTHED)
    (tmp_path / "raw.zarr").rename(tmp_path / "moved.zarr")
    said = nrrn("report", tmp_path / "out.zarr", "--out", tmp_path / "out.html")
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert f"no volume at {tmp_path / 'raw.zarr'}" in line
    assert line.endswith(f"say where to: nrrn report {tmp_path / 'out.zarr'} --source SRC")
    assert not (tmp_path / "out.html").exists()
    said = nrrn("report", tmp_path / "out.zarr", "--source", tmp_path / "moved.zarr", "--out", tmp_path / "out.html")
    assert said.status == 0, said.err
    assert str(tmp_path / "moved.zarr") in facts(Page((tmp_path / "out.html").read_text()))["source"]


def test_a_source_that_is_a_level_is_found_again(tmp_path: Path) -> None:
    source = ome_image(tmp_path / "raw.zarr", marked(), levels=2)
    denoise(source, tmp_path / "out.zarr", None, Options(cluster="serial", level=1, method=Method(name="mean")))
    made = open_made(tmp_path / "out.zarr")
    assert made.source.shape == (24, 48, 64)
    assert made.source.voxel_size == (4, 8, 8)


SMOOTHED_SMALL = Options(cluster="serial", device="cpu", method=Method(name="mean"))
REFUSED = {
    "nothing": "no volume at",
    "another's": "was not made by nrrn: give an output of nrrn denoise",
    "ingested": "was not denoised: a report is of an output of nrrn denoise",
    "page": "exists: choose another file",
    "folder": "its folder is missing",
    "shape": "is uint8 of shape (24, 90, 128), but",
    "small": "a report needs 16 x 16",
    "matplotlib": "pip install nrrn-pipeline[evaluation]",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_reported_on_is_one_line(
    lab: Path, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    output, page, more = lab / "smooth.zarr", tmp_path / "a.html", ()
    if wrong == "nothing":
        output = tmp_path / "none.zarr"
    elif wrong == "another's":
        output = lab / "raw.zarr"
    elif wrong == "ingested":
        assert nrrn("ingest", lab / "raw.zarr", tmp_path / "in.zarr", "--cluster", "serial").status == 0
        output = tmp_path / "in.zarr"
    elif wrong == "page":
        page.write_text("precious")
    elif wrong == "folder":
        page = tmp_path / "no/a.html"
    elif wrong == "shape":
        more = ("--source", bare_zarr(tmp_path / "other.zarr", image_like((24, 90, 128))))
    elif wrong == "small":
        denoise(
            bare_zarr(tmp_path / "s.zarr", image_like((4, 12, 40))),
            tmp_path / "o.zarr",
            weights=None,
            options=SMOOTHED_SMALL,
        )
        output = tmp_path / "o.zarr"
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = nrrn("report", output, "--out", page, *more)
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert REFUSED[wrong] in line
    assert wrong == "page" or not page.exists()


def test_a_blank_volume_and_lost_statistics_have_a_page_too(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", np.full((4, 32, 40), 7, np.uint8))
    denoise(source, tmp_path / "out.zarr", tiny_weights(tmp_path / "w.safetensors"), Options(cluster="serial"))
    write_report(tmp_path / "out.zarr", tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text())
    assert warnings_of(page) == ["Slices 0 to 3: blank, and left as it was."]
    assert facts(page)["noise"] == "none that can be measured"
    (tmp_path / "out.zarr/0/nrrn/statistics.json").unlink()
    write_report(tmp_path / "out.zarr", tmp_path / "b.html")
    lost = warnings_of(Page((tmp_path / "b.html").read_text()))
    assert lost[1].startswith("The means of the source's slices are lost")
