"""nrrn evaluate, and the methods that it compares, as a user types them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline import open_volume, verify
from nrrn_pipeline.evaluation.metrics import psnr, ssim
from nrrn_pipeline.evaluation.without_reference import low_frequency_share
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import save_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.volume import read_box
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like, stored_chunks, tiny_network, tiny_weights

SHAPE = (5, 64, 72)
ALL = ("--cluster", "serial", "--device", "cpu")
CUT = ("--chunk", "2,32,32", "--shard", "2,32,64", "--tile", "40")


@pytest.fixture
def nrrn(nrrn: Nrrn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nrrn:
    """In a folder with clean.zarr, noisy.zarr and w.safetensors."""
    z, y, x = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    clean = np.rint(128 + 40 * np.sin(y / 9 + z / 4) + 40 * np.cos(x / 7)).astype(np.uint8)
    bare_zarr(tmp_path / "clean.zarr", clean)
    bare_zarr(tmp_path / "noisy.zarr", Noise(sigma=20, seed=1).added(clean, box_of(SHAPE)))
    tiny_weights(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return nrrn


def voxels(path: Path | str) -> NDArray[Any]:
    volume = open_volume(path)
    return read_box(volume, volume.box)


def results(folder: str = "out") -> dict[str, dict[str, Any]]:
    rows = json.loads(Path(folder, "results.json").read_text())["results"]
    return {row["method"]: row for row in rows}


def test_all_methods_are_measured_alike_against_a_reference(nrrn: Nrrn, tmp_path: Path) -> None:
    methods = "mean,gaussian-avg,median-avg,nlm,nlm-avg,nrrn,mine=w.safetensors"
    words = ("evaluate", "noisy.zarr", "--reference", "clean.zarr", "--methods", methods, "--weights", "w.safetensors")
    said = nrrn(*words, "--out", "out", *ALL, *CUT)
    assert said.status == 0, said.err
    rows, clean, noisy = results(), voxels("clean.zarr"), voxels("noisy.zarr")
    assert [*rows] == ["input", "mean", "gaussian-avg", "median-avg", "nlm", "nlm-avg", "nrrn", "mine"]
    assert rows["input"]["psnr_db"] == pytest.approx(psnr(clean, noisy, 255))
    assert rows["input"]["noise_sigma"] == pytest.approx(20, abs=3)
    for name in [*rows][1:]:
        found = voxels(f"out/{name}.ome.zarr")
        assert rows[name]["psnr_db"] == pytest.approx(psnr(clean, found, 255))
        assert rows[name]["ssim"] == pytest.approx(ssim(clean, found, 255))
        residual = noisy.astype(float) - found
        assert rows[name]["residual_low_frequency_share"] == pytest.approx(low_frequency_share(residual))
    assert max(rows, key=lambda name: rows[name]["psnr_db"]) not in ("input", "nrrn", "mine")
    assert {name: rows[name]["parameters"] for name in ("nrrn", "mine")} == {"nrrn": 1224, "mine": 1224}
    assert rows["mean"]["seam_energy"] == pytest.approx(1, abs=0.1)
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [line[0] for line in lines] == ["method", *rows]
    assert lines[1][:3] == ["input", f"{rows['input']['psnr_db']:.2f}", f"{rows['input']['ssim']:.3f}"]
    written = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert [line["method"] for line in written] == [*rows]
    assert float(written[1]["psnr_db"]) == rows["mean"]["psnr_db"]
    page = Path("out/index.html").read_text()
    assert all(name in page for name in rows)


def test_evaluating_again_denoises_nothing_again_and_says_the_same(nrrn: Nrrn) -> None:
    words = ("evaluate", "noisy.zarr", "--methods", "mean,nlm-avg", "--out", "out", *ALL)
    assert nrrn(*words).status == 0
    before, chunks = results(), stored_chunks(Path("out/mean.ome.zarr/0"))
    assert nrrn(*words).status == 0
    after = results()
    for row in (*before.values(), *after.values()):
        row.pop("million_voxels_per_s", None)  # of a run that had anything to do
    assert before == after
    assert stored_chunks(Path("out/mean.ome.zarr/0")) == chunks
    assert "psnr_db" not in after["mean"]


def test_of_one_slice_all_is_measured_but_what_compares_slices(nrrn: Nrrn) -> None:
    words = ("evaluate", "noisy.zarr", "--methods", "gaussian-avg", "--out", "out", *ALL, "--roi", "2:3,0:64,0:72")
    assert nrrn(*words).status == 0
    rows = results()
    assert 0.01 < rows["gaussian-avg"]["residual_whiteness"] < 0.5
    assert 0.05 < rows["gaussian-avg"]["residual_low_frequency_share"] < 0.2
    assert rows["gaussian-avg"]["residual_neighbour_correlation"] is None
    assert "largest_brightness_step" not in rows["input"]


def test_all_methods_run_on_the_same_workers(nrrn: Nrrn, tmp_path: Path) -> None:
    words = ("evaluate", "noisy.zarr", "--methods", "mean,gaussian-avg,median-avg", "--out", "out", *CUT)
    assert nrrn(*words, "--cluster", "local", "--workers", "1").status == 0
    records = list(tmp_path.glob("out/*/0/nrrn/slabs/*.json"))
    assert len(records) > 6
    assert len({json.loads(record.read_text())["worker"] for record in records}) == 1


def test_flat_signal_and_edges_are_measured_where_they_are_said_to_be(nrrn: Nrrn, tmp_path: Path) -> None:
    clean = np.full(SHAPE, 60, np.uint8)
    clean[:, :, 40:] = 180
    bare_zarr(tmp_path / "step.zarr", Noise(sigma=6, seed=1).added(clean, box_of(SHAPE)))
    words = ("evaluate", "step.zarr", "--methods", "mean,gaussian-avg", "--out", "out", *ALL, "--roi", "1:5,8:64,10:72")
    said = nrrn(*words, "--flat", "1:4,10:50,12:34", "--edge", "2:30,20:30,60:21")
    assert said.status == 0, said.err
    rows = results()
    assert rows["input"]["flat_iqr"] == pytest.approx(2 * 0.674 * 6, abs=1.1)
    assert rows["mean"]["flat_iqr"] < 0.7 * rows["input"]["flat_iqr"]
    assert rows["input"]["edge_rise"] == pytest.approx(0.8, abs=0.15)
    assert rows["gaussian-avg"]["edge_rise"] > rows["mean"]["edge_rise"] == pytest.approx(0.8, abs=0.15)
    for wrong, message in (
        (("--flat", "1:4,10:50,2:34"), "flat x=2:34 is empty or not inside the volume: use a part of 10:72"),
        (("--edge", "2:30,20:30,90"), "is not inside 1:5,8:64,10:72"),
        (("--edge", "9:30,20:30,60"), "in slice 9 is not inside"),
        (("--edge", "2:30,20"), "--edge '2:30,20' is not understood"),
        (("--flat", "1:2"), "--flat '1:2' is not understood"),
    ):
        assert message in nrrn(*words, *wrong).err


def test_that_edges_are_kept_is_seen_without_a_clean_volume_or_a_line(nrrn: Nrrn, tmp_path: Path) -> None:
    y, x = np.indices((160, 160))
    stripes = 100 + 40 * np.tanh((np.abs((0.8 * x + 0.6 * y) % 44 - 22) - 11) / 1.2)
    clean = np.repeat(np.rint(stripes)[None], 7, axis=0).astype(np.uint8)
    bare_zarr(tmp_path / "stripes.zarr", Noise(sigma=12, seed=1).added(clean, box_of(clean.shape)))
    said = nrrn("evaluate", "stripes.zarr", "--methods", "mean,gaussian-avg", "--out", "out", *ALL)
    assert said.status == 0, said.err
    rows = results()
    assert "edges, voxels" in said.out.splitlines()[0]
    assert rows["mean"]["edge_width"] == pytest.approx(rows["input"]["edge_width"], abs=0.2)
    assert rows["gaussian-avg"]["edge_width"] > rows["mean"]["edge_width"] + 5 * rows["mean"]["edge_width_error"]
    assert nrrn("evaluate", "noisy.zarr", "--methods", "mean", "--out", "none", *ALL).status == 0
    assert results("none")["mean"]["edge_width"] is None  # waves have no two levels


def test_equal_images_have_no_psnr_in_json_and_an_infinite_one_in_the_table(nrrn: Nrrn, tmp_path: Path) -> None:
    said = nrrn("evaluate", "noisy.zarr", "--reference", "noisy.zarr", "--methods", "mean", "--out", "out", *ALL)
    assert said.status == 0, said.err
    assert results()["input"]["psnr_db"] is None
    assert said.out.splitlines()[1].split("\t")[1] == "\N{INFINITY}"


def test_networks_of_two_images_are_compared_with_filters_of_their_own(nrrn: Nrrn) -> None:
    words = ("evaluate", "noisy.zarr", "--methods", "mean,nrrn", "--weights", "w.safetensors", "--images", "2")
    assert nrrn(*words, "--out", "out", *ALL).status == 0
    assert [*results()] == ["input", "mean", "nrrn"]


CURVE = [[1, 3.0], [2, 2.0], [3, 1.5]]


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"step_and_mean_loss": CURVE, "validation": {"step_and_loss": CURVE}}, True),
        ({"step_and_mean_loss": CURVE, "validation": "none"}, True),
        ({"step_and_mean_loss": [[1, "a"]], "validation": {"step_and_loss": CURVE}}, True),
        ({"step_and_mean_loss": [[1, 2, 3]]}, False),
        ({"step_and_mean_loss": [[1], [1, 2]]}, False),
        ({"step_and_mean_loss": [[1, 1e999]]}, False),
        ({"step_and_mean_loss": {}}, False),
        ({}, False),
    ],
    ids=str,
)
def test_the_page_shows_how_weights_were_trained_if_they_tell(nrrn: Nrrn, record: dict[str, Any], shown: bool) -> None:
    save_weights(tiny_network(), "told.safetensors", record)
    words = ("evaluate", "noisy.zarr", "--methods", "mine=told.safetensors", "--roi", "0:3,0:32,0:32")
    assert nrrn(*words, "--out", "out", *ALL).status == 0
    assert ("How mine learned" in Path("out/index.html").read_text()) is shown


def test_brightness_that_drifts_changes_no_filter(nrrn: Nrrn, tmp_path: Path) -> None:
    level = (voxels("noisy.zarr")).astype(np.float32)
    drift = 1000 * np.arange(len(level), dtype=np.float32)[:, None, None]
    for name, drifting in (("level", level), ("drifting", level + drift)):
        bare_zarr(tmp_path / f"{name}.zarr", drifting)
        words = ("denoise", f"{name}.zarr", f"{name}-out.zarr", "--method", "nlm-avg", *ALL)
        assert nrrn(*words).status == 0
    assert np.allclose(voxels("drifting-out.zarr") - drift, voxels("level-out.zarr"), rtol=0, atol=0.05)


def test_a_plan_of_a_filter_or_the_paper_s_network_needs_no_weights(nrrn: Nrrn) -> None:
    assert "nlm-avg" in nrrn("plan", "noisy.zarr", "out.zarr", "--method", "nlm-avg", *ALL).out
    assert "4 units, 64 channels" in nrrn("plan", "noisy.zarr", "out.zarr", "--method", "nrrn", *ALL).out
    assert "there are no weights" in nrrn("plan", "noisy.zarr", "out.zarr", "--method", "unet", *ALL).err


def test_a_part_is_compared_with_that_part_of_the_reference(nrrn: Nrrn) -> None:
    words = ("evaluate", "noisy.zarr", "--reference", "clean.zarr", "--methods", "mean", "--roi", "1:4,8:40,0:50")
    assert nrrn(*words, "--out", "out", *ALL).status == 0
    part = slice(1, 4), slice(8, 40), slice(0, 50)
    clean, noisy = voxels("clean.zarr")[part], voxels("noisy.zarr")[part]
    assert results()["input"]["psnr_db"] == pytest.approx(psnr(clean, noisy, 255))


@pytest.mark.parametrize("name", ["bm3d", "bm3d-avg", "bm4d"])
def test_block_matching_removes_noise_through_the_pipeline(nrrn: Nrrn, name: str) -> None:
    said = nrrn("denoise", "noisy.zarr", "out.zarr", "--method", name, "--roi", "0:3,0:48,0:48", *ALL)
    assert said.status == 0, said.err
    part = slice(0, 3), slice(0, 48), slice(0, 48)
    clean, noisy = voxels("clean.zarr")[part], voxels("noisy.zarr")[part]
    assert psnr(clean, voxels("out.zarr"), 255) > psnr(clean, noisy, 255) + 3


def test_a_filter_is_resumed_and_repaired_like_a_network(nrrn: Nrrn) -> None:
    words = ("denoise", "noisy.zarr", "out.zarr", "--method", "gaussian-avg", *ALL, *CUT)
    assert nrrn(*words).status == 0
    whole = stored_chunks(Path("out.zarr/0"))
    damaged = next(iter(Path("out.zarr/0").glob("c/*/*/*")))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert nrrn("repair", "out.zarr", *ALL).status == 0
    assert stored_chunks(Path("out.zarr/0")) == whole
    assert "done before" in nrrn(*words).out
    assert "begun with other settings" in nrrn(*words[:3], "--method", "median-avg", *ALL, *CUT).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there are no weights: give a file with --weights, or a --method of mean, gaussian-avg"),
        (("--method", "magic"), "method 'magic' is unknown: use one of nrrn, denoisenet, unet, mean"),
        (("--method", "mean", "--weights", "w.safetensors"), "the filter mean needs no weights: leave them out"),
        (("--method", "unet", "--weights", "w.safetensors"), "holds a nrrn, not a unet"),
        (("--method", "mean", "--images", "1"), "images 1 are for networks"),
        (("--method", "mean", "--stitch", "glue"), "stitch 'glue' is unknown: use crop or blend"),
        (("--method", "mean", "--follow"), "following and a filter, whose strength is measured on the whole volume,"),
    ],
)
def test_methods_that_cannot_be_are_one_line(nrrn: Nrrn, words: tuple[str, ...], message: str) -> None:
    said = nrrn("denoise", "noisy.zarr", "out.zarr", *words, *ALL)
    assert said.status == 2
    assert message in said.err
    assert not Path("out.zarr").exists()


def test_a_volume_without_an_image_or_noise_is_no_case_for_a_filter(nrrn: Nrrn, tmp_path: Path) -> None:
    bare_zarr(tmp_path / "flat.zarr", np.full(SHAPE, 7, np.uint8))
    steps = np.zeros(SHAPE, np.uint8)
    steps[:, :, 30:] = 200
    bare_zarr(tmp_path / "steps.zarr", steps)
    nan = image_like(SHAPE, "float32")
    nan[2] = np.nan
    bare_zarr(tmp_path / "nan.zarr", nan)
    for source, message in (("flat", "is blank"), ("steps", "no noise can be measured"), ("nan", "holds NaN")):
        said = nrrn("denoise", f"{source}.zarr", "out.zarr", "--method", "mean", *ALL)
        assert (said.status, message in said.err) == (2, True), said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "magic"), "method 'magic' is unknown: use nrrn"),
        (("--methods", "mean,mean"), "method mean is there twice"),
        (("--methods", " , "), "name none to compare"),
        (("--methods", "input=w.safetensors"), "method input cannot be: the name stands for something else"),
        (("--methods", "reference=w.safetensors"), "method reference cannot be: the name stands for something else"),
        (("--methods", "mean,Mean=w.safetensors"), "method mean is there twice"),
        (("--methods", "mean", "--weights", "w.safetensors"), "weights w.safetensors are of no method"),
        (("--methods", "mean", "--roi", "0:5,0:10,0:72"), "are too small to be measured: 11 x 11 pixels at least"),
        (("--methods", "mean,nlm", "--tile", "8"), "tile 8 keeps nothing beside a halo of 8"),
        (("--methods", "../a=w.safetensors"), "method '../a=w.safetensors' cannot be: write NAME=FILE"),
        (("--methods", "=w.safetensors"), "method '=w.safetensors' cannot be"),
        (("--methods", "a="), "method 'a=' cannot be"),
        (("--methods", "mean,a=nowhere.safetensors"), "no weights at"),
        (("--methods", "unet"), "method unet needs its weights: give one file of them with --weights"),
        (("--methods", "mean", "--reference", "small.zarr"), "the reference small.zarr has shape (5, 60, 72)"),
        (("--methods", "mean", "--reference", "flat.zarr"), "reference"),
        (("--methods", "mean", "--reference", "wide.zarr"), "reference"),
        (("--methods", "mean", "--roi", "0:5,0:64,0:99"), "roi x=0:99"),
    ],
)
def test_what_cannot_be_compared_is_one_line(nrrn: Nrrn, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    bare_zarr(tmp_path / "small.zarr", image_like((5, 60, 72)))
    bare_zarr(tmp_path / "flat.zarr", np.full(SHAPE, 7, np.uint8))
    bare_zarr(tmp_path / "wide.zarr", image_like(SHAPE, "uint16"))
    said = nrrn("evaluate", "noisy.zarr", *words, "--out", "out", *ALL)
    assert said.status == 2
    assert message in said.err
    assert not Path("out").exists()


def test_noise_is_made_by_the_pipeline_and_is_the_same_again(nrrn: Nrrn) -> None:
    words = (
        "add-noise",
        "clean.zarr",
        "made.zarr",
        "--gaussian",
        "20",
        "--seed",
        "1",
        *ALL,
        "--chunk",
        "2,16,16",
        "--shard",
        "4,32,32",
    )
    assert nrrn(*words).status == 0
    assert np.array_equal(voxels("made.zarr"), voxels("noisy.zarr"))
    assert verify("made.zarr", deep=True) == []
    assert "begun with other settings" in nrrn(*words[:5], "--seed", "2", *words[7:]).err
    damaged = next(iter(Path("made.zarr/0").glob("c/*/*/*")))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert "it is synthetic noise" in nrrn("repair", "made.zarr", *ALL).err
    for wrong in (("--gaussian", "1e39"), ("--poisson", "1e300"), ("--poisson", "1e-310"), ("--gaussian", "nan")):
        said = nrrn("add-noise", "clean.zarr", "other.zarr", *wrong, *ALL)
        assert (said.status, "is not possible: use" in said.err) == (2, True), said.err
    assert "no noise was asked for" in nrrn("add-noise", "clean.zarr", "other.zarr", *ALL).err


def test_peers_are_trained_on_clean_slices_and_denoise(nrrn: Nrrn) -> None:
    small = ("--units", "2", "--channels", "4", "--steps", "3", "--batch", "2", "--crop", "32", "--device", "cpu")
    learn = ("train", "noisy.zarr", "--loss", "clean", "--clean", "clean.zarr", *small)
    for network, inputs in (("denoisenet", "channels"), ("unet", "mean"), ("nrrn", "neighbours")):
        said = nrrn(*learn, "--network", network, "--out", f"{network}.safetensors")
        assert said.status == 0, said.err
        told = dict(line.split(maxsplit=1) for line in nrrn("info", f"{network}.safetensors").out.splitlines() if line)
        assert (told["kind"], told["inputs"]) == (network, inputs)
    weights = [word for name in ("unet", "denoisenet") for word in ("--weights", f"{name}.safetensors")]
    said = nrrn("evaluate", "noisy.zarr", "--methods", "unet,denoisenet", *weights, "--out", "out", *ALL)
    assert said.status == 0, said.err
    assert verify("out/unet.ome.zarr", deep=True) == []
    one = ("--batch", "1", "--crop", "16", "--units", "4", "--network", "unet")
    assert "is too small for a U-Net" in nrrn(*learn, *one, "--out", "x.safetensors").err
    assert "loss clean" in nrrn("train", "noisy.zarr", "--loss", "clean", *small, "--out", "x.safetensors").err
    unfit = ("train", "noisy.zarr", "--network", "unet", "--loss", "adjacent", *small, "--out", "x.safetensors")
    assert "loss adjacent is not possible for unet" in nrrn(*unfit).err


def test_the_noise_of_a_volume_is_told_and_drawn(nrrn: Nrrn, tmp_path: Path) -> None:
    said = nrrn("noise", "noisy.zarr", "--plot", "noise.png")
    assert said.status == 0, said.err
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in said.out.splitlines())
    assert float(told["noise"].split()[0]) == pytest.approx(20, rel=0.1)
    assert told["noise"].endswith("median of 5 slices")
    assert told["unlike their neighbours"] == "no slices"
    assert told["loss to train with"].startswith("recorrupted: the noise is white")
    with Image.open(tmp_path / "noise.png") as drawn:
        assert drawn.width == 900
        assert len(drawn.getcolors(1 << 20) or []) > 10
    for words, said_of_it in (
        (("noisy.zarr", "--plot", "noise.jpg"), "--plot 'noise.jpg' is no PNG file"),
        (("noisy.zarr", "--plot", "noise.png"), "noise.png exists: choose another file"),
        (("nowhere.zarr",), "there is nothing there"),
        (("noisy.zarr", "--level", "3"), "level"),
    ):
        refused = nrrn("noise", *words)
        assert refused.status == 2
        assert said_of_it in refused.err
