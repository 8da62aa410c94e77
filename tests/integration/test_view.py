"""nrrn view, in a real browser and from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from numpy.typing import NDArray

from nrrn_pipeline.viewing import Layer, find_layers, serving, viewer_state
from tests.browser import Browser, chromium
from tests.commands import Nrrn
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, ome_image, tiny_weights

SHAPE = (6, 90, 120)
WINDOW = (1366, 768)  # of a small laptop
READY = "window.viewer !== undefined && viewer.isReady() && viewer.layerManager.managedLayers.every(x => x.isReady())"
SQUARE = 15  # voxels


def chequered() -> NDArray[np.uint8]:
    """Squares, each of its own grey level, which also tells the slice: no turn or shift of it is like it."""
    z, y, x = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")
    squares = np.random.default_rng(3).permutation((SHAPE[1] // SQUARE) * (SHAPE[2] // SQUARE))
    number = (y // SQUARE) * (SHAPE[2] // SQUARE) + x // SQUARE
    grey: NDArray[np.uint8] = (60 + 2 * squares[number] + 10 * z).astype(np.uint8)
    return grey


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium"), webgl=True) as browser:
        yield browser


def panels(browser: Browser, layers: tuple[Layer, ...]) -> list[NDArray[np.float64]]:
    """(y, x) grey levels of the screen at the middle of each square of the slice, for each panel."""
    browser.wait(READY)
    picture = browser.picture()
    places = browser.value(
        "[...document.querySelectorAll('.neuroglancer-rendered-data-panel')].map(e => e.getBoundingClientRect())"
        ".map(box => [box.left + box.width / 2, box.top + box.height / 2])"
    )
    zoom = viewer_state(layers, ["" for _ in layers])["crossSectionScale"]
    ys, xs = (np.arange(SQUARE // 2, length, SQUARE) - length // 2 for length in SHAPE[1:])
    found = []
    for left, top in places:
        rows, columns = (np.rint(at + steps / zoom).astype(int) for at, steps in ((top, ys), (left, xs)))
        colours = picture[np.ix_(rows, columns)].astype(float)
        assert np.ptp(colours, axis=-1).max() == 0, "it is grey"
        found.append(colours[..., 0])
    return found


def expected(voxels: NDArray[Any], contrast: tuple[float, float]) -> NDArray[np.float64]:
    """Grey levels of the screen for a slice."""
    middles = voxels[SQUARE // 2 :: SQUARE, SQUARE // 2 :: SQUARE].astype(float)
    low, high = contrast
    grey: NDArray[np.float64] = np.clip((middles - low) / (high - low), 0, 1) * 255
    return grey


def asked_elsewhere(browser: Browser) -> list[str]:
    return [url for url in browser.requests if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))]


def complaints(browser: Browser) -> list[str]:
    return [told for told in browser.complaints if "python state event source connected" not in told]


def test_three_panels_show_the_middle_slice_right_side_up(browser: Browser, tmp_path: Path) -> None:
    denoised = chequered()
    noisy = denoised + np.where(np.indices(SHAPE).sum(0) // SQUARE % 2, 8, -8).astype(np.int16)
    noisy = noisy.astype(np.uint8)
    layers = find_layers(
        ome_image(tmp_path / "noisy.zarr", noisy), ome_image(tmp_path / "it's <b>de_noised.zarr", denoised)
    )
    with serving(layers) as address:
        browser.visit(address, *WINDOW)
        left, middle, right = panels(browser, layers)
        assert complaints(browser) == []
        assert asked_elsewhere(browser) == []
        names = browser.value("[...document.querySelectorAll('.neuroglancer-layer-item-label')].map(e => e.innerText)")
        assert names == ["noisy", "denoised", "removed noise"]
        assert browser.value("document.title") == "nrrn: it's <b>de_noised.zarr - neuroglancer"
    z = SHAPE[0] // 2
    for found, voxels, layer in zip((left, middle), (noisy, denoised), layers, strict=False):
        np.testing.assert_allclose(found, expected(voxels[z], layer.contrast), atol=2)
        assert np.ptp(found) > 100, "contrast spans the grey levels of the screen"
    removed = noisy[z].astype(int) - denoised[z]
    np.testing.assert_allclose(right, expected(removed, layers[2].contrast), atol=2)
    assert abs(right.mean() - 127.5) < 30


def test_a_bare_volume_without_units_is_shown_alone(browser: Browser, tmp_path: Path) -> None:
    voxels = chequered().astype(np.float32) / 7 - 20
    layers = find_layers(bare_zarr(tmp_path / "raw.zarr", voxels, zarr_format=2))
    with serving(layers) as address:
        browser.visit(address, *WINDOW)
        (found,) = panels(browser, layers)
        assert complaints(browser) == []
    np.testing.assert_allclose(found, expected(voxels[SHAPE[0] // 2], layers[0].contrast), atol=2)


def test_panels_move_together(browser: Browser, tmp_path: Path) -> None:
    denoised = chequered()
    noisy = ome_image(tmp_path / "noisy.zarr", 255 - denoised)
    layers = find_layers(noisy, ome_image(tmp_path / "denoised.zarr", denoised))
    with serving(layers) as address:
        browser.visit(address, *WINDOW)
        panels(browser, layers)
        browser.send("Input.dispatchMouseEvent", type="mouseWheel", x=200, y=400, deltaX=0, deltaY=100)
        browser.wait("viewer.position.value[2] === 2")
        left, middle, _ = panels(browser, layers)
    np.testing.assert_allclose(left, expected(255 - denoised[2], layers[0].contrast), atol=2)
    np.testing.assert_allclose(middle, expected(denoised[2], layers[1].contrast), atol=2)


@contextmanager
def viewing(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`nrrn view` in a process of its own, and the address that it says."""
    heeded = ["env", "--default-signal=INT"]  # a test run in the background ignores it
    command = [*heeded, sys.executable, "-m", "nrrn_pipeline.cli", "view", "--no-browser", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_ctrl_c_which_is_no_failure(tmp_path: Path) -> None:
    with viewing(bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE))) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{16,}/", address)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert told == "showing raw.zarr; Ctrl-C ends it\nnrrn: the viewer has ended; nothing was changed\n"


def test_an_output_finds_its_source_by_itself(tmp_path: Path, nrrn: Nrrn) -> None:
    source, output = ome_image(tmp_path / "raw.zarr", image_like(SHAPE), levels=2), tmp_path / "out.zarr"
    words = ("--weights", tiny_weights(tmp_path / "w.safetensors"), "--cluster", "serial", "--level", "1")
    region = ("--roi", "2:6,0:40,10:50", "--chunk", "2,16,16", "--shard", "4,32,32", "--tile", "32")
    assert nrrn("denoise", source, output, *words, *region).status == 0
    found = find_layers(output)
    assert [layer.volume.url for layer in found] == [f"{source}/1", f"{output}/0", f"{output}/0"]
    assert found[2].levels[0].place == (2, 0, 10)
    assert found[0].contrast == find_layers(source, output, level=1)[0].contrast
    shutil.rmtree(source)
    assert [layer.name for layer in find_layers(output)] == ["out.zarr"]


def test_an_output_that_is_not_whole_is_shown_with_a_warning(tmp_path: Path, nrrn: Nrrn) -> None:
    source, output = bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE)), tmp_path / "out.zarr"
    assert nrrn("ingest", source, output, "--cluster", "serial").status == 0
    group = output / "zarr.json"
    group.write_text(group.read_text().replace('"complete"', '"unfinished"'))
    shutil.rmtree(output / "0/c")
    assert "out.zarr is unfinished: what is not there yet is black" in nrrn("view", output, "--url").err
    (layer,) = find_layers(output)
    assert not layer.levels[0].read(layer.volume.box).any()


def test_volumes_on_object_storage_are_shown_with_our_credentials(
    moto_s3: ObjectStore, tmp_path: Path, nrrn: Nrrn
) -> None:
    moto_s3.make_bucket("lab")
    volume = image_like(SHAPE)
    with moto_s3.in_use():
        assert nrrn("ingest", bare_zarr(tmp_path / "raw.zarr", volume), "s3://lab/raw.zarr").status == 0
        layers = find_layers("s3://lab/raw.zarr")
        assert layers[0].name == "raw.zarr"
        np.testing.assert_array_equal(layers[0].levels[0].read(layers[0].volume.box), volume)
        said = nrrn("view", "s3://lab/raw.zarr", "--url")
        assert said.status == 0
        state = json.loads(unquote(said.out.strip().partition("#!")[2]))
        assert state["layers"][0]["source"] == {"url": "s3://lab/raw.zarr/|zarr3:"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("raw.zarr", "--url"), "raw.zarr cannot be read by web pages: leave --url out to view it here"),
        (("raw.zarr", "--url", "--port", "8000"), "--port and --url exclude each other"),
        (("none.zarr",), "no volume at .*none.zarr: there is nothing there"),
        (("raw.zarr", "small.zarr"), "small.zarr cannot be laid over .*raw.zarr: voxels of"),
        (("raw.zarr", "--level", "1"), "raw.zarr has no level 1: it is a bare array"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE))
    bare_zarr(tmp_path / "small.zarr", image_like((7, 80, 80)))
    said = nrrn("view", *words)
    assert (said.status, said.out) == (2, "")
    assert re.search(message, said.err)
    assert said.err.count("\n") == 1
