"""nrrn benchmark: ours beside other programs, run as programs; and the peers that we are measured against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from nrrn_pipeline import open_volume
from nrrn_pipeline.benchmark import make_volume, programs
from nrrn_pipeline.volume import read_box
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like, tiny_weights

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "tests" / "benchmarks" / "peers"
INSTALLED = ROOT / ".peers"
SMALL = ("--shape", "3,40,44", "--units", 1, "--channels", 4, "--device", "cpu")

needs_peers = pytest.mark.skipif(
    not (INSTALLED / "ready").exists() and "NRRN_ALL_PARTS" not in os.environ,
    reason="vEMden and MONAI are not in .peers: make peers",
)


def peer(name: str, *words: str) -> str:
    path = os.pathsep.join(map(str, (INSTALLED, ROOT)))
    return f"{name}=env PYTHONPATH={path} {sys.executable} {PEERS / name.replace('-', '_')}.py {' '.join(words)}"


def test_programs_are_timed_on_one_volume_and_their_outputs_compared(tmp_path: Path, nrrn: Nrrn) -> None:
    words = ("--shape", "20,40,300", *SMALL[2:])  # chunks of which each has neighbours along z and x
    said = nrrn("benchmark", *words, "--out", tmp_path / "b", "--against", peer("map-overlap"))
    assert said.status == 0, said.err
    header, ours, other = (line.split("\t") for line in said.out.splitlines()[:3])
    assert header[:3] == ["program", "seconds", "Mvoxel/s"]
    assert (ours[0], other[0]) == ("nrrn", "map-overlap")
    found = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    assert [each["name"] for each in found["programs"]] == ["nrrn", "map-overlap"]
    for each in found["programs"]:
        assert each["failure"] == ""
        assert each["voxels_per_s"] == pytest.approx(20 * 40 * 300 / each["seconds"])
        assert each["peak_bytes"] > 50e6
    assert found["programs"][1]["largest_difference"] <= 1
    assert found["programs"][1]["far"] == 0
    alone = found["network_alone"]
    ((before, after),) = alone["before_and_after_each_turn"]
    assert alone["voxels_per_s"] == pytest.approx((before + after) / 2)
    assert alone["efficiency"] == pytest.approx(found["programs"][0]["voxels_per_s"] / alone["voxels_per_s"])
    assert alone["efficiency_by_turn"] == [alone["efficiency"]]
    table = (tmp_path / "b" / "benchmark.md").read_text()
    assert table.startswith("| program | seconds |")
    assert "- network: 1 unit, 4 channels" in table


def test_programs_take_turns_and_the_best_of_each_counts(tmp_path: Path, nrrn: Nrrn) -> None:
    copy = f"sh -c 'echo >> {tmp_path}/ran; test ! -e $2 && cp -r {tmp_path}/b/nrrn.zarr $2' sh"
    fails = f"sh -c 'echo >> {tmp_path}/failed; exit 3'"
    words = ("--turns", 3, "--out", tmp_path / "b", "--against", f"copy={copy}", "--against", f"fails={fails}")
    said = nrrn("benchmark", *SMALL, *words)
    assert said.err.splitlines()[-1] == "nrrn: fails failed: see the table"
    found = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    ours, copied, _ = found["programs"]
    alone = found["network_alone"]
    around = [sum(speeds) / 2 for speeds in alone["before_and_after_each_turn"]]
    shares = [3 * 40 * 44 / seconds / speed for seconds, speed in zip(ours["turns_s"], around, strict=True)]
    assert alone["efficiency_by_turn"] == pytest.approx(shares)
    assert alone["efficiency"] == pytest.approx(sum(shares) / 3)
    for each in (ours, copied):
        assert len(each["turns_s"]) == 3
        assert each["seconds"] == min(each["turns_s"])
    assert copied["largest_difference"] == 0
    assert (tmp_path / "ran").read_text() == "\n" * 3
    assert (tmp_path / "failed").read_text() == "\n", "what fails is not tried again"


def test_a_program_that_fails_or_gives_something_else_is_named(tmp_path: Path, nrrn: Nrrn) -> None:
    source, weights = (
        bare_zarr(tmp_path / "raw.zarr", image_like((3, 40, 44))),
        tiny_weights(tmp_path / "w.safetensors"),
    )
    other = bare_zarr(tmp_path / "other.zarr", np.zeros((2, 40, 44), np.uint8))
    off = bare_zarr(tmp_path / "off.zarr", np.zeros((3, 40, 44), np.uint8))
    against = {
        "dies": f"{sys.executable} -c 'print(1); raise SystemExit(\"no more\")'",
        "lazy": "true",
        "small": f"sh -c 'cp -r {other} $2' sh",
        "wrong": f"sh -c 'cp -r {off} $2' sh",
    }
    words = [word for name, command in against.items() for word in ("--against", f"{name}={command}")]
    said = nrrn("benchmark", source, "--weights", weights, "--out", tmp_path / "b", "--device", "cpu", *words)
    assert said.status == 1
    assert said.err.splitlines()[-1] == "nrrn: dies, lazy, small failed: see the table"
    lines = {line.split("\t")[0]: line for line in said.out.splitlines()}
    assert "exit status 1: no more" in lines["dies"]
    assert "no volume at" in lines["lazy"]
    assert "its output is uint8 of shape (2, 40, 44), not uint8 of (3, 40, 44)" in lines["small"]
    wrong = json.loads((tmp_path / "b" / "benchmark.json").read_text())["programs"][4]
    expected = open_volume(tmp_path / "b" / "nrrn.zarr")
    voxels = read_box(expected, expected.box)
    assert wrong["largest_difference"] == voxels.max()
    assert wrong["far"] == pytest.approx((voxels > 1).mean())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--against", "lab"), "--against 'lab' is not understood: expected NAME=COMMAND"),
        (("--against", "lab='x"), "is not understood: No closing quotation"),
        (("--against", "nrrn=true"), "the name of letters and digits, not nrrn"),
        (("--against", "a=true", "--against", "a=false"), "programs need names of their own, not a, a"),
        (("--against", "lab=/no/such/program"), "lab: there is no command /no/such/program"),
        (("--shape", "0,4,4"), "shape 0,4,4 has no voxels"),
        (("--shape", "4,4"), "--shape '4,4' is not understood"),
        (("--units", "0"), "units 0 is not possible"),
        (("--turns", "0"), "--turns 0: nothing would run; use 1 or more"),
    ],
)
def test_bad_words_are_one_line(tmp_path: Path, nrrn: Nrrn, words: tuple[str, ...], message: str) -> None:
    said = nrrn("benchmark", *SMALL, *words, "--out", tmp_path / "b")
    assert said.status == 2
    assert not (tmp_path / "b").exists()
    assert message in said.err.splitlines()[-1]


def test_what_is_there_is_not_written_over(tmp_path: Path, nrrn: Nrrn) -> None:
    make_volume(tmp_path / "b" / "source.ome.zarr", (3, 20, 20))
    said = nrrn("benchmark", *SMALL, "--out", tmp_path / "b")
    assert said.status == 2
    assert "source.ome.zarr exists: choose another place" in said.err


def test_the_memory_of_all_processes_counts_and_what_they_share_once(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; kept = b'x' * 200_000_000; pid = os.fork(); "
        "own = b'y' * 100_000_000 if pid == 0 else b''; time.sleep(1.5)"
    )
    found = programs.run(programs.Program("two", (sys.executable, "-c", code)), "a", "b", "c")
    assert found.failure == ""
    assert 300e6 < found.peak_bytes < 360e6
    assert found.seconds > 1.5


def test_interrupted_it_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupted(pid: int) -> int:
        started.extend(process.pid for process in programs._family(pid))
        if len(started) < 2:
            return 0
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "memory_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        programs.run(programs.Program("long", ("sh", "-c", "sleep 60; true")), "a", "b", "c")
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started):
        assert time.monotonic() < deadline  # killed they are, but a busy machine takes its time
        time.sleep(0.05)


@needs_peers
@pytest.mark.parametrize(
    ("name", "words", "differing"),
    [("vemden", (), 0.0), ("map-overlap", ("--theirs",), 0.0), ("sliding-window", (), 0.05)],
)
def test_the_peers_give_our_output(
    name: str, words: tuple[str, ...], differing: float, tmp_path: Path, nrrn: Nrrn
) -> None:
    """MONAI averages what its windows' edges spoil with what others have there."""
    sizes = ("--shape", "3,300,280", "--units", 1, "--channels", 4, "--device", "cpu")
    said = nrrn("benchmark", *sizes, "--out", tmp_path / "b", "--against", peer(name, *words))
    assert said.status == 0, said.err + said.out
    found = json.loads((tmp_path / "b" / "benchmark.json").read_text())["programs"][1]
    assert found["far"] <= differing
    assert (found["largest_difference"] <= 1) == (name != "sliding-window")


@needs_peers
def test_all_that_is_measured_of_a_gpu_runs_to_its_end_without_one(tmp_path: Path) -> None:
    words = [sys.executable, PEERS.parent / "gpu.py", "--small", "--vemden", INSTALLED, "--out", tmp_path / "gpu.json"]
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=alone, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["off from float64, float32"]["rms"] < 1e-6
    assert found["warnings"]["said"] == []
    speeds = [facts["voxels_per_s"] for facts in found.values() if "voxels_per_s" in facts]
    assert len(speeds) == 3 * 2 + 1, "three precisions, two sizes, and the authors' network"
    assert min(speeds) > 0
