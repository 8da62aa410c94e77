from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nrrn_pipeline import TrainingVolume, statistics, train
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.geometry import Box, box_of
from nrrn_pipeline.network import NRRN, DenoisingNetwork, load_weights, read_header, weights_bytes
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.training import triplets as streaming
from nrrn_pipeline.training.fit import TrainSettings, TrainWatch, fit
from nrrn_pipeline.training.loss import adjacent_slices_loss, clean_loss
from nrrn_pipeline.volume import Volume, open_volume
from tests.crops import crops_of
from tests.support import bare_zarr, image_like, tiny_network, tiny_weights

TINY = TrainSettings(units=1, channels=4, steps=4, batch=2, crop=8, learning_rate=1e-2, device="cpu", loss="adjacent")


pytestmark = pytest.mark.usefixtures("one_thread")


def unwatched(step: int, loss: float) -> None:
    """Let the loss pass."""


def stored(folder: Path, voxels: NDArray[Any]) -> Volume:
    return open_volume(bare_zarr(folder / "source.zarr", voxels))


def batch_of(n: int = 4, size: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def parameters_of(network: DenoisingNetwork) -> dict[str, Tensor]:
    return dict(network.named_parameters())


def same_weights(a: DenoisingNetwork, b: DenoisingNetwork) -> bool:
    return all(torch.equal(parameter, parameters_of(b)[name]) for name, parameter in parameters_of(a).items())


@pytest.mark.parametrize(
    ("from_before", "from_after", "before", "after", "loss"),
    [
        ([1.0], [3.0], [0.0], [2.0], 0.5 + 4.5 - 1.0),
        ([1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [2.0, -1.0], (4.0 + 0.5 + 0.5) / 2),
        ([2.0], [1.0], [1.0], [2.0], -0.25),
    ],
)
def test_loss_is_equation_3(
    from_before: list[float], from_after: list[float], before: list[float], after: list[float], loss: float
) -> None:
    column = (1, 1, -1, 1)
    triplet = torch.cat([torch.tensor(values).reshape(column) for values in (before, [99.0] * len(before), after)], 1)
    found = adjacent_slices_loss(
        torch.tensor(from_before).reshape(column), torch.tensor(from_after).reshape(column), triplet
    )
    assert found.item() == pytest.approx(loss)


def test_loss_asks_each_branch_for_the_neighbour_that_it_has_not_seen() -> None:
    triplet = batch_of()
    before, after = triplet[:, :1], triplet[:, 2:]
    swapped = adjacent_slices_loss(before, after, triplet)
    assert adjacent_slices_loss(after, before, triplet) < swapped


def test_clean_loss_is_the_mean_squared_error() -> None:
    assert clean_loss(torch.tensor([[[[1.0, 4.0]]]]), torch.tensor([[[[3.0, 4.0]]]])).item() == 2


ALONG_A_COSINE = tuple((step + 1) / 20 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3))
RATES = [(0, (1, 1, 1)), (1, (1, 0.5, 0.25)), (2, (1, 1, 0.5)), (None, ALONG_A_COSINE)]


@pytest.mark.parametrize(("halve_every", "rates"), RATES)
def test_fit_takes_adam_steps_down_equation_3(halve_every: int | None, rates: tuple[float, ...]) -> None:
    batches = [batch_of(seed=step) for step in range(3)]
    torch.manual_seed(TINY.seed)
    expected = NRRN(1, 4)
    optimiser = torch.optim.Adam(expected.parameters())
    for triplet, rate in zip(batches, rates, strict=True):
        before, centre, after = (triplet[:, i : i + 1] for i in range(3))
        first, second = expected(before, centre), expected(after, centre)
        loss = (0.5 * (first - after) ** 2 + 0.5 * (second - before) ** 2 - 0.25 * (first - second) ** 2).mean()
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1)
        optimiser.step()
    settings = replace(TINY, steps=3, learning_rate=1e-3, halve_every=halve_every)
    found = fit(iter(batches), settings, unwatched)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(parameters_of(found)[name], parameter.detach(), rtol=0, atol=1e-5)


def test_fit_lowers_the_loss(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((6, 32, 32)))
    settings = replace(TINY, steps=60, batch=4, crop=16)
    losses: list[float] = []
    fit(crops_of(volume, settings).batches(), settings, lambda step, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_fit_reports_every_step_once_and_takes_one_batch_a_step() -> None:
    batches, steps = repeat(batch_of(), 4), []
    fit(batches, TINY, lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4]
    assert next(batches, None) is None


def test_a_fitted_network_is_ready_to_infer() -> None:
    network = fit(repeat(batch_of()), replace(TINY, units=2, channels=3), unwatched)
    assert (len(network.units), network.channels) == (2, 3)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    volume = stored(tmp_path, image_like((6, 32, 32)))
    first, again, other = (
        fit(crops_of(volume, each).batches(), each, unwatched) for each in (TINY, TINY, replace(TINY, seed=1))
    )
    assert same_weights(first, again)
    assert not same_weights(first, other)


def wavy(n: int, size: int, random: torch.Generator) -> Tensor:
    """(n, 1, y, x) smooth images of mean 0 and standard deviation about 1, each of another phase."""
    y, x = torch.arange(size)[:, None] / 3, torch.arange(size) / 4
    phase = 6.28 * torch.rand(2, n, 1, 1, 1, generator=random)
    return torch.sin(y + phase[0]) + torch.cos(x + phase[1])


def noisy_batches(loss: str, seed: int = 0) -> Iterator[Tensor]:
    """Batches of three noisy images of one scene, noise of standard deviation 1; then what the loss asks for."""
    random = torch.Generator().manual_seed(seed)
    while True:
        clean = wavy(4, 24, random)
        noisy = clean + torch.randn(4, 3, 24, 24, generator=random)
        other = clean + 5**0.5 * torch.randn(clean.shape, generator=random)
        behind = {"clean": [clean], "recorrupted": [other]}
        yield torch.cat([noisy, *behind.get(loss, [])], 1)


TRAINED = [
    ("nrrn", None, 1, "clean"),
    ("nrrn", None, 1, "blind-spot"),
    ("nrrn", None, 1, "adjacent"),
    ("nrrn", None, 1, "recorrupted"),
    ("denoisenet", "channels", 4, "clean"),
    ("denoisenet", "single", 4, "clean"),
    ("denoisenet", "channels", 4, "blind-spot"),
    ("denoisenet", "single", 4, "blind-spot"),
    ("denoisenet", "channels", 4, "recorrupted"),
    ("unet", "mean", 1, "clean"),
    ("unet", "single", 2, "clean"),
    ("unet", "mean", 2, "blind-spot"),
    ("unet", "single", 1, "blind-spot"),
    ("unet", "single", 1, "recorrupted"),
]


@pytest.mark.parametrize(("network", "inputs", "units", "loss"), TRAINED)
def test_every_network_learns_to_denoise_by_every_loss(network: str, inputs: str | None, units: int, loss: str) -> None:
    settings = replace(TINY, network=network, inputs=inputs, units=units, loss=loss, steps=80)
    losses: list[float] = []
    fitted = fit(noisy_batches(loss), settings, lambda step, value: losses.append(value))
    unseen = next(noisy_batches("clean", seed=9))
    triplet, clean = unseen.split([3, 1], dim=1)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    given = triplet.mean(1, keepdim=True) if inputs == "mean" else triplet[:, 1:2]
    assert clean_loss(fitted.estimate(triplet), clean) < 0.9 * clean_loss(given, clean)


@pytest.mark.parametrize(("network", "inputs", "units", "loss"), TRAINED)
def test_the_same_seed_and_batches_give_the_same_weights(
    network: str, inputs: str | None, units: int, loss: str
) -> None:
    settings = replace(TINY, network=network, inputs=inputs, units=units, loss=loss)

    def bits(seed: int) -> bytes:
        return weights_bytes(fit(noisy_batches(loss), replace(settings, seed=seed), unwatched), {})

    assert bits(0) == bits(0)
    assert bits(0) != bits(1)


@pytest.mark.parametrize("loss", ["clean", "blind-spot"])
def test_a_fitted_peer_is_ready_to_infer(loss: str) -> None:
    settings = replace(TINY, network="unet", loss=loss)
    fitted = fit(noisy_batches(loss), settings, unwatched)
    assert fitted.architecture == settings.architecture
    assert not any(module.training for module in fitted.modules())
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    moments = [tensor for name, tensor in fitted.state_dict().items() if name.endswith("running_mean")]
    assert all((moment != 0).any() for moment in moments)


@pytest.mark.parametrize(("network", "seen"), [("nrrn", "neighbours"), ("denoisenet", "channels"), ("unet", "mean")])
def test_a_network_sees_more_than_one_slice_unless_told(network: str, seen: str) -> None:
    assert replace(TINY, network=network, units=2, loss="clean").architecture.inputs == seen


@pytest.mark.parametrize(
    ("network", "units", "channels", "rate"),
    [("nrrn", 2, 16, 0.02), ("unet", 4, 64, 0.001), ("denoisenet", 20, 64, 0.001)],
)
def test_what_is_not_asked_for_goes_by_the_network(network: str, units: int, channels: int, rate: float) -> None:
    for settings in (TrainSettings(network=network), replace(TrainSettings(), network=network)):
        found = settings.spelt_out
        assert (found.units, found.channels, found.learning_rate) == (units, channels, rate)
        assert found.architecture == settings.architecture
    assert replace(TINY, network=network, units=3, loss="auto").spelt_out.channels == 4
    going_on = TrainSettings(network=network, start="w.safetensors")
    assert going_on.spelt_out.learning_rate == rate / 4
    assert replace(going_on, learning_rate=0.1).spelt_out.learning_rate == 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "auto"}, "steps auto is not possible: use 1 or more"),
        ({"units": "many"}, "units many is not possible: use 1 or more"),
        ({"network": "resnet"}, "network 'resnet' is unknown: use nrrn or denoisenet or unet"),
        (
            {"loss": "perceptual"},
            "loss 'perceptual' is unknown: use auto or adjacent or recorrupted or blind-spot or clean",
        ),
        ({"network": "unet"}, "loss adjacent is not possible for unet.*use recorrupted, blind-spot or clean"),
        ({"network": "denoisenet", "units": 4}, "loss adjacent is not possible for denoisenet"),
        ({"network": "denoisenet", "units": 1, "loss": "clean"}, "units 1 is not possible for denoisenet"),
        ({"network": "unet", "inputs": "channels", "loss": "clean"}, "inputs 'channels' is not possible for unet"),
        ({"inputs": "single"}, "inputs 'single' is not possible for nrrn: use neighbours"),
        ({"inputs": ""}, "inputs '' is not possible for nrrn"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(TINY, **changes)


def test_training_that_diverges_fails_with_the_step_and_a_way_out() -> None:
    with pytest.raises(RunError, match=r"training failed at step \d+: the loss is (nan|inf); use a lower"):
        fit(repeat(batch_of() * 1e30), replace(TINY, steps=20), unwatched)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["units", "channels", "steps", "batch", "crop", "learning_rate"])
def test_settings_that_are_not_positive_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(
        InputError, match=f"{name.replace('_', ' ')} {value} is not possible: use (1 or more|more than 0)"
    ):
        replace(TINY, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", math.nan), ("learning_rate", math.inf), ("seed", -1), ("halve_every", -1)]
)
def test_settings_that_cannot_be_trained_with_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name.replace("_", " ")):
        replace(TINY, **{name: value})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every reading of voxels fail the test."""

    def refuse(volume: Volume, box: Box) -> NDArray[Any]:
        raise AssertionError(f"{box} was read")

    monkeypatch.setattr(statistics, "read_box", refuse)
    monkeypatch.setattr(streaming, "read_box", refuse)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return bare_zarr(tmp_path / "source.zarr", image_like((6, 16, 16)))


def test_train_writes_the_weights_and_their_record(source: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    target = tmp_path / "a.safetensors"
    record = train(source, target, TINY, watch=TrainWatch(lambda step, loss: losses.append(loss)))
    assert read_header(target)["training"] == json.loads(json.dumps(record))
    (volume,) = record["volumes"]
    assert (volume["source"], volume["shape"], volume["dtype"]) == (str(source.resolve()), [6, 16, 16], "uint8")
    assert record["settings"]["steps"] == TINY.steps
    assert record["mean_loss_of_last_tenth"] == losses[-1]
    assert {"python", "nrrn-pipeline", "torch", "numpy"} <= record["versions"].keys()
    expected = fit(crops_of(open_volume(source), TINY).batches(), TINY, unwatched)
    assert same_weights(load_weights(target), expected)


@pytest.mark.usefixtures("unread")
def test_train_refuses_an_existing_target_before_it_reads_voxels(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(InputError, match=r"a\.safetensors exists: choose another file"):
        train(source, target, TINY)
    assert target.read_bytes() == b"precious"


@pytest.mark.usefixtures("unread")
def test_train_refuses_a_missing_folder_before_it_reads_voxels(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its folder is missing"):
        train(source, tmp_path / "missing" / "a.safetensors", TINY)
    assert not (tmp_path / "missing").exists()


@pytest.mark.usefixtures("unread")
def test_train_refuses_an_unknown_device_before_it_reads_voxels(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'tpu' is unknown"):
        train(source, tmp_path / "a.safetensors", replace(TINY, device="tpu"))


def test_train_refuses_a_missing_source_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing there"):
        train(tmp_path / "absent.zarr", tmp_path / "a.safetensors", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", ["nrrn", "unet"])
def test_training_goes_on_from_weights(source: Path, tmp_path: Path, network: str) -> None:
    first = replace(TINY, network=network, loss="blind-spot", units=1, channels=3, crop=16)
    record = train(source, tmp_path / "first.safetensors", first)
    again = replace(
        first, units=None, channels=None, steps=1, learning_rate=1e-6, start=str(tmp_path / "first.safetensors")
    )
    told = train(source, tmp_path / "again.safetensors", again)
    assert (told["settings"]["units"], told["settings"]["channels"]) == (1, 3)
    assert told["settings"]["start"] == str(tmp_path / "first.safetensors")
    assert len(told["SHA-256 of the weights it went on from"]) == 64
    assert "SHA-256 of the weights it went on from" not in record
    one, other = (load_weights(tmp_path / f"{name}.safetensors") for name in ("first", "again"))
    for name, parameter in parameters_of(one).items():
        torch.testing.assert_close(parameters_of(other)[name], parameter, rtol=0, atol=1e-5)
    assert not same_weights(one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 5}, "holds an NRRN with units 1, channels 4, .* asked for is an NRRN with units 1, channels 5"),
        ({"units": 2}, "asked for is an NRRN with units 2"),
        (
            {"network": "unet", "loss": "clean"},
            "asked for is a U-Net with .*: give --network nrrn, and leave its sizes",
        ),
        ({"start": "nowhere.safetensors"}, r"no weights at .*nowhere\.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_not_gone_on_from(
    source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    tiny_weights(tmp_path / "start.safetensors")
    settings = {"units": None, "channels": None, "start": str(tmp_path / "start.safetensors")} | changes
    with pytest.raises(InputError, match=words):
        train(source, tmp_path / "a.safetensors", replace(TINY, **settings))
    assert not (tmp_path / "a.safetensors").exists()


def test_the_noise_that_was_trained_with_is_in_the_record(tmp_path: Path) -> None:
    noisy = Noise(sigma=15, seed=1).added(np.full((4, 96, 96), 120, np.uint8), box_of((4, 96, 96)))
    source = bare_zarr(tmp_path / "source.zarr", noisy)
    record = train(source, tmp_path / "a.safetensors", replace(TINY, loss="recorrupted"))
    written = json.loads(json.dumps(record))
    assert read_header(tmp_path / "a.safetensors")["training"] == written
    assert written["loss"].startswith("recorrupted")
    np.testing.assert_allclose(written["volumes"][0]["noise"]["sigma"], 15, rtol=0.1)


def test_slices_noisier_than_their_neighbours_are_left_out_by_auto(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 9, (8, 96, 96))
    noise[6] *= 3
    source = bare_zarr(tmp_path / "source.zarr", np.rint(120 + noise).astype(np.uint8))
    record = train(source, tmp_path / "a.safetensors", replace(TINY, loss="auto"))
    assert record["settings"]["loss"] == "recorrupted"
    assert record["loss was chosen, as"].startswith("the noise is white")
    assert record["volumes"][0]["slices left out for their noise"] == [6]
    noise[2] *= 3
    noisier = bare_zarr(tmp_path / "noisier.zarr", np.rint(120 + noise[:5]).astype(np.uint8))
    with pytest.raises(InputError, match="noisy unlike the others"):
        train(noisier, tmp_path / "b.safetensors", replace(TINY, loss="auto"))


def test_auto_takes_clean_slices_where_there_are_some_and_asks_for_a_loss_where_nothing_is_known(
    source: Path, tmp_path: Path
) -> None:
    auto = replace(TINY, loss="auto")
    record = train(TrainingVolume(source, clean=source), tmp_path / "a.safetensors", auto)
    assert record["loss was chosen, as"] == "there are clean slices"
    with pytest.raises(InputError, match=r"cannot choose a loss: .*source\.zarr: noise cannot be .*; or name the loss"):
        train(source, tmp_path / "b.safetensors", auto)


def test_training_that_fails_writes_no_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrrn_pipeline.training.fit.adjacent_slices_loss", lambda a, b, t: math.nan * (a + b + t).sum())
    with pytest.raises(RunError, match="training failed at step 1: the loss is nan"):
        train(source, tmp_path / "a.safetensors", replace(TINY, steps=20))
    assert list(tmp_path.iterdir()) == [source]


def test_trained_weights_beat_the_untrained_on_the_loss(source: Path, tmp_path: Path) -> None:
    settings = replace(TINY, steps=40, batch=4)
    train(source, tmp_path / "a.safetensors", settings)
    batch = next(crops_of(open_volume(source), replace(settings, seed=9, batch=16)).batches())
    before, centre, after = batch.split(1, dim=1)

    def loss_of(network: NRRN) -> float:
        return adjacent_slices_loss(network(before, centre), network(after, centre), batch).item()

    assert loss_of(load_weights(tmp_path / "a.safetensors")) < loss_of(tiny_network())
