"""What a training tells TensorBoard: the losses of its record, each step once, however often it was interrupted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrrn_pipeline import InputError, RunError, TrainSettings, TrainWatch, train
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.report.scalars import HELD_OUT, LEARNT, RATE, Scalars
from tests.commands import Nrrn, caller
from tests.event_files import events, shown
from tests.support import bare_zarr

SHAPE = (18, 64, 64)  # deep enough to hold slices out
TINY = TrainSettings(
    units=1, channels=4, steps=8, batch=2, crop=16, learning_rate=1e-2, device="cpu", loss="adjacent", checkpoint_s=0
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    clean = np.full(SHAPE, 120, np.uint8)
    return bare_zarr(tmp_path / "source.zarr", Noise(sigma=15, seed=1).added(clean, box_of(SHAPE)))


def told_of(record: dict[str, Any]) -> dict[str, dict[int, float]]:
    """What TensorBoard is to show of a training that has a record, as 32-bit numbers."""
    looks = record["validation"]["step_and_loss"]
    rates = [(step, TINY.rate_of(step)) for step in range(1, record["steps_taken"] + 1)]
    tags = {LEARNT: record["step_and_mean_loss"], HELD_OUT: looks, RATE: rates}
    return {tag: {step: float(np.float32(value)) for step, value in of} for tag, of in tags.items()}


def test_tensorboard_shows_the_losses_of_the_record(source: Path, tmp_path: Path) -> None:
    scalars = Scalars(str(tmp_path / "new/board"), TINY)
    assert not (tmp_path / "new").exists()  # nothing before the first step
    record = train(source, tmp_path / "w.safetensors", TINY, TrainWatch(scalars.step, scalars.look))
    assert len(record["validation"]["step_and_loss"]) == 8
    assert shown(tmp_path / "new/board") == told_of(record)


def test_an_interrupted_training_goes_on_with_the_same_steps(source: Path, tmp_path: Path) -> None:
    """What was told after the last checkpoint is told again, and shown once; what was told is there at once."""
    board = tmp_path / "board"

    def until(last: int) -> None:
        scalars = Scalars(str(board), TINY)

        def look(step: int, loss: float) -> None:
            scalars.look(step, loss)
            assert events(max(board.iterdir()))[-1].step == step
            if step == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(source, tmp_path / "w.safetensors", TINY, TrainWatch(scalars.step, look))

    for last in (3, 5):
        until(last)
    scalars = Scalars(str(board), TINY)
    record = train(source, tmp_path / "w.safetensors", TINY, TrainWatch(scalars.step, scalars.look))
    first, second, third = (events(file) for file in sorted(board.iterdir()))
    assert [found[-1].step for found in (first, second, third)] == [3, 5, 8]
    assert [found[1].step for found in (first, second, third)] == [1, 3, 5]
    assert shown(board) == told_of(record)


def test_the_rate_is_the_one_that_each_step_is_taken_with() -> None:
    assert [replace(TINY, halve_every=2).rate_of(step) for step in range(1, 6)] == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3]
    assert TINY.rate_of(1) == pytest.approx(1e-2 / 20)


def test_a_file_that_cannot_grow_ends_training_in_one_line(tmp_path: Path) -> None:
    scalars = Scalars(str(tmp_path / "board"), TINY)
    scalars.step(1, 0.5)
    (file,) = (tmp_path / "board").iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(RunError, match=r"for TensorBoard to .*board \(Is a directory\): make room, or leave it out"):
        scalars.step(2, 0.5)


@pytest.mark.parametrize("name", ["", "s3://bucket/board"])
def test_the_folder_is_on_disk(name: str) -> None:
    with pytest.raises(InputError, match="is no folder on disk"):
        Scalars(name, TINY)


def test_the_command_line_writes_them_and_shows_the_latest_of_both(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--units", 1, "--channels", 4, "--steps", 4, "--batch", 2, "--crop", 16, "--loss", "adjacent")
    nrrn: Nrrn = caller(monkeypatch, capsys)
    said = nrrn("train", source, "--out", tmp_path / "w.safetensors", *words, "--tensorboard", tmp_path / "board")
    assert said.status == 0, said.err
    looks = shown(tmp_path / "board")[HELD_OUT]
    assert [*looks] == [1, 2, 3, 4]
    assert f"held out {looks[4]:.4f}" in said.err


@pytest.mark.parametrize("lacks", ["library", "folder"])
def test_what_is_missing_is_said_before_anything_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lacks: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("nrrn_pipeline.cli.training.train_weights", None)  # called, it would be an error
    if lacks == "library":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    nrrn = caller(monkeypatch, capsys)
    said = nrrn("train", source, "--out", tmp_path / "w.safetensors", "--tensorboard", tmp_path / "file/board")
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert ("pip install nrrn-pipeline[tensorboard]" if lacks == "library" else "cannot be written to") in line
