"""The page of a training: by nrrn train, from the weights alone, and in a real browser."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline import Box, Options, TrainingVolume, TrainSettings, denoise, open_volume, train
from nrrn_pipeline.cost import counted
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights, read_header, save_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.report.page import display_range, grey_levels
from nrrn_pipeline.training.train import TRIED
from nrrn_pipeline.volume import read_box
from tests.browser import chromium
from tests.commands import Nrrn
from tests.integration.test_page import Page
from tests.support import bare_zarr, image_like, ome_image, tiny_weights

SHAPE = (24, 64, 72)
HELD_OUT = [11, 12]
TINY = TrainSettings(units=1, channels=4, steps=8, batch=2, crop=16, device="cpu")
WORDS = ("--units", 1, "--channels", 4, "--steps", 8, "--batch", 2, "--crop", 16, "--device", "cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw.zarr and w.safetensors, which learnt from it."""
    folder = tmp_path_factory.mktemp("trained")
    z, y, x = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    clean = np.rint(128 + 30 * np.sin(y / 9 + z / 4) + 30 * np.cos(x / 7)).astype(np.uint8)
    bare_zarr(folder / "raw.zarr", Noise(sigma=15, seed=1).added(clean, box_of(SHAPE)))
    record = train(folder / "raw.zarr", folder / "w.safetensors", TINY)
    assert record["volumes"][0]["held_out"] == HELD_OUT
    assert record["settings"]["loss"] == "recorrupted"
    return folder


@pytest.fixture
def retold(trained: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """The same weights with a record that was meddled with."""

    def make(meddle: Callable[[dict[str, Any]], Any]) -> Path:
        record = read_header(trained / "w.safetensors")["training"]
        meddle(record)
        save_weights(load_weights(trained / "w.safetensors"), tmp_path / "retold.safetensors", record)
        return tmp_path / "retold.safetensors"

    return make


def facts(page: Page) -> dict[str, str]:
    words = page.text_in("dt", "dd")
    return dict(zip(words[::2], words[1::2], strict=True))


def pictures(page: Page) -> dict[str, NDArray[Any]]:
    """The gallery's."""
    found = {}
    for image in page.of("img"):
        if str(image["alt"]).startswith("The slice: "):
            data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(data)) as picture:
                found[str(image["alt"]).removeprefix("The slice: ")] = np.asarray(picture)
    return found


def test_the_page_tells_of_the_training_and_shows_slices_that_it_did_not_learn_from(
    trained: Path, tmp_path: Path, nrrn: Nrrn
) -> None:
    said = nrrn("weights", "page", trained / "w.safetensors", "--out", tmp_path / "w.html", "--device", "cpu")
    assert said.status == 0, said.err
    assert said.out == f"{tmp_path / 'w.html'}: how {trained / 'w.safetensors'} was trained\n"
    page = Page((tmp_path / "w.html").read_text())
    told, record = facts(page), read_header(trained / "w.safetensors")["training"]
    best = dict(record["validation"]["step_and_loss"])[record["validation"]["best_step"]]
    assert page.text_in("h1") == ["How w.safetensors was trained"]
    assert told["source"] == f"{trained / 'raw.zarr'}, 0:24,0:64,0:72; held out: 11:13"
    assert told["network"].startswith("an NRRN with units 1, channels 4: 1224 parameters")
    assert told["loss"].startswith("recorrupted to recorrupted (Pang et al. 2021): chosen, as the noise is white")
    assert told["crops"] == "2 a step, of 16 x 16 voxels"
    assert told["steps"] == "8 of 8 asked for"
    assert told["best"].endswith(f"loss on slices held out {best:.4f}, of 8 looks")
    assert "learning_rate 0.02" in told["settings"]
    assert "torch" in told["versions"]
    assert told["measured"] == f"11:13,0:64,0:72 of {trained / 'raw.zarr'}, held out from training"
    assert [text for text in page.text_in("th") if text in ("input", "denoised")] == ["input", "denoised"]
    captions = " ".join(page.text_in("figcaption"))
    for shown in ("Loss by step", f"Noise of {trained / 'raw.zarr'}", "What was removed", "Autocorrelation"):
        assert shown in captions


def test_its_pictures_are_what_denoise_gives(trained: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    weights = trained / "w.safetensors"
    assert nrrn("weights", "page", weights, "--out", tmp_path / "w.html", "--device", "cpu").status == 0
    denoise(trained / "raw.zarr", tmp_path / "whole.zarr", weights, Options(cluster="serial", device="cpu"))
    raw, whole = (open_volume(path) for path in (trained / "raw.zarr", tmp_path / "whole.zarr"))
    middle = Box.parse("12:13,0:64,0:72")
    given, denoised = (read_box(volume, middle)[0] for volume in (raw, whole))
    shown, (low, high) = pictures(Page((tmp_path / "w.html").read_text())), display_range(given)
    assert [*shown] == ["input", "denoised"]
    np.testing.assert_array_equal(shown["input"], grey_levels(given, low, high))
    np.testing.assert_array_equal(shown["denoised"], grey_levels(denoised, low, high))


def test_nrrn_train_makes_it_once_the_weights_are_there_and_a_browser_shows_it(
    trained: Path, tmp_path: Path, nrrn: Nrrn
) -> None:
    """Of a training that held nothing out; the page says so."""
    page = tmp_path / "w.html"
    words = ("train", trained / "raw.zarr", "--out", tmp_path / "w.safetensors", "--hold-out", 0)
    said = nrrn(*words, *WORDS, "--page", page)
    assert said.status == 0, said.err
    assert said.out.splitlines()[-1] == f"{page}: how {tmp_path / 'w.safetensors'} was trained"
    told = facts(Page(page.read_text()))
    assert told["measured"].startswith("8:16,0:64,0:72")
    assert told["measured"].endswith("from which it learnt: no slices were held out")
    with chromium(tmp_path) as browser:
        browser.open(page)
        assert browser.value("document.title") == "How w.safetensors was trained"
        assert browser.value("[...document.querySelectorAll('.side .name')].map(e => e.textContent)") == [
            "denoised",
            "input",
        ]
        sizes = browser.value("[...document.querySelectorAll('.plot img')].map(e => e.naturalWidth)")
        assert sizes == [900, 900, 72, 900]
        assert browser.picture(whole=True).shape[0] > 2000
        assert "No slices were held out" in browser.value("document.body.textContent")
        assert browser.complaints == []
        assert browser.requests == [page.as_uri()]


def test_units_that_were_tried_are_told(trained: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    words = ("train", trained / "raw.zarr", "--out", tmp_path / "w.safetensors", *WORDS, "--units", "auto")
    said = nrrn(*words, "--page", tmp_path / "w.html")
    assert said.status == 0, said.err
    record = read_header(tmp_path / "w.safetensors")["training"]
    units, tried = record["settings"]["units"], record[TRIED]
    assert f": {counted(units, 'unit')}, 4 channels (of {len(tried)} tried), loss recorrupted" in said.out
    told = facts(Page((tmp_path / "w.html").read_text()))
    assert told[TRIED] == ", ".join(f"{number}: {loss:.4f}" for number, loss in enumerate(tried, start=1))
    assert "--units 'many' is not possible: give a number, or auto" in nrrn(*words, "--units", "many").err


def test_going_on_from_weights_it_says_their_sizes(trained: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    words = ("--from", trained / "w.safetensors", "--steps", 2, "--batch", 2, "--crop", 16, "--device", "cpu")
    said = nrrn("train", trained / "raw.zarr", "--out", tmp_path / "w.safetensors", *words)
    assert f"{tmp_path / 'w.safetensors'}: 1 unit, 4 channels, loss recorrupted" in said.out


def test_slices_shown_are_few_and_in_the_middle_of_those_held_out(
    retold: Callable[..., Path], tmp_path: Path, nrrn: Nrrn
) -> None:
    weights = retold(lambda record: record["volumes"][0].update(held_out=[1, 2, *range(4, 20)], roi="0:24,8:64,0:40"))
    assert nrrn("weights", "page", weights, "--out", tmp_path / "w.html", "--device", "cpu").status == 0
    assert facts(Page((tmp_path / "w.html").read_text()))["measured"].startswith("8:16,8:64,0:40 of ")


def test_of_several_volumes_one_is_shown_of_which_slices_were_held_out(
    retold: Callable[..., Path], tmp_path: Path, nrrn: Nrrn
) -> None:
    def another_first(record: dict[str, Any]) -> None:
        record["volumes"].insert(0, record["volumes"][0] | {"held_out": [], "source": "/gone/raw.zarr"})

    said = nrrn("weights", "page", retold(another_first), "--out", tmp_path / "w.html", "--device", "cpu")
    assert said.status == 0, said.err
    assert facts(Page((tmp_path / "w.html").read_text()))["measured"].endswith("raw.zarr, held out from training")


@pytest.mark.parametrize("by", ["frame", "mask"])
def test_it_shows_where_there_is_something_to_see(tmp_path: Path, nrrn: Nrrn, by: str) -> None:
    """Not the middle of a part that is a frame of zeros there, or that the mask leaves out."""
    voxels, mask = image_like((24, 200, 240)), np.zeros((24, 200, 240), np.uint8)
    mask[:, 100:190, 160:] = 1
    source = bare_zarr(tmp_path / "raw.zarr", voxels * mask if by == "frame" else voxels)
    beside = bare_zarr(tmp_path / "mask.zarr", mask) if by == "mask" else None
    train(TrainingVolume(source, mask=beside), tmp_path / "w.safetensors", replace(TINY, loss="adjacent", steps=2))
    said = nrrn("weights", "page", tmp_path / "w.safetensors", "--out", tmp_path / "w.html", "--device", "cpu")
    assert said.status == 0, said.err
    assert facts(Page((tmp_path / "w.html").read_text()))["measured"].startswith("11:13,96:192,160:240 of ")


def test_a_level_of_a_pyramid_is_found_again(tmp_path: Path, nrrn: Nrrn) -> None:
    voxels = np.random.default_rng(0).integers(90, 160, (1, 1, 24, 32, 40), np.uint8)
    source = ome_image(tmp_path / "raw.ome.zarr", voxels, levels=2)
    settings = replace(TINY, loss="adjacent", steps=2)
    train(TrainingVolume(source, level=1), tmp_path / "w.safetensors", settings)
    said = nrrn("weights", "page", tmp_path / "w.safetensors", "--out", tmp_path / "w.html", "--device", "cpu")
    assert said.status == 0, said.err
    page = Page((tmp_path / "w.html").read_text())
    assert facts(page)["measured"] == f"11:13,0:16,0:20 of {source}/1, held out from training"
    assert pictures(page)["input"].shape == (16, 20)
    assert "Noise of" not in " ".join(page.text_in("figcaption"))  # this loss needs none


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no volumes": (lambda record: record.pop("volumes"), "tells of no volume that it was trained on"),
    "no settings": (lambda record: record.pop("settings"), "is damaged, or of another version"),
    "odd volumes": (lambda record: record.update(volumes="abc"), "is damaged, or of another version"),
    "odd slices": (lambda record: record["volumes"][0].update(held_out=["z"]), "is damaged, or of another version"),
    "odd part": (lambda record: record["volumes"][0].update(roi="all"), "is damaged, or of another version"),
    "far slices": (lambda record: record["volumes"][0].update(held_out=[99]), "roi z=99:100 is empty or not inside"),
    "odd noise": (lambda record: record["volumes"][0]["noise"].update(sigma=[1.0]), "is damaged, or of another"),
    "endless counts": (
        lambda record: record["volumes"][0]["noise"]["model"].update(counts=True, gain=1e-12, white=255.0),
        "is damaged, or of another version",
    ),
    "odd trials": (lambda record: record.update({TRIED: ["x"]}), "is damaged, or of another version"),
    "odd looks": (lambda record: record.update(validation={"best_step": []}), "is damaged, or of another version"),
    "another shape": (
        lambda record: record["volumes"][0].update(shape=[24, 64, 99]),
        "is uint8 of shape (24, 64, 72)",
    ),
    "another dtype": (lambda record: record["volumes"][0].update(dtype="uint16"), "learnt from uint16 of (24, 64, 72)"),
    "odd mask": (lambda record: record["volumes"][0].update(mask=5), "no volume at"),
    "gone": (lambda record: record["volumes"][0].update(source="/gone/raw.zarr"), "no volume at /gone/raw.zarr"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_record_that_cannot_be_shown_is_one_line(
    retold: Callable[..., Path], tmp_path: Path, nrrn: Nrrn, what: str
) -> None:
    meddle, message = DAMAGED[what]
    said = nrrn("weights", "page", retold(meddle), "--out", tmp_path / "w.html")
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert message in line
    assert not (tmp_path / "w.html").exists()


@pytest.mark.parametrize("weights", ["imported", "nrrn-fast"])
def test_weights_without_a_training_of_ours_are_refused(tmp_path: Path, nrrn: Nrrn, weights: str) -> None:
    given = tiny_weights(tmp_path / "w.safetensors") if weights == "imported" else weights
    said = nrrn("weights", "page", given, "--out", tmp_path / "w.html")
    assert said.status == 2
    expected = (
        "tells of no volume" if weights == "imported" else "the page shows what nrrn-fast learnt from, but no volume"
    )
    assert expected in said.err.splitlines()[-1]


@pytest.mark.parametrize("lacks", ["matplotlib", "pywt", "folder", "free name", "own name", "voxels"])
def test_a_page_that_cannot_be_made_is_refused_before_training(
    trained: Path, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    page = tmp_path / ("no/w.html" if lacks == "folder" else "w.html")
    if lacks == "own name":
        page = tmp_path / "w.safetensors"
    if lacks == "free name":
        page.write_text("precious")
    if lacks in ("matplotlib", "pywt"):
        monkeypatch.setitem(sys.modules, lacks, None)
    monkeypatch.setattr("nrrn_pipeline.cli.training.train_weights", None)  # called, it would be an error
    part = ("--roi", "0:24,0:64,0:10") if lacks == "voxels" else ()
    said = nrrn("train", trained / "raw.zarr", "--out", tmp_path / "w.safetensors", *WORDS, *part, "--page", page)
    assert said.status == 2
    (line,) = said.err.splitlines()
    expected = {
        "folder": "its folder is missing",
        "free name": "exists: choose another file",
        "voxels": "that takes 11 x 11 voxels at least",
        "own name": "where something else is to be written",
    }
    assert expected.get(lacks, "pip install nrrn-pipeline[evaluation]") in line


def test_a_page_that_fails_costs_no_weights(
    trained: Path, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "raw.zarr", tmp_path / "raw.zarr")
    monkeypatch.setattr(
        "nrrn_pipeline.cli.training._validation_text", lambda _: shutil.rmtree(tmp_path / "raw.zarr") or "trained"
    )
    words = ("train", tmp_path / "raw.zarr", "--out", tmp_path / "w.safetensors", "--loss", "adjacent")
    said = nrrn(*words, *WORDS, "--page", tmp_path / "w.html")
    assert said.status == 1
    line = said.err.splitlines()[-1]
    assert "w.safetensors is whole, but there is no page of its training: " in line
    assert line.endswith(f"nrrn weights page {tmp_path / 'w.safetensors'} --out {tmp_path / 'w.html'}")
    assert load_weights(tmp_path / "w.safetensors").architecture.units == 1


@pytest.mark.parametrize("beside", [("--page", ".checkpoint"), ("--page", ".trials"), ("--tensorboard", "")])
def test_nothing_is_to_be_written_where_something_else_is(
    trained: Path, tmp_path: Path, nrrn: Nrrn, beside: tuple[str, str]
) -> None:
    option, ending = beside
    weights = tmp_path / "w.safetensors"
    said = nrrn("train", trained / "raw.zarr", "--out", weights, *WORDS, option, f"{weights}{ending}")
    assert said.status == 2
    assert "is where something else is to be written: choose another place" in said.err
    assert [*tmp_path.iterdir()] == []
