"""Units auto: as many as slices that are held out show to be worth it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrrn_pipeline import TrainSettings, train
from nrrn_pipeline.errors import DivergedError, InputError, RunError
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.network import load_weights
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.training import depth
from nrrn_pipeline.training.depth import HELD_OUT_BATCHES, MOST, SHARE, Trials, chosen
from nrrn_pipeline.training.fit import Training
from nrrn_pipeline.training.train import TRIED
from nrrn_pipeline.training.triplets import Triplets
from nrrn_pipeline.volume import open_volume
from tests.crops import crops_of
from tests.support import bare_zarr

TINY = TrainSettings(units="auto", channels=4, steps=40, batch=2, crop=16, device="cpu", loss="recorrupted")
SHAPE = (18, 48, 48)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    clean = np.full(SHAPE, 120, np.uint8)
    return bare_zarr(tmp_path / "source.zarr", Noise(sigma=15, seed=1).added(clean, box_of(SHAPE)))


@pytest.fixture
def crops(source: Path) -> Triplets:
    return crops_of(open_volume(source), TINY, NoiseModel(0.0, 225.0, 1.0))


def told(monkeypatch: pytest.MonkeyPatch, *means: float | DivergedError) -> list[int]:
    """Trials find these losses, one after the other, each batch about as much; the units that they are asked for."""
    asked: list[int] = []
    left: Iterator[float | DivergedError] = iter(means)

    def losses(settings: TrainSettings, *_: Any) -> list[float]:
        asked.append(settings.architecture.units)
        mean = next(left)
        if isinstance(mean, DivergedError):
            raise mean
        return [mean + 0.001 * (i % 3) for i in range(HELD_OUT_BATCHES)]

    monkeypatch.setattr(depth, "_losses", losses)
    return asked


@pytest.mark.parametrize(
    ("means", "tried", "taken"),
    [
        ([5.0, 5.0], 2, 1),
        ([5.0, 4.0, 4.0], 3, 2),
        ([5.0, 4.0, 4.5], 3, 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0], MOST, MOST),
        ([5.0, DivergedError("no number")], 1, 1),
    ],
)
def test_units_are_added_as_long_as_they_help(
    crops: Triplets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, means: list[Any], tried: int, taken: int
) -> None:
    asked = told(monkeypatch, *means)
    found = Trials(str(tmp_path / "w.trials"), {}).run(crops)
    assert asked == [*range(1, len(means) + 1)]
    assert (len(found), chosen(found)) == (tried, taken)


def test_a_unit_helps_if_it_does_for_sure() -> None:
    random = np.random.default_rng(1)
    before = 5 + random.standard_normal(HELD_OUT_BATCHES)  # batches differ far more than what a unit changes
    for gain, wavering, taken in ((0.1, 0.05, 2), (0.1, 2.0, 1), (-0.1, 0.05, 1), (0.0, 0.0, 1)):
        after = before - gain + wavering * random.standard_normal(HELD_OUT_BATCHES)
        assert chosen([before.tolist(), after.tolist()]) == taken
    assert chosen([before.tolist()]) == 1
    assert chosen([]) == 0


def test_trials_that_were_killed_go_on_with_the_next(
    crops: Triplets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, seen = Trials(str(tmp_path / "w.trials"), {"seed": 0}), []
    told(monkeypatch, 5.0, 4.0)
    with pytest.raises(StopIteration):  # at the third
        trials.run(crops, on_trial=lambda units, loss: seen.append((units, round(loss, 1))))
    assert seen == [(1, 5.0), (2, 4.0)]
    asked = told(monkeypatch, 4.0)
    assert chosen(trials.run(crops)) == 2
    assert asked == [3]
    asked = told(monkeypatch, 3.0, 3.0)
    assert chosen(replace(trials, asked={"seed": 1}).run(crops)) == 1  # those were of another training
    assert asked == [1, 2]


def test_a_network_of_one_unit_that_cannot_be_trained_ends_it(
    crops: Triplets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, DivergedError("failed at step 2"))
    with pytest.raises(DivergedError, match="failed at step 2"):
        Trials(str(tmp_path / "w.trials"), {}).run(crops)


def test_a_trial_is_a_part_of_a_training_and_leaves_no_trace(source: Path, tmp_path: Path) -> None:
    record = train(source, tmp_path / "auto.safetensors", TINY)
    units = record["settings"]["units"]
    tried = record[TRIED]
    assert 1 <= units <= len(tried) <= MOST
    network = load_weights(tmp_path / "auto.safetensors")
    assert network.architecture.units == units
    assert record["steps_taken"] == TINY.steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto.safetensors", "source.zarr"]


def test_a_trial_is_a_training_of_a_part_of_the_steps(crops: Triplets, tmp_path: Path) -> None:
    short = Training(replace(TINY, units=1, steps=TINY.steps // SHARE))
    with closing(crops.batches()) as batches:
        while short.taken < short.settings.steps:
            short.take(next(batches))
    expected = short.losses(crops.validation(HELD_OUT_BATCHES))
    assert Trials(str(tmp_path / "w.trials"), {}).run(crops)[0] == expected


def test_units_that_are_chosen_give_the_weights_of_those_that_are_named(source: Path, tmp_path: Path) -> None:
    chosen_units = train(source, tmp_path / "auto.safetensors", TINY)["settings"]["units"]
    train(source, tmp_path / "named.safetensors", replace(TINY, units=chosen_units))
    auto, named = (load_weights(tmp_path / f"{name}.safetensors").state_dict() for name in ("auto", "named"))
    assert all(np.array_equal(tensor, named[name]) for name, tensor in auto.items())


def test_trials_that_cannot_be_kept_are_an_error_that_says_so(
    crops: Triplets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, 5.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"the trials in .* cannot be written: Not a directory; make room"):
        Trials(str(tmp_path / "file/w.trials"), {}).run(crops)


def test_trials_that_are_damaged_are_refused(crops: Triplets, tmp_path: Path) -> None:
    (tmp_path / "w.trials").write_text("{}")
    with pytest.raises(InputError, match=r"w\.trials is damaged: .* delete it, to try anew"):
        Trials(str(tmp_path / "w.trials"), {}).run(crops)


def test_without_slices_held_out_units_cannot_be_chosen(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"of \d+ none is \(--hold-out is 0\): name the --units"):
        train(source, tmp_path / "w.safetensors", replace(TINY, hold_out=0))
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "unet"}, "units auto is not possible for unet: give a number"),
        ({"start": "w.safetensors"}, "units auto is not possible for weights to go on from: leave it out"),
    ],
)
def test_only_a_new_nrrn_can_choose_its_units(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **changes)
