"""From a volume to a weights file: the loss is chosen, the noise measured, the network trained and written."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nrrn_pipeline import storage
from nrrn_pipeline.errors import DivergedError, InputError
from nrrn_pipeline.network import DenoisingNetwork, bytes_hash, choose_device, parse_weights, weights_bytes
from nrrn_pipeline.places import absolute
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.training.checkpoint import Checkpoint
from nrrn_pipeline.training.course import LOOKED_AT, Course
from nrrn_pipeline.training.depth import Trials, chosen
from nrrn_pipeline.training.fit import AUTO, NOBODY, Training, TrainSettings, TrainWatch, refuse_sharing
from nrrn_pipeline.training.material import Location, Material, TrainingVolume, settled
from nrrn_pipeline.training.processes import Processes, together
from nrrn_pipeline.training.triplets import Triplets, triplets

STARTED = "SHA-256 of the weights it went on from"
CHOSEN = "loss was chosen, as"
TRIED = "loss on slices held out by units tried"
PARTS = 100  # of a training, in the record of its losses
LOSS_NAMES = {
    "adjacent": "adjacent slices (Giannios et al., eq. 3)",
    "recorrupted": "recorrupted to recorrupted (Pang et al. 2021)",
    "blind-spot": "blind spots (Noise2Void, Krull et al. 2019)",
    "clean": "squared distance from clean slices",
}


def train(
    source: Location | TrainingVolume | Sequence[Location | TrainingVolume],
    weights: Location,
    settings: TrainSettings | None = None,
    watch: TrainWatch = NOBODY,
) -> dict[str, Any]:
    """Train a network on a noisy volume, or several, and write it to `weights`; returns its record.

    Beside it a checkpoint is kept meanwhile: called again after any interruption, training goes on there. Its weights
    are those of one that was never interrupted, on a CPU with as many threads; on a GPU the last bits may differ.

    Clean volumes are for the loss "clean" alone. The loss "auto" is "clean" if there are any, else it depends on the
    noise; the record says what was chosen, and why.

    Units "auto" are chosen by short trainings first, each of which is kept once it has ended.

    A tenth of the slices is held out: the weights are those that did best on them, and training stops early once it
    does no better. Of a training that diverges the best weights until then are kept beside `weights`.

    Raises InputError if the volumes or the settings do not allow it, or `weights` exists or cannot be written;
    DivergedError if training diverges; RunError if a checkpoint cannot be written.

    Processes that torchrun starts share each batch, and train what one would, to rounding. The first alone writes, and
    tells `watch`; all return the record, once the weights are written. Raises LostError if one of them is gone.
    """
    settings = settings or TrainSettings()
    with together(choose_device(settings.device)) as processes:
        return _train(_volumes(source), weights, settings, watch if processes.is_first else NOBODY, processes)


def _train(
    volumes: Sequence[TrainingVolume],
    weights: Location,
    settings: TrainSettings,
    watch: TrainWatch,
    processes: Processes,
) -> dict[str, Any]:
    """As train does."""
    refuse_sharing(settings, processes)
    settings, start, known = _begun(settings)
    storage.check_new_file(weights)
    materials = [of.opened() for of in volumes]
    settings, materials, why = settled(settings, materials)
    asked = _asked(settings, materials) | known
    checkpoint = Checkpoint(f"{absolute(weights)}.checkpoint", asked)
    trials = Trials(f"{absolute(weights)}.trials", asked)
    device = processes.own(choose_device(settings.device))
    before = trials.tried() if settings.units == AUTO else []
    _agree(processes, device, checkpoint.kept(), [asked, before])  # before crops are read
    crops = triplets(materials, settings, processes)
    if settings.units == AUTO:
        tried = trials.run(crops, processes, watch.trial)
        crops = replace(crops, settings=replace(settings, units=chosen(tried)))
        known[TRIED] = [float(np.mean(losses)) for losses in tried]
    course = Course(Training(crops.settings, start, processes))
    checkpoint.restore(course)
    course.held_out = crops.validation(LOOKED_AT)
    known |= {} if why is None else {CHOSEN: why}
    known["processes"] = processes.number
    known["volumes"] = [_told(of) | {"held_out": crops.held_out_of(of)} for of in materials]
    try:
        _take_all(course, crops, checkpoint, watch)
        network = course.finished()
    except DivergedError as error:
        kept = ""
        if processes.is_first:
            checkpoint.remove()  # it would lead here again
            trials.remove()
            if course.best:
                record = _record(course, crops, {**known, "stopped": str(error)})
                kept = f"; {_keep_last_good(course, weights, record)}"
        raise DivergedError(f"{error}{processes.told(kept, device)[0]}") from error
    record = _record(course, crops, known)
    if processes.is_first:
        storage.write_file(absolute(weights), weights_bytes(network, record))
        checkpoint.remove()
        trials.remove()
    processes.told("written", device)
    return record


def _volumes(source: Location | TrainingVolume | Sequence[Location | TrainingVolume]) -> list[TrainingVolume]:
    """Raises InputError if there is none."""
    named = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not named:
        raise InputError("there is nothing to train on: name a volume")
    return [of if isinstance(of, TrainingVolume) else TrainingVolume(of) for of in named]


def _asked(settings: TrainSettings, materials: Sequence[Material]) -> dict[str, Any]:
    """What a checkpoint must be of, to go on with it."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("device", "checkpoint_s")}
    for number, material in enumerate(materials, start=1):
        of = f" of volume {number}" if len(materials) > 1 else ""
        asked |= {f"{name}{of}": value for name, value in _told(material, with_curve=False).items()}
    return asked


def _agree(processes: Processes, device: torch.device, kept: str, seen: Any) -> None:
    """All processes are here. Raises InputError if one sees other volumes, or another checkpoint, than the first."""
    every = processes.told(f"{kept}, {storage.digest(json.dumps(seen, sort_keys=True).encode())}", device)
    if len(set(every)) > 1:
        steps = ", ".join(each.partition(",")[0] for each in every)
        raise InputError(
            f"the {len(every)} processes do not see the same ({steps} of the checkpoint): give all of them the same "
            "command, and storage that all of them reach"
        )


def _told(material: Material, with_curve: bool = True) -> dict[str, Any]:
    """Of a volume, what the record and a checkpoint say."""
    volume, noise = material.volume, material.noise
    return {
        "source": volume.url,
        "shape": list(volume.shape),
        "dtype": volume.dtype,
        "voxel_nm": volume.voxel_nm and list(volume.voxel_nm),
        "roi": str(material.part),
        "clean": material.clean and material.clean.url,
        "mask": material.mask and material.mask.url,
        "noise": noise and asdict(noise if with_curve else noise.model),
        "slices left out for their noise": list(material.without),
    }


def _begun(settings: TrainSettings) -> tuple[TrainSettings, DenoisingNetwork | None, dict[str, Any]]:
    """The settings spelt out, as the weights to go on from say; their network; what the record says of them.

    Raises InputError for weights that cannot be read, or are not of the network asked for.
    """
    if settings.start is None:
        return settings.spelt_out, None, {}
    url = located(settings.start)
    data = read_weights(url)
    network = parse_weights(data, url)
    own = network.architecture
    if settings.network == own.kind:
        units, channels, inputs = (getattr(settings, of) or getattr(own, of) for of in ("units", "channels", "inputs"))
        settings = replace(settings, start=url, units=units, channels=channels, inputs=inputs)
    if settings.architecture != own:
        raise InputError(
            f"{url} holds {own}, inputs {own.inputs}; asked for is {settings.architecture}, inputs "
            f"{settings.architecture.inputs}: give --network {own.kind}, and leave its sizes out"
        )
    return settings.spelt_out, network, {STARTED: bytes_hash(data)}


def _record(course: Course, crops: Triplets, known: dict[str, Any]) -> dict[str, Any]:
    """What the weights' file says of how they were made, beside what is `known`."""
    settings = crops.settings
    tail = course.losses[-max(1, len(course.losses) // 10) :]
    record = {
        "loss": LOSS_NAMES[settings.loss],
        **known,
        "settings": asdict(settings),
        "crop": list(crops.crop),
        "steps_taken": len(course.losses),
        "mean_loss_of_last_tenth": sum(tail) / len(tail),
        "seconds": round(course.seconds, 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("nrrn-pipeline", "torch", "numpy")},
    }
    parts = np.array_split(np.array(course.losses), min(PARTS, len(course.losses)))
    steps = np.cumsum([len(part) for part in parts]).tolist()
    record["step_and_mean_loss"] = [(step, float(part.mean())) for step, part in zip(steps, parts, strict=True)]
    if (best := course.best_look()) is not None:
        record["validation"] = {"best_step": best[0], "step_and_loss": course.looks}
    return record


def _keep_last_good(course: Course, weights: Location, record: dict[str, Any]) -> str:
    """Write the best weights of a training that diverged; where they are, for people."""
    url = f"{absolute(weights).removesuffix('.safetensors')}.last-good.safetensors"
    try:
        storage.write_file(url, weights_bytes(course.finished(), record))
    except OSError as error:
        return f"its best weights until then cannot be written to {url} ({error.strerror or error})"
    return f"its best weights until then are in {url}"


def _take_all(course: Course, crops: Triplets, checkpoint: Checkpoint, watch: TrainWatch) -> None:
    """All steps that are left, with a checkpoint now and then."""
    training, written = course.training, perf_counter()
    with closing(crops.batches(training.taken)) as batches:
        while not course.is_over:
            course.take(next(batches))
            watch.step(training.taken, course.losses[-1])
            if course.looks and course.looks[-1][0] == training.taken:
                watch.look(*course.looks[-1])
            if training.processes.is_first and perf_counter() - written >= training.settings.checkpoint_s:
                checkpoint.write(course)
                written = perf_counter()
