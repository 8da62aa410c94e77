"""nrrn preview: by the command line, from Python, and in a real browser."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline import Layout, Method, Options, denoise, ingest, open_volume, preview
from nrrn_pipeline.geometry import Box, Span, box_of
from nrrn_pipeline.previewing import Preview, picking
from nrrn_pipeline.previewing.picking import pick_regions
from nrrn_pipeline.report.page import display_range, grey_levels
from nrrn_pipeline.volume import read_box
from tests.browser import chromium
from tests.commands import Nrrn
from tests.integration.test_page import Page
from tests.support import bare_zarr, image_like, ome_image, tiny_weights

SHAPE = (12, 60, 70)
SMALL = Layout(slab=(4, 32, 32), chunk=(4, 16, 16), shard=(4, 32, 32), tile=30)
SERIAL = Options(cluster="serial", device="cpu", layout=SMALL)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE))
    tiny_weights(tmp_path / "w.safetensors")
    return tmp_path


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "SIDE", 32)
    monkeypatch.setattr(picking, "MIDDLE", 16)


def refuse_difference(found: Preview, source: Path, weights: Path | None, options: Options) -> None:
    """From what denoise writes with the same options."""
    output = source.parent / "whole.zarr"
    made = denoise(source, output, weights, options).plan
    origin = options.roi or made.target.box
    for region in found.regions:
        raw = read_box(open_volume(source, options.level), region.box)[0]
        np.testing.assert_array_equal(region.noisy, raw)
        np.testing.assert_array_equal(region.denoised, read_box(made.target, region.box.shifted(origin))[0])


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("roi", [None, Box(Span(2, 11), Span(5, 60), Span(3, 50))])
def test_what_it_shows_is_what_denoise_writes(lab: Path, roi: Box | None) -> None:
    options = replace(SERIAL, roi=roi)
    found = preview(lab / "raw.zarr", lab / "w.safetensors", options)
    assert len({region.box.z.start // 4 for region in found.regions}) == 3, "one in each third"
    assert all(region.noisy.shape == (32, 32) for region in found.regions)
    refuse_difference(found, lab / "raw.zarr", lab / "w.safetensors", options)
    assert [*lab.glob("*.html")] == []


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("method", ["gaussian-avg", "median-avg"])
def test_filters_are_set_as_for_the_whole_volume(lab: Path, method: str) -> None:
    options = Options(cluster="serial", layout=SMALL, method=Method(name=method))
    refuse_difference(preview(lab / "raw.zarr", None, options, [(5, 31, 33)]), lab / "raw.zarr", None, options)


def test_statistics_that_the_source_keeps_are_used(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(lab / "raw.npy", image_like((7, 40, 50), "float32"))
    ingest(lab / "raw.npy", lab / "kept.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("nrrn_pipeline.statistics_pass._measure_each", None)  # called, it would be an error
        found = preview(lab / "kept.zarr", lab / "w.safetensors", SERIAL, [(6, 9, 9)])
    refuse_difference(found, lab / "kept.zarr", lab / "w.safetensors", SERIAL)


@pytest.mark.usefixtures("small_windows")
def test_a_level_is_shown_by_its_own_voxels(lab: Path) -> None:
    source = ome_image(lab / "raw.ome.zarr", image_like((6, 80, 90))[None, None], levels=2)
    options = Options(cluster="serial", device="cpu", level=1)
    found = preview(source, lab / "w.safetensors", options, [(5, 39, 44), (0, 0, 0), (5, 39, 44)])
    assert [str(region.box) for region in found.regions] == ["5:6,8:40,13:45", "0:1,0:32,0:32"]
    refuse_difference(found, source, lab / "w.safetensors", options)


@pytest.mark.parametrize("shape", [(1, 40, 50), (1, 1, 1), (2, 5, 300), (3, 7, 6)])
def test_volumes_of_one_slice_and_smaller_than_a_window_are_shown_whole(tmp_path: Path, shape: Any) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    source, weights = bare_zarr(tmp_path / "raw.zarr", noisy), tiny_weights(tmp_path / "w.safetensors")
    places = [(0, 0, 0)] if shape == (1, 1, 1) else []
    found = preview(source, weights, Options(cluster="serial", device="cpu"), places)
    assert [region.box for region in found.regions] == [
        Box(Span(z, z + 1), Span(0, shape[1]), Span(0, shape[2])) for z in range(shape[0])
    ]
    assert (found.regions[0].noise_before is None) == (min(shape[1:]) < 16)
    refuse_difference(found, source, weights, Options(cluster="serial", device="cpu"))


@pytest.mark.usefixtures("small_windows")
def test_a_window_lies_where_there_is_structure(tmp_path: Path) -> None:
    """Neither in a frame, nor where voxels are cut off, in plain noise, at a bright border or in a blank slice."""
    noisy = np.random.default_rng(0).normal(100, 10, (9, 160, 160))
    noisy[:, :, :40], noisy[:, :40, 40:] = 0, 255
    y, x = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    noisy[:, 110:150, 60:100] += 30 * np.sin(y / 3) * np.cos(x / 3)
    noisy[4] = 90
    source = open_volume(bare_zarr(tmp_path / "raw.zarr", noisy.clip(0, 255).astype(np.uint8)))
    found = pick_regions(source, source.box, 3, (64, 32, 32))
    assert [box.z.start for box in found] == [1, 3, 7]
    assert all(box.y == Span(96, 128) or box.y == Span(128, 160) for box in found)
    assert all(box.x == Span(64, 96) for box in found)
    assert pick_regions(source, source.box, 3, (64, 32, 32)) == found


def test_little_is_read_of_a_large_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Box] = []

    def spied(volume: Any, box: Box) -> NDArray[Any]:
        read.append(box)
        return image_like(box.shape)

    monkeypatch.setattr(picking, "read_box", spied)
    source = open_volume(bare_zarr(tmp_path / "raw.zarr", np.zeros((2, 2, 2), np.uint8)))
    large = source.__class__(source.url, (6000, 4096, 6144), "uint8", (16, 256, 256), (64, 512, 512))
    assert len(pick_regions(large, box_of(large.shape), 3, (64, 512, 512))) == 3
    assert len(read) == 75
    assert {box.shape for box in read} == {(1, 128, 128)}
    read.clear()
    by_slice = source.__class__(source.url, (6000, 512, 600), "uint8", (1, 512, 600), (1, 512, 600))
    pick_regions(by_slice, box_of(by_slice.shape), 3, (64, 512, 512))
    assert [box.shape for box in read] == [(1, 512, 600)] * 3, "a chunk is decoded once"


def test_the_command_writes_a_page_that_a_browser_shows(lab: Path, nrrn: Nrrn) -> None:
    page, words = lab / "look.html", ("--weights", lab / "w.safetensors", "--cluster", "serial", "--device", "cpu")
    said = nrrn("preview", lab / "raw.zarr", *words, "--out", page, "--at", "3,5,5", "--at", "9,0,0")
    assert said.status == 0, said.err
    rows = dict(line.split("  ", 1) for line in said.out.splitlines())
    assert rows["z=3, y=0:60, x=0:70"].strip().startswith("noise ")
    assert rows["full run"].strip().endswith("of computing with 1 worker: 1 slab, 50.40 KB before compression")
    assert rows["page"].strip() == str(page)
    denoise(lab / "raw.zarr", lab / "whole.zarr", lab / "w.safetensors", Options(cluster="serial", device="cpu"))
    raw, whole = (read_box(volume, volume.box) for volume in map(open_volume, (lab / "raw.zarr", lab / "whole.zarr")))
    limits = display_range(raw[[3, 9]])
    shown = pictures(page)
    for number, z in ((1, 3), (2, 9)):
        view = f"{number}: z={z}, y=0:60, x=0:70"
        np.testing.assert_array_equal(shown[f"{view}: input"], grey_levels(raw[z], *limits))
        np.testing.assert_array_equal(shown[f"{view}: denoised"], grey_levels(whole[z], *limits))
    with chromium(lab) as browser:
        browser.open(page)
        assert browser.value("[...which.options].map(e => e.textContent)") == [
            "1: z=3, y=0:60, x=0:70",
            "2: z=9, y=0:60, x=0:70",
        ]
        assert browser.value("[...left.options].map(e => e.textContent)") == ["input", "denoised", "removed"]
        first = browser.value("document.querySelector('.side img').src")
        browser.value("which.value = '1'; which.dispatchEvent(new Event('change'))")
        assert browser.value("document.querySelector('.side img').src") != first
        assert browser.complaints == []
        assert browser.requests == [page.as_uri()]


def pictures(page: Path) -> dict[str, NDArray[Any]]:
    found = {}
    for image in Page(page.read_text()).of("img"):
        if image.get("src"):
            data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(data)) as picture:
                found[str(image["alt"])] = np.asarray(picture)
    return found


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no weights": (("--weights", "no.safetensors"), "no.safetensors"),
    "neither weights nor method": ((), "there are no weights: give a file with --weights"),
    "outside": (("--at", "12,0,0"), "place 12,0,0 is not inside 0:12,0:60,0:70 (z,y,x)"),
    "negative": (("--at=-1,0,0",), "place -1,0,0 is not inside"),
    "outside the roi": (("--at", "3,0,0", "--roi", "0:4,8:60,0:70"), "place 3,0,0 is not inside 0:4,8:60,0:70"),
    "no place": (("--at", "here"), "--at 'here' is not understood"),
    "no regions": (("--regions", "0"), "0 regions cannot be shown: ask for 1 to 24"),
    "both": (("--regions", "2", "--at", "1,1,1"), "give one of the two"),
    "elsewhere": (("--cluster", "tcp://127.0.0.1:1"), "a preview is made on this machine"),
    "no folder": (("--out", "no/look.html"), "its folder is missing"),
    "page exists": (("--out", "there.html"), "there.html exists: choose another file"),
    "NaN": (("--level", "0"), "holds NaN or infinite voxels in slice z=6"),
    "blank": (("--level", "0"), "is blank, or cut off at black or white, wherever it was looked at (slices 1, 2, 3, "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_previewed_is_one_line_and_nothing_is_written(
    lab: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(lab)
    (lab / "there.html").write_text("precious")
    bare_zarr(lab / "blank.zarr", np.full(SHAPE, 255, np.uint8))
    damaged = image_like(SHAPE, "float32")
    damaged[6, 30, 30] = np.inf
    bare_zarr(lab / "NaN.zarr", damaged)
    words, message = REFUSED[what]
    weights = () if "weights" in what else ("--weights", "w.safetensors")
    cluster = () if what == "elsewhere" else ("--cluster", "serial")
    before = sorted(lab.rglob("*"))
    said = nrrn("preview", f"{what}.zarr" if what in ("blank", "NaN") else "raw.zarr", *weights, *cluster, *words)
    assert said.status == 2, said.out
    (line,) = (line for line in said.err.splitlines() if line.strip())
    assert message in line
    assert sorted(lab.rglob("*")) == before
    assert (lab / "there.html").read_text() == "precious"
