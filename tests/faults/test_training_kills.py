"""Training that is killed, at any moment, goes on from its checkpoint and gives the weights of one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.report.scalars import LEARNT
from tests.event_files import shown
from tests.support import bare_zarr

KILLS = int(os.environ.get("NRRN_KILLS", "3"))
STEPS = 150
TRAIN = f"""
import sys
from nrrn_pipeline import TrainSettings, TrainWatch, train
from nrrn_pipeline.report.scalars import Scalars
settings = TrainSettings(units=1, channels=4, steps={STEPS}, batch=2, crop=32, device="cpu", checkpoint_s=0)
scalars = Scalars(sys.argv[2] + ".board", settings)

def told(step, loss):
    scalars.step(step, loss)
    print(step, flush=True)

train(sys.argv[1], sys.argv[2], settings, TrainWatch(told, scalars.look))
"""


def training(source: Path, weights: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, str(source), str(weights)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def steps_of(process: subprocess.Popen[str], kill_after_s: float | None) -> list[int]:
    """The steps that it took; killed so long after its first one."""
    assert process.stdout is not None
    first = process.stdout.readline()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        process.kill()
    rest = process.stdout.read().split()
    process.stdout.close()
    assert process.wait() == (0 if kill_after_s is None else -9)
    return [int(step) for step in [first, *rest]]


def test_killed_training_gives_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    shape = (18, 64, 64)  # deep enough to hold slices out
    noisy = Noise(sigma=15, seed=1).added(np.full(shape, 120, np.uint8), box_of(shape))
    source = bare_zarr(tmp_path / "source.zarr", noisy)
    assert steps_of(training(source, tmp_path / "whole.safetensors"), None) == [*range(1, STEPS + 1)]
    moments, reached = random.Random(4), 0
    for _ in range(KILLS):
        taken = steps_of(training(source, tmp_path / "killed.safetensors"), moments.uniform(0, 0.3))
        assert taken[0] in (reached, reached + 1)  # at most the step whose checkpoint was being written, again
        reached = taken[-1]
        assert reached < STEPS
    rest = steps_of(training(source, tmp_path / "killed.safetensors"), None)
    assert rest[0] in (reached, reached + 1)
    assert rest[-1] == STEPS
    whole, killed = (load_weights(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
    boards = [shown(tmp_path / f"{name}.safetensors.board") for name in ("whole", "killed")]
    assert boards[0] == boards[1]
    assert [*boards[0][LEARNT]] == [*range(1, STEPS + 1)]
    assert not (tmp_path / "killed.safetensors.checkpoint").exists()
