"""Real processes that train one network together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nrrn_pipeline import TrainSettings, train
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights, read_header
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.training.train import TRIED
from tests.support import bare_zarr

SHAPE = (18, 48, 48)  # deep enough to hold slices out
LOSSES = ("adjacent", "recorrupted", "blind-spot")
TINY = TrainSettings(units=1, channels=4, steps=20, batch=4, crop=20, device="cpu", loss="adjacent", checkpoint_s=0)
WIDE = {"learning_rate": 1.0, "patience": 1, "steps": 40}  # soon no better

TRAIN = """
import json, math, os, sys, time, warnings
from dataclasses import replace
warnings.simplefilter("error")
from nrrn_pipeline import NrrnError, TrainWatch, train
from nrrn_pipeline.training import fit
from tests.integration.test_training_together import TINY

rank, real = int(os.environ["RANK"]), fit.adjacent_slices_loss
for name, changes in json.loads(sys.argv[1]).items():
    calls = iter(range(10**6))
    bad_rank, bad_call = changes.pop("nan at rank and call", (None, None))

    def loss(*given):
        return real(*given) * (math.nan if rank == bad_rank and next(calls) == bad_call else 1)

    fit.adjacent_slices_loss = loss
    settings = replace(TINY, seed=rank if changes.pop("differ", False) else 0, **changes)
    told = []

    def on_step(step, loss):
        told.append(step)
        if name == "killed":
            print(step, flush=True)
            time.sleep(0.1)  # not over before it is killed

    try:
        outcome = {"record": train("source.zarr", f"{name}.safetensors", settings, TrainWatch(on_step))}
    except NrrnError as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name, "told": told} | outcome), flush=True)
"""


def begun(folder: Path, trainings: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", TRAIN, json.dumps(trainings)]
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[dict[str, dict[str, Any]]]:
    """What each of them said at its trainings' ends, by name."""
    said = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = ([json.loads(line) for line in lines if line.startswith("{")] for lines in said)
    return [{each["name"]: each for each in lines} for lines in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("together")
    bare_zarr(made / "source.zarr", Noise(sigma=15, seed=1).added(np.full(SHAPE, 120, np.uint8), box_of(SHAPE)))
    return made


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Trainings one after the other in two processes; what each process said of them."""
    trainings = {loss: {"loss": loss} for loss in LOSSES} | {
        "bfloat16": {"precision": "bfloat16"},
        "auto": {"units": "auto", "loss": "recorrupted"},
        "early": WIDE,
        "diverged": {"nan at rank and call": (1, 30)},
        "diverged-at-once": {"nan at rank and call": (0, 0)},
        "differ": {"differ": True},
    }
    return ended(begun(folder, trainings))


Trained = list[dict[str, dict[str, Any]]]


def assert_same_but_for_rounding(one: Path, other: Path, rtol: float = 1e-4) -> None:
    weights, others = (load_weights(path).state_dict() for path in (one, other))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_what_one_would(trained: Trained, folder: Path, tmp_path: Path, loss: str) -> None:
    alone = train(folder / "source.zarr", tmp_path / "one.safetensors", replace(TINY, loss=loss))
    assert_same_but_for_rounding(tmp_path / "one.safetensors", folder / f"{loss}.safetensors")
    record = trained[0][loss]["record"]
    assert record["processes"] == 2
    assert record["mean_loss_of_last_tenth"] == pytest.approx(alone["mean_loss_of_last_tenth"], rel=1e-4)
    for found, expected in zip(
        record["validation"]["step_and_loss"], alone["validation"]["step_and_loss"], strict=True
    ):
        assert found == pytest.approx(list(expected), rel=1e-4)


@pytest.mark.parametrize("name", [*LOSSES, "bfloat16", "auto", "early"])
def test_one_of_them_writes_and_tells_and_all_return_the_record(trained: Trained, folder: Path, name: str) -> None:
    first, other = (of[name]["record"] for of in trained)
    assert {**first, "seconds": 0} == {**other, "seconds": 0}
    assert read_header(folder / f"{name}.safetensors")["training"] == first
    assert trained[0][name]["told"] == [*range(1, first["steps_taken"] + 1)]
    assert trained[1][name]["told"] == []


def test_they_stop_early_together(trained: Trained) -> None:
    assert trained[0]["early"]["record"]["steps_taken"] < WIDE["steps"]


def test_a_loss_that_is_no_number_in_one_of_them_ends_all(trained: Trained, folder: Path) -> None:
    errors = [of["diverged"]["error"] for of in trained]
    assert errors[0] == errors[1]
    assert "DivergedError: training failed at step " in errors[0]
    assert f"its best weights until then are in {folder / 'diverged.last-good.safetensors'}" in errors[0]
    assert read_header(folder / "diverged.last-good.safetensors")["training"]["processes"] == 2
    for of in trained:
        error = of["diverged-at-once"]["error"]
        assert error == "DivergedError: training failed at step 1: the loss is nan; use a lower --learning-rate"


def test_processes_that_were_asked_for_different_things_are_refused(trained: Trained) -> None:
    for of in trained:
        assert "InputError: the 2 processes do not see the same (step 0, step 0 of the" in of["differ"]["error"]


def test_nothing_else_is_left(trained: Trained, folder: Path) -> None:
    names = {f"{name}.safetensors" for name in (*LOSSES, "bfloat16", "auto", "early", "diverged.last-good")}
    elsewhere = ("killed", "torchrun", "refused")  # of other tests
    left = {path.name for path in folder.iterdir() if not path.name.startswith(elsewhere)}
    assert left == names | {"source.zarr"}


def test_one_that_is_killed_ends_the_other_and_all_go_on_from_the_checkpoint(trained: Trained, folder: Path) -> None:
    for rank, step in ((0, 5), (1, 10)):
        processes = begun(folder, {"killed": {}})
        assert processes[0].stdout is not None
        assert next((line for line in processes[0].stdout if int(line) >= step), None) is not None
        processes[rank].kill()
        said = processes[1 - rank].communicate(timeout=60)[0]
        assert "LostError: this process lost the others that it trains with" in said
        processes[rank].communicate()
        assert processes[rank].returncode == -signal.SIGKILL
        assert (folder / "killed.safetensors.checkpoint").exists()
    first, _ = ended(begun(folder, {"killed": {}}))
    assert first["killed"]["told"][0] >= 10
    assert first["killed"]["told"][-1] == TINY.steps
    whole, killed = (load_weights(folder / f"{name}.safetensors").state_dict() for name in ("adjacent", "killed"))
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
    assert not (folder / "killed.safetensors.checkpoint").exists()


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "nrrn_pipeline.cli", "train", "source.zarr", *arguments]
    return subprocess.run([*command, *program], cwd=folder, capture_output=True, text=True, check=False, timeout=300)


SMALL = ("--units", "1", "--channels", "4", "--crop", "20", "--loss", "adjacent", "--device", "cpu")


@pytest.mark.usefixtures("one_thread")
def test_torchrun_trains_by_the_command_line(trained: Trained, folder: Path) -> None:
    done = torchrun(folder, *SMALL, "--steps", "20", "--batch", "4", "--out", "torchrun.safetensors")
    assert done.returncode == 0, done.stderr
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["torchrun.safetensors:", "on"]
    assert done.stderr.count("20/20") <= 1
    assert_same_but_for_rounding(folder / "adjacent.safetensors", folder / "torchrun.safetensors")


def test_what_is_refused_is_said_once_under_torchrun(folder: Path) -> None:
    done = torchrun(folder, *SMALL, "--batch", "3", "--out", "refused.safetensors")
    assert done.returncode == 1  # torchrun's own
    said = [line for line in done.stderr.splitlines() if line.startswith("nrrn: ")]
    assert said == ["nrrn: batch 3 cannot be shared by 2 processes: use a multiple of 2, such as 2 or 4"]
    assert "exitcode  : 2" in done.stderr
    assert "nrrn_pipeline/" not in done.stderr  # no traceback of ours
    assert not [*folder.glob("refused*")]


@pytest.mark.usefixtures("one_thread")
def test_together_they_choose_the_units_that_one_would(trained: Trained, folder: Path, tmp_path: Path) -> None:
    alone = train(folder / "source.zarr", tmp_path / "one.safetensors", replace(TINY, units="auto", loss="recorrupted"))
    both = [each["auto"]["record"] for each in trained]
    assert both[0]["settings"]["units"] == both[1]["settings"]["units"] == alone["settings"]["units"]
    assert both[0][TRIED] == pytest.approx(alone[TRIED], rel=1e-4)
