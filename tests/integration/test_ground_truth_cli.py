"""nrrn ground-truth: images of all kinds in, one image out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer
from numpy.typing import NDArray
from skimage.io import imread, imsave
from typer.testing import CliRunner, Result

from nrrn_pipeline.cli.ground_truth import ground_truth
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.ground_truth import reference_image
from tests.support import bare_zarr, image_like

app = typer.Typer()
app.command()(ground_truth)
Scans = list[NDArray[Any]]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def scans_of(dtype: str = "uint8", count: int = 6) -> Scans:
    """One surface with other noise each time; the second lies two pixels lower, the third three further right."""
    wide = image_like((1, 80, 90), "float32")[0]
    rng = np.random.default_rng(0)
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    scans = []
    for number in range(count):
        y, x = {1: (2, 0), 2: (0, 3)}.get(number, (0, 0))
        seen = wide[8 - y : 72 - y, 8 - x : 72 - x] + 0.03 * rng.standard_normal((64, 64))
        scans.append(np.clip(seen * top, 0, top).astype(dtype) if top > 1 else seen.astype(dtype))
    return scans


def expected(scans: Scans) -> NDArray[Any]:
    image = reference_image(scans).image
    return np.rint(image).astype(scans[0].dtype) if scans[0].dtype.kind == "u" else image


def as_files(folder: Path, scans: Scans, ending: str) -> list[Path]:
    paths = [folder / f"scan{number}{ending}" for number in range(len(scans))]
    for path, scan in zip(paths, scans, strict=True):
        if ending == ".png":
            imsave(path, scan, check_contrast=False)
        else:
            tifffile.imwrite(path, scan)
    return paths


def as_pages(folder: Path, scans: Scans) -> list[Path]:
    """Three pages, which look like three colours, and the rest."""
    tifffile.imwrite(folder / "a.tif", np.stack(scans[:3]), photometric="minisblack")
    tifffile.imwrite(folder / "b.tif", np.stack(scans[3:]), photometric="minisblack", byteorder=">")
    return [folder / "a.tif", folder / "b.tif"]


def as_zarr(folder: Path, scans: Scans) -> list[Path]:
    return [bare_zarr(folder / "scans.zarr", np.stack(scans))]


KINDS: dict[str, Callable[[Path, Scans], list[Path]]] = {
    "tif": lambda folder, scans: as_files(folder, scans, ".tif"),
    "TIFF": lambda folder, scans: as_files(folder, scans, ".TIFF"),
    "pages": as_pages,
    "zarr": as_zarr,
    "zarr and tif": lambda folder, scans: [*as_zarr(folder, scans[:2]), *as_files(folder, scans[2:], ".tif")],
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_scans_of_any_kind_make_the_reference_image(tmp_path: Path, kind: str, dtype: str) -> None:
    scans = scans_of(dtype)
    out = tmp_path / "reference.tif"
    result = call(*KINDS[kind](tmp_path, scans), out)
    assert result.exit_code == 0, result.output
    written = tifffile.imread(out)
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, expected(scans))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_in_and_png_out_lose_nothing(tmp_path: Path, dtype: str) -> None:
    scans = scans_of(dtype)
    assert call(*as_files(tmp_path, scans, ".png"), tmp_path / "out.png").exit_code == 0
    written = imread(tmp_path / "out.png")
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, expected(scans))


def test_it_says_how_many_scans_and_how_far_they_lay_off(tmp_path: Path) -> None:
    out = tmp_path / "out.tif"
    said = call(*as_files(tmp_path, scans_of(), ".tif"), out).stdout.splitlines()
    assert said[0] == "scans   6 of 6"
    words = said[1].split()
    assert words[0] == "shifts"
    assert float(words[4].rstrip(",")) == pytest.approx(2, abs=0.3)
    assert float(words[8]) == pytest.approx(3, abs=0.3)
    assert said[2] == f"image   {out}"


def test_a_subset_is_used_when_asked_for(tmp_path: Path) -> None:
    scans = scans_of(count=8)
    result = call(*as_files(tmp_path, scans, ".tif"), tmp_path / "out.tif", "--use", 5, "--seed", 2)
    assert result.stdout.startswith("scans   5 of 8")
    image = np.rint(reference_image(scans, 5, 2).image)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), image)


def test_an_output_that_is_there_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    *scans, last = as_files(tmp_path, scans_of(), ".tif")
    before = last.read_bytes()
    assert "is there already: delete it" in refusal(*scans, last)
    assert last.read_bytes() == before


def colours(folder: Path) -> Path:
    imsave(folder / "odd.png", np.zeros((64, 64, 3), np.uint8), check_contrast=False)
    return folder / "odd.png"


def coloured_tiff(folder: Path) -> Path:
    tifffile.imwrite(folder / "odd.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    return folder / "odd.tif"


def damaged(folder: Path) -> Path:
    (folder / "odd.tif").write_bytes(b"II*\0 and no more")
    return folder / "odd.tif"


def cut_short(folder: Path) -> Path:
    tifffile.imwrite(folder / "odd.tif", scans_of()[0])
    with open(folder / "odd.tif", "r+b") as file:
        file.truncate(3000)
    return folder / "odd.tif"


def cut_short_png(folder: Path) -> Path:
    imsave(folder / "odd.png", scans_of()[0], check_contrast=False)
    with open(folder / "odd.png", "r+b") as file:
        file.truncate(1000)
    return folder / "odd.png"


def of_doubles(folder: Path) -> Path:
    tifffile.imwrite(folder / "odd.tif", np.ones((64, 64)))
    return folder / "odd.tif"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda folder: folder / "odd.tif", "no scan at .*odd.tif"),
    "no zarr": (lambda folder: folder / "odd.zarr", "no volume at .*odd.zarr"),
    "colours": (colours, "odd.png holds no grey"),
    "colours in TIFF": (coloured_tiff, "odd.tif holds no grey"),
    "damaged": (damaged, "odd.tif cannot be read as an image"),
    "cut short": (cut_short, "odd.tif cannot be read as an image"),
    "cut short PNG": (cut_short_png, "odd.png cannot be read as an image"),
    "doubles": (of_doubles, "odd.tif holds float64 pixels: expected uint8, uint16 or float32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_no_scan_is_named_and_nothing_written(tmp_path: Path, what: str) -> None:
    make, said = REFUSED[what]
    scans = as_files(tmp_path, scans_of(), ".tif")
    with pytest.raises(InputError, match=said):
        raise InputError(refusal(*scans, make(tmp_path), tmp_path / "out.tif"))
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize(
    ("out", "said"),
    [("out.zarr", "the last word is the image to write"), ("new/out.tif", "no folder .*new to write out.tif in")],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, out: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        raise InputError(refusal(*as_files(tmp_path, scans_of(), ".tif"), tmp_path / out))


def test_floats_are_not_rounded_into_a_png(tmp_path: Path) -> None:
    scans = as_files(tmp_path, scans_of("float32"), ".tif")
    assert "out.png cannot hold the float32 pixels" in refusal(*scans, tmp_path / "out.png")


def test_one_word_alone_is_no_command(tmp_path: Path) -> None:
    assert call(tmp_path / "out.tif").exit_code == 2
