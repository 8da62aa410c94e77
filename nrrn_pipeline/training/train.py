"""From a volume to a weights file: the loss is chosen, the noise measured, the network trained and written."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import choose_device, weights_bytes
from nrrn_pipeline.noise_model import NoiseCurve
from nrrn_pipeline.places import absolute
from nrrn_pipeline.training.checkpoint import Checkpoint
from nrrn_pipeline.training.choosing import loss_for
from nrrn_pipeline.training.fit import AUTO, OnStep, Training, TrainSettings
from nrrn_pipeline.training.triplets import triplets
from nrrn_pipeline.volume import Volume, open_volume
from nrrn_pipeline.volume_noise import measure_volume, noise_of

Location = str | os.PathLike[str]

CHOSEN, OUTLIERS = "loss was chosen, as", "slices left out for their noise"
LOSS_NAMES = {
    "adjacent": "adjacent slices (Giannios et al., eq. 3)",
    "recorrupted": "recorrupted to recorrupted (Pang et al. 2021)",
    "blind-spot": "blind spots (Noise2Void, Krull et al. 2019)",
    "clean": "squared distance from clean slices",
}


def train(
    source: Location,
    weights: Location,
    settings: TrainSettings | None = None,
    level: int = 0,
    on_step: OnStep | None = None,
    clean: Location | None = None,
) -> dict[str, Any]:
    """Train a network on a noisy volume and write it to `weights`; returns its record.

    Beside it a checkpoint is kept meanwhile: called again after any interruption, training goes on there. Its weights
    are those of one that was never interrupted, on a CPU with as many threads; on a GPU the last bits may differ.

    Clean data are for the loss "clean" alone: a volume of the source's shape and dtype. The loss "auto" is "clean" if
    there is one, else it depends on the volume's noise; the record says what was chosen, and why.

    Raises InputError if the volume or the settings do not allow it, or `weights` exists or cannot be written; RunError
    if training diverges.
    """
    settings = (settings or TrainSettings()).spelt_out
    choose_device(settings.device)
    volume = open_volume(source, level)
    storage.check_new_file(weights)
    truth = None if clean is None else open_volume(clean, level)
    settings, noise, chosen = _settled(settings, volume, truth)
    asked = {name: value for name, value in asdict(settings).items() if name not in ("device", "checkpoint_s")}
    asked |= {"source": volume.url, "source shape": list(volume.shape), "source dtype": volume.dtype}
    asked |= {"clean": truth and truth.url, "noise": noise and asdict(noise.model), OUTLIERS: chosen.get(OUTLIERS)}
    checkpoint = Checkpoint(f"{absolute(weights)}.checkpoint", asked)
    training = Training(settings)
    losses, before_s = checkpoint.restore(training)
    started = perf_counter()
    model, outliers = noise.model if noise else None, chosen.get(OUTLIERS, ())
    batches = triplets(volume, settings, truth, model, outliers, training.taken)
    written = started
    while training.taken < settings.steps:
        losses.append(training.take(next(batches)))
        if on_step is not None:
            on_step(training.taken, losses[-1])
        if perf_counter() - written >= settings.checkpoint_s:
            checkpoint.write(training, losses, before_s + perf_counter() - started)
            written = perf_counter()
    network = training.finished()
    tail = losses[-max(1, len(losses) // 10) :]
    known = {**chosen, "clean": truth and truth.url, "noise": noise and asdict(noise)}
    record = {
        "loss": LOSS_NAMES[settings.loss],
        "source": volume.url,
        **{name: value for name, value in known.items() if value is not None},
        "shape": list(volume.shape),
        "dtype": volume.dtype,
        "voxel_nm": volume.voxel_nm,
        "settings": asdict(settings),
        "mean_loss_of_last_tenth": sum(tail) / len(tail),
        "seconds": round(before_s + perf_counter() - started, 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("nrrn-pipeline", "torch", "numpy")},
    }
    storage.write_file(absolute(weights), weights_bytes(network, record))
    checkpoint.remove()
    return record


def _settled(
    settings: TrainSettings, volume: Volume, clean: Volume | None
) -> tuple[TrainSettings, NoiseCurve | None, dict[str, Any]]:
    """The settings with a loss instead of auto; the noise, where the loss needs it; what the record says of auto."""
    if settings.loss != AUTO:
        return settings, noise_of(volume) if settings.loss == "recorrupted" else None, {}
    if clean is not None:
        return replace(settings, loss="clean"), None, {CHOSEN: "there are clean slices"}
    try:
        found = measure_volume(volume)
    except InputError as error:
        raise InputError(f"the volume's noise cannot choose a loss: {error}; or name the loss yourself") from error
    loss, why = loss_for(found, settings.architecture)
    return replace(settings, loss=loss), found.curve, {CHOSEN: why, OUTLIERS: list(found.outliers)}
