"""What commands say to scripts, to logs and to nobody: --json, --quiet, and progress where there is no terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrrn_pipeline import denoise, open_volume, showing_progress
from nrrn_pipeline.cli import terminal
from nrrn_pipeline.cli.terminal import LogLines, print_json
from nrrn_pipeline.options import Options
from nrrn_pipeline.slabs import Layout
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like, tiny_weights

LAYOUT = ("--chunk", "4,32,32", "--shard", "4,32,32")  # of four slabs


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """Of a run."""
    bare_zarr(tmp_path / "raw.zarr", image_like((4, 64, 64)))
    tiny_weights(tmp_path / "w.safetensors")
    paths = (f"{tmp_path}/raw.zarr", f"{tmp_path}/out.zarr", "--weights", f"{tmp_path}/w.safetensors")
    return (*paths, "--cluster", "serial", *LAYOUT)


def facts(nrrn: Nrrn, *given: object, status: int = 0) -> dict[str, Any]:
    """All that a command says on standard output, which is one line of JSON."""
    said = nrrn(*given, "--json")
    assert said.status == status, said.err
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_run_and_what_is_known_of_it_as_json(words: tuple[str, ...], nrrn: Nrrn, tmp_path: Path) -> None:
    output = f"{tmp_path}/out.zarr"
    planned = facts(nrrn, "plan", *words)
    assert (planned["slabs"], planned["settings"]["shard"]) == (4, [4, 32, 32])
    done = facts(nrrn, "denoise", *words)
    assert (done["output"], done["state"], done["slabs"], done["resumed"]) == (output, "complete", 4, 0)
    assert done["voxels"] == 4 * 64 * 64
    assert done["voxels_per_second"] == pytest.approx(done["voxels"] / done["seconds"])
    assert facts(nrrn, "denoise", *words)["resumed"] == 4
    known = facts(nrrn, "status", output)
    assert (known["done"], known["total"], known["failed"]) == (4, 4, {})
    described = facts(nrrn, "info", output)
    assert (described["shape"], described["dtype"], described["levels"]) == ([4, 64, 64], "uint8", 1)
    assert described["nrrn"]["state"] == "complete"
    assert facts(nrrn, "info", tmp_path / "w.safetensors")["units"] == 1
    assert facts(nrrn, "repair", output) == {"problems": []}


def test_what_is_wrong_as_json(words: tuple[str, ...], nrrn: Nrrn, tmp_path: Path) -> None:
    facts(nrrn, "denoise", *words)
    assert facts(nrrn, "verify", f"{tmp_path}/out.zarr") == {"whole": True, "read": False, "problems": []}
    (tmp_path / "out.zarr/0/c/0/1/1").unlink()
    found = facts(nrrn, "verify", f"{tmp_path}/out.zarr", status=1)
    assert (found["whole"], len(found["problems"])) == (False, 1)
    assert facts(nrrn, "repair", f"{tmp_path}/out.zarr")["done"] == 1


def test_noise_ingest_and_batch_as_json(words: tuple[str, ...], nrrn: Nrrn, tmp_path: Path) -> None:
    noisy = np.random.default_rng(0).normal(120, 20, (4, 64, 64)).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "noisy.npy", noisy)
    given = (tmp_path / "noisy.npy", tmp_path / "noisy.zarr", "--voxel-nm", "8,4,4", "--cluster", "serial")
    taken = facts(nrrn, "ingest", *given)
    assert (taken["shape"], taken["voxel_nm"], taken["state"]) == ([4, 64, 64], [8, 4, 4], "complete")
    measured = facts(nrrn, "noise", tmp_path / "noisy.zarr")
    assert len(measured["sigma"]) == 4
    assert measured["white"] is True
    assert measured["loss"] == "recorrupted"
    (tmp_path / "jobs.csv").write_text(f"source,output\n{tmp_path}/noisy.zarr,{tmp_path}/a.zarr\nno.zarr,b.zarr\n")
    given = ("batch", tmp_path / "jobs.csv", "--weights", tmp_path / "w.safetensors", "--cluster", "serial")
    first, second = facts(nrrn, *given, status=1)["volumes"]
    assert (first["state"], second["state"]) == ("done", "failed")
    assert "no.zarr" in second["reason"]


def test_quiet_says_results_and_errors_alone(words: tuple[str, ...], nrrn: Nrrn, tmp_path: Path) -> None:
    said = nrrn("denoise", *words, "--quiet")
    assert (said.status, said.err) == (0, "")
    assert "complete, 4 slabs" in said.out
    assert "4 slabs on this process" in nrrn("denoise", *words, "--overwrite").err  # for this command it was
    assert "no.zarr" in nrrn("info", tmp_path / "no.zarr", "-q").err


def test_in_a_log_progress_is_a_line_a_stage(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "nrrn_pipeline.cli", "denoise", *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    where, statistics, denoising = said.stderr.splitlines()
    assert where.startswith("4 slabs on ")
    assert statistics.startswith("statistics: ")
    assert denoising.startswith("denoising: 4 of 4, ")


def test_in_a_log_what_takes_long_says_how_far_it_is_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(second) for second in range(10**6))
    bar = LogLines()
    monkeypatch.setattr(bar, "get_time", lambda: next(clock))
    task = bar.add_task("denoising", total=1000, speed="")
    for done in range(1001):
        bar.update(task, completed=done, speed="3 million voxels/s")
    lines = capsys.readouterr().err.splitlines()
    assert 1000 / terminal.LINE_EVERY_S < len(lines) < 10 * 1000 / terminal.LINE_EVERY_S
    assert all(line.startswith("denoising: ") and " of 1000, 3 million voxels/s" in line for line in lines)
    assert "left" in lines[1]
    assert lines[-1] == "denoising: 1000 of 1000, 3 million voxels/s"


def test_a_notebook_sees_how_a_run_goes(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(cluster="serial", layout=Layout(chunk=(4, 32, 32), shard=(4, 32, 32)))
    with showing_progress() as watch:
        denoise(words[0], words[1], words[3], options, watch)
    assert "denoising: 4 of 4" in capsys.readouterr().err
    assert open_volume(words[1]).shape == (4, 64, 64)


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": {2, 1}}, "e": Path("x"), "f": None, "g": True})
    assert json.loads(capsys.readouterr().out) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [1, 2]},
        "e": "x",
        "f": None,
        "g": True,
    }


def test_in_a_log_what_is_done_is_said_once_unless_there_is_news(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LogLines()
    task = bar.add_task("verifying", total=2, speed="")
    for _ in range(3):
        bar.update(task, completed=2, total=2)
    bar.update(task, completed=2, speed="held out 2.1")
    assert capsys.readouterr().err.splitlines() == ["verifying: 2 of 2", "verifying: 2 of 2, held out 2.1"]
