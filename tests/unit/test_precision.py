"""Training whose network reckons in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nrrn_pipeline import InputError, TrainSettings, TrainWatch, train
from nrrn_pipeline.network import DenoisingNetwork, load_weights, read_header
from nrrn_pipeline.training.fit import Training, fit
from tests.support import bare_zarr, image_like

TINY = TrainSettings(units=1, channels=4, steps=60, batch=4, learning_rate=1e-2, device="cpu", loss="adjacent")

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy_batches(loss: str) -> Iterator[Tensor]:
    """Batches of three noisy images of one scene, noise of standard deviation 1; for recorrupted, of four."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.arange(24)[:, None] / 3, torch.arange(24) / 4
    while True:
        phase = 6.28 * torch.rand(2, 4, 1, 1, 1, generator=random)
        clean = torch.sin(y + phase[0]) + torch.cos(x + phase[1])
        yield clean + torch.randn(4, 4 if loss == "recorrupted" else 3, 24, 24, generator=random)


def fitted(settings: TrainSettings) -> tuple[DenoisingNetwork, list[float]]:
    """A network, and the losses on its way there."""
    losses: list[float] = []
    return fit(noisy_batches(settings.loss), settings, lambda _, loss: losses.append(loss)), losses


@pytest.mark.parametrize(
    "settings",
    [TINY, replace(TINY, loss="recorrupted"), replace(TINY, network="denoisenet", units=4, loss="recorrupted")],
    ids=lambda settings: f"{settings.network}-{settings.loss}",
)
def test_losses_of_bfloat16_are_those_of_float32_but_for_its_rounding(settings: TrainSettings) -> None:
    _, exact = fitted(replace(settings, precision="float32"))
    network, found = fitted(replace(settings, precision="bfloat16"))
    apart = np.abs(np.array(found) / exact - 1)
    assert 0 < apart.mean() < 5e-4  # 2e-4 as measured; a loss in bfloat16 is 1.2e-3 away or more
    assert np.mean(found[-10:]) < 0.95 * np.mean(found[:5])
    for tensor in network.state_dict().values():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()


def test_what_adam_remembers_is_float32_and_losses_of_looks_are_rounded_as_those_of_steps() -> None:
    batch = next(noisy_batches("adjacent"))
    training, exact = (Training(replace(TINY, precision=precision)) for precision in ("bfloat16", "float32"))
    measured = training.measure([batch])
    assert measured == training.take(batch)
    assert measured == pytest.approx(exact.measure([batch]), rel=1e-3)
    assert measured != exact.measure([batch])
    assert {tensor.dtype for tensor in training.state().values()} == {torch.float32}


def test_auto_on_a_cpu_is_float32_exactly() -> None:
    (network, losses), (other, exact) = (fitted(replace(TINY, precision=of)) for of in ("auto", "float32"))
    assert losses == exact
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("has_it", "settled"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, has_it: bool, settled: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert replace(TINY, device="auto").spelt_out.precision == settled
    assert replace(TINY, device="cuda", precision="float32").spelt_out.precision == "float32"
    assert TINY.spelt_out.precision == "float32"


@pytest.mark.parametrize("word", ["float16", "bf16", ""])
def test_an_unknown_precision_is_refused(word: str) -> None:
    with pytest.raises(InputError, match=f"precision '{word}' is unknown: use auto or float32 or bfloat16"):
        replace(TINY, precision=word)


def test_the_record_says_the_precision_and_a_checkpoint_is_of_one(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "source.zarr", image_like((6, 16, 16)))
    settings = replace(TINY, steps=3, crop=16, checkpoint_s=0, precision="bfloat16")
    for asked, used in (("auto", "float32"), ("bfloat16", "bfloat16")):
        record = train(source, tmp_path / f"{asked}.safetensors", replace(settings, precision=asked))
        assert record["settings"]["precision"] == used
        assert read_header(tmp_path / f"{asked}.safetensors")["training"]["settings"]["precision"] == used
        assert load_weights(tmp_path / f"{asked}.safetensors").first.weight.dtype == torch.float32

    def interrupt(step: int, _: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(source, tmp_path / "w.safetensors", settings, watch=TrainWatch(interrupt))
    with pytest.raises(InputError, match="precision was bfloat16, now float32"):
        train(source, tmp_path / "w.safetensors", replace(settings, precision="auto"))
