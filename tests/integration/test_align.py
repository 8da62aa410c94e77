"""nrrn align, as a user calls it: what it tells of a volume, and the volume that it makes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline import InputError, Layout, Options, RunError, align, measure_drift, repair, verify
from nrrn_pipeline import align_plan as plans
from nrrn_pipeline.align_plan import Moves, moves_text, parse_moves, plan_align
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.slabs import Slab
from nrrn_pipeline.volume import Volume, open_volume
from tests.commands import Nrrn
from tests.drifting import drifting
from tests.support import bare_zarr, image_like, ome_image, stored_chunks

PLACES = np.random.default_rng(0).integers(-1, 2, (16, 2))
PLACES[9:] += (6, -8)
VOXELS = drifting(PLACES, 20.0)
SMALL = Options(layout=Layout(chunk=(4, 32, 32), shard=(4, 64, 64)), cluster="serial")
SERIAL = ("--cluster", "serial")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return ome_image(tmp_path / "raw.zarr", VOXELS)


def stored(path: Path | str) -> NDArray[Any]:
    return zarr.open_array(f"{path}/0", mode="r")[:]


def moves_of(path: Path) -> NDArray[Any]:
    settings = Ledger(f"{path}/0").settings() or {}
    return np.array(parse_moves(settings["moves"], len(VOXELS)))


def rows_of(said: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in said.splitlines() if "  " in line)


def test_slices_are_moved_back_and_every_voxel_is_one_of_the_source(raw: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    said = nrrn("align", raw, tmp_path / "a.zarr", *SERIAL)
    assert said.status == 0
    made, moves = stored(tmp_path / "a.zarr"), moves_of(tmp_path / "a.zarr")
    assert f"a.zarr: 16 x {made.shape[1]} x {made.shape[2]} of 16 x 128 x 128 uint8, " in said.out
    assert np.abs(np.diff(moves - PLACES, axis=0)).max() == 0, "all but the whole volume's place is known"
    y, x = -moves.min(axis=0)
    for plane, own, move in zip(made, VOXELS, moves, strict=True):
        height, width = plane.shape
        part = own[y + move[0] : y + move[0] + height, x + move[1] : x + move[1] + width]
        assert np.array_equal(plane, part)
    assert made.shape[1:] == tuple(128 - np.ptp(moves, axis=0))
    assert open_volume(tmp_path / "a.zarr").origin == (0, 4 * y, 4 * x)
    assert measure_drift(tmp_path / "a.zarr").aligned
    assert verify(tmp_path / "a.zarr", deep=True) == []


def test_drift_is_told_drawn_and_written_and_nothing_else(raw: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    before = sorted(tmp_path.iterdir())
    assert "give a DST" in nrrn("align", raw, *SERIAL).err
    plot, table = tmp_path / "drift.png", tmp_path / "drift.csv"
    told = nrrn("align", raw, "--plot", plot, "--out", table)
    assert "WARNING: shifted against each other by up to" in told.out
    assert "before slices 9 (" in told.out
    assert sorted(tmp_path.iterdir()) == sorted([*before, plot, table])
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [int(row["z"]) for row in rows] == list(range(16))
    found = np.array([(float(row["position_y"]), float(row["position_x"])) for row in rows])
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(PLACES, axis=0), atol=0.4)
    assert nrrn("align", raw, "--out", tmp_path / "d.json").status == 0
    document = json.loads((tmp_path / "d.json").read_text())
    assert not document["aligned"]
    assert [row["position_y"] for row in document["slices"]] == found[:, 0].tolist()


def test_info_and_noise_warn_of_shifted_slices_and_of_no_others(raw: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    nrrn("align", raw, tmp_path / "a.zarr", *SERIAL)
    for command in ("info", "noise"):
        assert "WARNING: shifted" in nrrn(command, raw).out
        assert "aligned within" in nrrn(command, tmp_path / "a.zarr").out


def test_what_tells_nothing_is_not_warned_of_nor_moved(tmp_path: Path, nrrn: Nrrn) -> None:
    noise = np.random.default_rng(0).integers(0, 256, VOXELS.shape, np.uint8)
    path = ome_image(tmp_path / "noise.zarr", noise)
    assert "cannot be compared" in nrrn("align", path).out
    assert rows_of(nrrn("info", path).out)["neighbouring slices"].strip() == "not known; see nrrn align"
    said = nrrn("align", path, tmp_path / "a.zarr", *SERIAL)
    assert said.status == 2
    assert "most slices share no structure" in said.err
    assert not (tmp_path / "a.zarr").exists()


def test_info_says_nothing_of_a_volume_that_is_too_small_or_thin_or_cannot_be_read(tmp_path: Path, nrrn: Nrrn) -> None:
    small, single = bare_zarr(tmp_path / "s.zarr", VOXELS[:, :20]), bare_zarr(tmp_path / "o.zarr", VOXELS[:1])
    torn = bare_zarr(tmp_path / "t.zarr", VOXELS)
    for chunk in (torn / "c").glob("*/*/*"):
        chunk.write_bytes(b"damaged")
    for path in (small, single, torn):
        said = nrrn("info", path)
        assert said.status == 0
        assert "not known; see nrrn align" in said.out


def test_a_run_that_broke_off_goes_on_with_the_same_moves(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = tmp_path / "a.zarr", [3]
    align(raw, tmp_path / "whole.zarr", options=SMALL)

    def breaks_off(volume: Volume, box: Box) -> NDArray[Any]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(volume, box)

    real = plans.read_box
    monkeypatch.setattr(plans, "read_box", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        align(raw, output, options=SMALL)
    monkeypatch.setattr(plans, "read_box", real)
    monkeypatch.setattr("nrrn_pipeline.aligning.moves_of", None)  # they are not measured again
    summary = align(raw, output, options=SMALL)
    assert (summary.resumed, summary.done) == (3, summary.slabs - 3)
    assert stored_chunks(output / "0") == stored_chunks(tmp_path / "whole.zarr" / "0")
    assert Ledger(f"{output}/0").own_statistics() is not None
    with pytest.raises(InputError, match="begun with other settings: trend was kept, now undone"):
        align(raw, output, undo_trend=True, options=SMALL)
    with pytest.raises(InputError, match="begun with other settings"):
        align(raw, output, options=Options(roi=Box.parse("0:8,0:128,0:128"), cluster="serial"))


def test_what_is_damaged_is_made_again_by_the_same_command(raw: Path, tmp_path: Path) -> None:
    align(raw, tmp_path / "a.zarr", options=SMALL)
    whole = stored_chunks(tmp_path / "a.zarr" / "0")
    shard = tmp_path / "a.zarr" / "0" / next(iter(whole))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match="run the same nrrn align again"):
        repair(tmp_path / "a.zarr")
    assert align(raw, tmp_path / "a.zarr", options=SMALL).done == 1
    assert stored_chunks(tmp_path / "a.zarr" / "0") == whole


def test_a_part_is_aligned_with_voxels_from_around_it(raw: Path, tmp_path: Path) -> None:
    roi = Box.parse("2:9,20:100,24:110")
    align(raw, tmp_path / "a.zarr", options=Options(roi=roi, cluster="serial"))
    made = stored(tmp_path / "a.zarr")
    assert made.shape == roi.shape
    settings = Ledger(f"{tmp_path}/a.zarr/0").settings() or {}
    for z, (y, x) in enumerate(parse_moves(settings["moves"], 7)):
        assert np.array_equal(made[z], VOXELS[2 + z, 20 + y : 100 + y, 24 + x : 110 + x])


@settings(max_examples=12, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=6, max_size=6),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_any_moves_copy_voxels_whatever_the_slabs(
    moves: list[tuple[int, int]], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    voxels = image_like((6, 40, 44), dtype)
    source = open_volume(bare_zarr(tmp_path_factory.mktemp("v") / "v.zarr", voxels))
    layout = Layout(slab=(2, 16, 16), chunk=(2, 8, 8), shard=(2, 16, 16))
    made = plan_align(source, "memory://aligned", None, tuple(moves), layout=layout)
    y, x = -np.array(moves).min(axis=0).clip(max=0)
    found = np.empty(made.target.shape, dtype)
    for slab in made.slabs:
        found[slab.keep.within(made.target.box)] = made.voxels(Slab(slab.keep, slab.keep))
    for z, (dy, dx) in enumerate(moves):
        assert np.array_equal(found[z], voxels[z, y + dy :, x + dx :][: found.shape[1], : found.shape[2]])
    assert made.slab_bytes >= 2 * 16 * 16 * voxels.itemsize


@given(st.lists(st.tuples(st.integers(-300, 300), st.integers(-2, 2)), max_size=20).map(tuple))
def test_moves_are_read_as_they_were_written(moves: Moves) -> None:
    assert parse_moves(moves_text(moves), len(moves)) == moves


@pytest.mark.parametrize("text", ["", "2x0,0", "4x0,0", "3x0", "x0,0", "999999999999x0,0", "3x0,0 1x1,1"])
def test_moves_of_other_numbers_of_slices_are_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_moves(text, 3)


def test_slices_with_little_in_common_are_refused(raw: Path) -> None:
    moves = ((0, 0),) * 15 + ((90, 0),)
    with pytest.raises(InputError, match=r"30% of their area is common to all \(slice z=15 lies farthest off\)"):
        plan_align(open_volume(raw), "memory://a", None, moves)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--plot", "a.jpg"], "give a name that ends with .png"),
        (["--out", "a.txt"], "give a name that ends with .csv"),
        (["--roi", "0:1,0:128,0:128"], "a single slice here"),
        (["--roi", "0:9,0:20,0:128"], "too small to measure drift on: 32 a side are needed"),
        (["--roi", "0:99,0:128,0:128"], "is empty or not inside the volume"),
        (["--level", "3"], "has no level 3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    raw: Path, tmp_path: Path, nrrn: Nrrn, words: list[str], says: str
) -> None:
    for output in ([], [tmp_path / "a.zarr"]):
        said = nrrn("align", raw, *output, *words, *(SERIAL if output else ()))
        assert said.status == 2
        assert says in said.err
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == [raw]


def test_an_output_that_is_there_is_refused_before_anything_is_measured(
    raw: Path, tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nrrn_pipeline.cli.align.measure_volume_drift", None)
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "notes.txt").write_text("mine")
    said = nrrn("align", raw, tmp_path / "a.zarr")
    assert said.status == 2
    assert "exists and was not made by nrrn" in said.err


def test_nan_is_named_with_its_slice(tmp_path: Path) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[5, 60, 60] = np.nan
    with pytest.raises(InputError, match="NaN or infinite voxels in slice z=5"):
        measure_drift(bare_zarr(tmp_path / "v.zarr", voxels))


def test_the_same_words_go_on_though_the_drift_is_drawn_by_now(raw: Path, tmp_path: Path, nrrn: Nrrn) -> None:
    words = ("align", raw, tmp_path / "a.zarr", "--plot", tmp_path / "d.png", "--out", tmp_path / "d.csv", *SERIAL)
    assert nrrn(*words).status == 0
    drawing = (tmp_path / "d.png").read_bytes()
    again = nrrn(*words)
    assert (again.status, again.out.count("\n")) == (0, 1)
    assert "not measured, told or drawn again" in again.err
    assert (tmp_path / "d.png").read_bytes() == drawing
