"""Training that looks at slices which it does not learn from, keeps its best weights, and knows when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nrrn_pipeline import TrainSettings, train
from nrrn_pipeline.errors import DivergedError
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights, read_header
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.training.course import LOOKED_AT, LOOKS, Course
from nrrn_pipeline.training.fit import Training
from tests.crops import crops_of
from tests.support import bare_zarr

TINY = TrainSettings(units=1, channels=4, steps=40, batch=2, crop=16, learning_rate=1e-2, device="cpu", loss="adjacent")
SHAPE = (18, 48, 48)

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(seed: int) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def course(told: list[float] | None = None, held_out: int = 1, **changes: Any) -> Course:
    """Its looks find the losses that they are told."""
    made = Course(Training(replace(TINY, **changes)), [batch(100 + i) for i in range(held_out)])
    if told is not None:
        losses = iter(told)
        made.training.measure = lambda _: next(losses)  # type: ignore[method-assign]
    return made


def weights_of(made: Course) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.training.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_course_looks_twenty_times_and_at_its_end() -> None:
    for steps, at in ((40, [*range(2, 41, 2)]), (45, [*range(3, 46, 3)]), (22, [*range(2, 23, 2)]), (3, [1, 2, 3])):
        made = course(steps=steps)
        while not made.is_over:
            made.take(batch(made.training.taken))
        assert [step for step, _ in made.looks] == at
        assert len(made.losses) == steps
    assert LOOKS == 20


def test_a_look_is_the_loss_on_what_is_held_out_and_changes_nothing() -> None:
    watched, alone = course(held_out=3, steps=8), course(held_out=0, steps=8)
    for step in range(8):
        watched.take(batch(step))
        alone.take(batch(step))
    assert same(weights_of(watched), weights_of(alone))
    assert alone.looks == []
    expected = np.mean([watched.training.measure([each]) for each in watched.held_out])
    assert watched.looks[-1][1] == pytest.approx(expected)


@pytest.mark.parametrize("network", ["nrrn", "unet"])
def test_the_weights_are_those_of_the_best_look(network: str) -> None:
    loss = "adjacent" if network == "nrrn" else "blind-spot"
    made = course([3.0, 1.0, 4.0, 2.0], steps=4, network=network, loss=loss)
    best: dict[str, Tensor] = {}
    for step in range(4):
        made.take(batch(step))
        if step == 1:
            best = weights_of(made)
    last = weights_of(made)
    assert made.best_look() == (2, 1.0)
    assert same(dict(made.finished().state_dict()), best)
    assert not same(best, last)


def test_without_looks_the_last_weights_are_the_best() -> None:
    made = course(held_out=0, steps=3)
    for step in range(3):
        made.take(batch(step))
    last = weights_of(made)
    assert same(dict(made.finished().state_dict()), last)


@pytest.mark.parametrize(
    ("told", "patience", "steps"),
    [([5, 4, 3, 3, 3, 2, 2, 2, 2], 3, 9), ([5, 6, 7, 8], 2, 3), ([5, 6, 7, 8], 0, 4), ([5, 4, 3, 2], 1, 4)],
)
def test_training_stops_once_its_looks_find_nothing_better(told: list[float], patience: int, steps: int) -> None:
    made = course([*told, *[9.0] * 9] if patience else told, steps=4 if steps == 4 else 18, patience=patience)
    while not made.is_over:
        made.take(batch(made.training.taken))
    assert made.training.taken == steps


def test_a_course_that_is_restored_is_the_one_that_was_left() -> None:
    first, whole, again = course(steps=9), course(steps=9), course(steps=9)
    for step in range(5):
        first.take(batch(step))
    again.restore(5, 12.5, first.state())
    assert again.seconds >= 12.5
    for step in range(9):
        whole.take(batch(step))
        if step >= 5:
            again.take(batch(step))
    assert (again.losses, again.looks) == (whole.losses, whole.looks)
    assert same(again.best, whole.best)
    assert same(weights_of(again), weights_of(whole))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    clean = np.full(SHAPE, 120, np.uint8)
    return bare_zarr(tmp_path / "source.zarr", Noise(sigma=15, seed=1).added(clean, box_of(SHAPE)))


def test_the_record_says_what_was_held_out_and_how_it_went(source: Path, tmp_path: Path) -> None:
    record = train(source, tmp_path / "w.safetensors", TINY)
    assert record["volumes"][0]["held_out"] == [8]
    looks = record["validation"]["step_and_loss"]
    assert len(looks) == LOOKS
    assert record["validation"]["best_step"] == min(looks, key=lambda look: look[1])[0]
    assert record["steps_taken"] == 40
    short = bare_zarr(tmp_path / "short.zarr", np.random.default_rng(1).integers(0, 99, (6, 48, 48), np.uint8))
    assert "validation" not in train(short, tmp_path / "short.safetensors", TINY)


def diverging(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The loss of step `at` is no number."""
    from nrrn_pipeline.training import fit

    calls, real = iter(range(1, 10_000)), fit.adjacent_slices_loss

    def loss(first: Tensor, second: Tensor, triplet: Tensor) -> Tensor:
        found = real(first, second, triplet)
        if len(triplet) == TINY.batch and torch.is_grad_enabled() and next(calls) == at:
            return found * math.nan
        return found

    monkeypatch.setattr(fit, "adjacent_slices_loss", loss)


def test_a_look_at_what_is_no_number_is_the_end() -> None:
    made = course(steps=3)
    made.held_out = [batch(1) * 1e30]
    with pytest.raises(DivergedError, match=r"failed at step 1: the loss on slices held out is (inf|nan); use a lower"):
        made.take(batch(0))
    assert made.looks == []


def test_of_training_that_diverges_before_its_first_look_nothing_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, 2)
    with pytest.raises(DivergedError, match=r"failed at step 2: the loss is nan; use a lower --learning-rate$"):
        train(source, tmp_path / "w.safetensors", TINY)
    assert [*tmp_path.iterdir()] == [source]


def test_best_weights_that_cannot_be_written_do_not_hide_why_training_failed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, 31)
    (tmp_path / "w.last-good.safetensors").mkdir()
    with pytest.raises(DivergedError, match=r"at step 31: .* cannot be written to .*last-good.* \(Is a"):
        train(source, tmp_path / "w.safetensors", replace(TINY, checkpoint_s=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.zarr", "w.last-good.safetensors"]


@pytest.mark.parametrize("name", ["w.safetensors", "w"])
def test_of_training_that_diverges_the_last_good_weights_are_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = train(source, tmp_path / "whole.safetensors", TINY)
    diverging(monkeypatch, 31)
    with pytest.raises(
        DivergedError,
        match=r"at step 31: the loss is nan; use a lower --learning-rate; its best weights .* are in .*/w\.last-good",
    ):
        train(source, tmp_path / name, replace(TINY, checkpoint_s=0))
    kept = tmp_path / "w.last-good.safetensors"
    record = read_header(kept)["training"]
    assert record["steps_taken"] == 30
    assert "failed at step 31" in record["stopped"]
    assert record["validation"]["step_and_loss"] == [list(look) for look in whole["validation"]["step_and_loss"][:15]]
    assert not (tmp_path / name).exists()
    assert not (tmp_path / f"{name}.checkpoint").exists()  # it would lead there again
    assert all(torch.isfinite(tensor).all() for tensor in load_weights(kept).state_dict().values())


def test_looks_follow_what_clean_slices_would_tell(tmp_path: Path) -> None:
    """On real slices with noise: the less a look's loss, the nearer is the network to clean slices."""
    clean = np.load(Path(__file__).parents[2] / "workflows/demo/fib25_crop.npz")["volume"]
    noisy = Noise(sigma=30, seed=1).added(clean, box_of(clean.shape))
    source, truth = (bare_zarr(tmp_path / f"{name}.zarr", of) for name, of in (("noisy", noisy), ("clean", clean)))
    settings = replace(TINY, channels=8, steps=100, batch=4, crop=24, learning_rate=None, loss="recorrupted")
    apart: list[float] = []
    made = followed(source, truth, settings, lambda mse: apart.append(mse))
    looked = [loss for _, loss in made.looks]
    ranks = [np.argsort(np.argsort(each)) for each in (looked, apart)]
    followed_by = float(np.corrcoef(*ranks)[0, 1])
    print(f"rank correlation of {len(looked)} looks with the squared error: {followed_by:.3f}")
    assert followed_by > 0.9
    assert all(b < a for a, b in pairwise([apart[0], apart[5], apart[-1]]))


def followed(source: Path, truth: Path, settings: TrainSettings, on_look: Callable[[float], None]) -> Course:
    """A course, and at each look the squared distance from clean slices of the same crops."""
    from nrrn_pipeline.volume import open_volume
    from nrrn_pipeline.volume_noise import noise_of

    noisy, clean = open_volume(source), open_volume(truth)
    crops = crops_of(noisy, settings, noise_of(noisy).model)
    beside = crops_of(noisy, replace(settings, loss="clean"), clean=clean).validation(LOOKED_AT)
    made = Course(Training(settings), crops.validation(LOOKED_AT))
    batches = crops.batches()
    while not made.is_over:
        made.take(next(batches))
        if made.looks and made.looks[-1][0] == made.training.taken:
            with torch.no_grad():
                network = made.training.network
                each = [(network.estimate(b[:, :3]) - b[:, 3:]).square().mean().item() for b in beside]
            on_look(float(np.mean(each)))
    return made
