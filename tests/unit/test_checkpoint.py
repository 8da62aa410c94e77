"""Training that is interrupted goes on where it was, and ends as if it never had been."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nrrn_pipeline import InputError, RunError, TrainSettings, TrainWatch, storage, train
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights
from nrrn_pipeline.noise import Noise
from tests.support import bare_zarr, image_like, tiny_weights

SHAPE = (18, 64, 64)  # deep enough to hold slices out
TINY = TrainSettings(
    units=1, channels=4, steps=6, batch=2, crop=16, learning_rate=1e-2, device="cpu", loss="adjacent", checkpoint_s=0
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    clean = np.full(SHAPE, 120, np.uint8)
    return bare_zarr(tmp_path / "source.zarr", Noise(sigma=15, seed=1).added(clean, box_of(SHAPE)))


def until(last: int) -> Callable[[int, float], None]:
    """Ctrl-C after a step."""

    def on_step(step: int, _: float) -> None:
        if step == last:
            raise KeyboardInterrupt

    return on_step


def begin(source: Path, weights: Path, settings: TrainSettings, last: int = 4) -> Path:
    """The checkpoint of a training that was interrupted after step `last`."""
    with pytest.raises(KeyboardInterrupt):
        train(source, weights, settings, watch=TrainWatch(until(last)))
    assert not weights.exists()
    return weights.with_name(f"{weights.name}.checkpoint")


def same(a: Path, b: Path) -> bool:
    first, second = (load_weights(path).state_dict() for path in (a, b))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "recorrupted"},
        {"loss": "blind-spot"},
        {"loss": "auto"},
        {"network": "unet", "units": 1, "loss": "blind-spot"},
        {"network": "denoisenet", "units": 3, "loss": "recorrupted"},
        {"halve_every": 2},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_resumed_training_is_uninterrupted_training(source: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(TINY, **changes)
    whole = train(source, tmp_path / "whole.safetensors", settings)
    resumed, steps = tmp_path / "resumed.safetensors", []
    checkpoint = begin(source, resumed, settings)
    begin(source, resumed, settings, last=5)
    again = train(source, resumed, settings, watch=TrainWatch(lambda step, _: steps.append(step)))
    assert steps == [5, 6]  # a checkpoint is written once its step has been told
    assert same(tmp_path / "whole.safetensors", resumed)
    assert again["mean_loss_of_last_tenth"] == whole["mean_loss_of_last_tenth"]
    assert not checkpoint.exists()


def test_training_that_went_on_from_weights_resumes_from_these_alone(source: Path, tmp_path: Path) -> None:
    tiny_weights(tmp_path / "start.safetensors")
    settings = replace(TINY, start=str(tmp_path / "start.safetensors"))
    train(source, tmp_path / "whole.safetensors", settings)
    begin(source, tmp_path / "resumed.safetensors", settings)
    train(source, tmp_path / "resumed.safetensors", settings)
    assert same(tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors")
    begin(source, tmp_path / "other.safetensors", settings)
    tiny_weights(tmp_path / "start.safetensors", seed=1)
    with pytest.raises(InputError, match=r"SHA-256 of the weights it went on from was .*, now "):
        train(source, tmp_path / "other.safetensors", settings)


def test_a_checkpoint_is_written_no_more_often_than_asked(source: Path, tmp_path: Path) -> None:
    assert not begin(source, tmp_path / "w.safetensors", replace(TINY, checkpoint_s=3600)).exists()


def test_a_checkpoint_of_another_training_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    data = begin(source, weights, TINY).read_bytes()
    other = bare_zarr(tmp_path / "other.zarr", np.zeros((5, 64, 64), np.uint8))
    for used, settings, said in (
        (source, replace(TINY, steps=7), "is of another training: steps was 6, now 7"),
        (source, replace(TINY, loss="blind-spot", seed=3), "seed was 0, now 3; loss was adjacent, now blind-spot"),
        (other, TINY, r"source was .*source\.zarr, now .*other\.zarr; shape was \[18, 64, 64\], now \[5"),
    ):
        with pytest.raises(InputError, match=said):
            train(used, weights, settings)
        assert weights.with_name("w.safetensors.checkpoint").read_bytes() == data
    assert not weights.exists()


def test_a_checkpoint_of_more_volumes_is_refused(source: Path, tmp_path: Path) -> None:
    other = bare_zarr(tmp_path / "other.zarr", image_like((6, 64, 64)))
    weights = tmp_path / "w.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train([source, other], weights, TINY, watch=TrainWatch(until(4)))
    with pytest.raises(InputError, match=r"source of volume 1 was .*source\.zarr, now None"):
        train([source], weights, TINY)


def test_slices_left_out_are_part_of_what_was_asked(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 9, (8, 96, 96))
    noise[6] *= 3
    noisier = bare_zarr(tmp_path / "noisier.zarr", np.rint(120 + noise).astype(np.uint8))
    begin(noisier, tmp_path / "w.safetensors", replace(TINY, loss="auto"))
    with pytest.raises(InputError, match=r"slices left out for their noise was \[6\], now \[\]"):
        train(noisier, tmp_path / "w.safetensors", replace(TINY, loss="recorrupted"))


def test_a_damaged_checkpoint_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    checkpoint = begin(source, weights, TINY)
    data = checkpoint.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    wrong = {name: value for name, value in header.items() if name != "exp_avg.first.bias"}

    def with_header(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content + data[8 + length :]

    for damaged in (
        b"",
        b"nothing of the kind",
        data[:-20],
        data[:200],
        with_header(json.dumps(wrong).encode()),
        with_header(data[8 : 8 + length].replace(b"nrrn-training-2", b"nrrn-training-9")),
        with_header(data[8 : 8 + length].replace(b"exp_avg.first.bias", b"exp_avg.other.bias")),
        with_header(data[8 : 8 + length].replace(b"losses", b"losers")),
    ):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match=r"w\.safetensors\.checkpoint is damaged \(.*delete it, to begin anew"):
            train(source, weights, TINY)
    assert not weights.exists()


def test_a_full_disk_ends_training_and_leaves_the_checkpoint_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.safetensors"
    write_file, written = storage.write_file, []

    def write(url: str, data: bytes) -> None:
        if url.endswith(".checkpoint"):
            written.append(url)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        write_file(url, data)

    with monkeypatch.context() as full:
        full.setattr(storage, "write_file", write)
        with pytest.raises(RunError, match="cannot be written at step 3: No space left on device; make room and run"):
            train(source, weights, TINY)
    train(source, tmp_path / "whole.safetensors", TINY)
    steps: list[int] = []
    train(source, weights, TINY, watch=TrainWatch(lambda step, _: steps.append(step)))
    assert steps == [3, 4, 5, 6]
    assert same(weights, tmp_path / "whole.safetensors")
