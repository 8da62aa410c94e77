"""Random crops of slice triplets, streamed from a volume of any size."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.run import measured
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.statistics import SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.volume import Volume, read_box
from nrrn_pipeline.volume_noise import noise_of

SLICES = 128  # enough to train on; more would cost a pass over the whole volume for their statistics
RUN = 16  # consecutive slices read together, or a chunk's depth if that is more


def triplets(
    volume: Volume,
    settings: TrainSettings,
    clean: Volume | None = None,
    noise: NoiseModel | None = None,
    without: Collection[int] = (),
    first: int = 0,
) -> Iterator[Tensor]:
    """Endless (n, 3, y, x) float32 batches: crops at random places, randomly flipped, each slice z-scored as a whole.

    Crops come from about 128 slices, in runs spread evenly over the volume, but for blank slices and those `without`.
    Seeded: same settings, same batches; `first` is the number of the one to begin with.
    With the `clean` volume, (n, 4, y, x): last the clean centre slice, by the noisy one's mean and standard deviation.
    For loss recorrupted the standard deviation of the noise on the centre slice, divided by the slice's own, is last;
    it is by the `noise` model, or measured here.

    Raises InputError if no three consecutive slices have an image on them, or a voxel is not a finite number; or the
    clean volume does not fit the noisy one or the settings; or there is no noise to be measured.
    """
    _refuse_unfit(volume, settings, clean)
    runs = training_runs(volume)
    statistics = [_measured(volume, run) for run in runs]
    places = [(run, z) for run in statistics for z in _centres(run) if not {z - 1, z, z + 1}.intersection(without)]
    if not places:
        looked_at = ", ".join(f"{run.start}:{run.stop}" for run in runs)
        raise InputError(
            f"{volume.url} has no three consecutive slices to learn from in z={looked_at}: they are blank, too few, or "
            "noisy unlike the others (name the loss, and all slices count)"
        )
    if settings.loss != "recorrupted":
        noise = None
    elif noise is None:
        noise = noise_of(volume).model
    return (_batch(step, volume, settings, places, (clean, noise)) for step in count(first))


def training_runs(volume: Volume) -> list[Span]:
    """Runs of consecutive slices, whole chunks deep, spread evenly over z; runs that touch are one."""
    depth = -(-RUN // volume.chunk[0]) * volume.chunk[0]
    starts = range(0, volume.shape[0], depth)
    count = min(len(starts), max(1, SLICES // depth))
    runs: list[Span] = []
    for start in sorted({starts[round(i)] for i in np.linspace(0, len(starts) - 1, count)}):
        stop = min(start + depth, volume.shape[0])
        if runs and runs[-1].stop == start:
            runs[-1] = Span(runs[-1].start, stop)
        else:
            runs.append(Span(start, stop))
    return runs


def _refuse_unfit(volume: Volume, settings: TrainSettings, clean: Volume | None) -> None:
    if (clean is None) == (settings.loss == "clean"):
        raise InputError(
            "loss clean needs the clean volume beside the noisy one: name it, or use loss recorrupted or blind-spot"
            if clean is None
            else f"loss {settings.loss} needs no clean volume: leave {clean.url} out, or use loss clean"
        )
    if clean is not None and (clean.shape, clean.dtype) != (volume.shape, volume.dtype):
        raise InputError(
            f"{clean.url} has shape {clean.shape} and dtype {clean.dtype}, {volume.url} {volume.shape} and "
            f"{volume.dtype}: give the clean volume of the same voxels, in the same dtype"
        )


def _measured(volume: Volume, run: Span) -> SliceStatistics:
    outcomes = run_serially(partial(measure_box, volume), statistics_boxes(volume, run))
    return merge_boxes(measured(volume, outcome) for outcome in outcomes)


def _centres(run: SliceStatistics) -> Iterator[int]:
    """Slices whose triplet lies in the run and has no blank slice."""
    for i in range(1, len(run.std) - 1):
        if min(run.std[i - 1 : i + 2]) > 0:
            yield run.first_z + i


def _batch(
    step: int,
    volume: Volume,
    settings: TrainSettings,
    places: list[tuple[SliceStatistics, int]],
    beside: tuple[Volume | None, NoiseModel | None],
) -> Tensor:
    """The batch of one step, whatever was drawn before; `beside`: the clean volume, the noise."""
    rng = np.random.default_rng((settings.seed, step))
    height, width = (min(settings.crop, length) for length in volume.shape[1:])
    clean, noise = beside
    batch = []
    for _ in range(settings.batch):
        run, z = places[rng.integers(len(places))]
        y, x = (int(rng.integers(n - m + 1)) for n, m in zip(volume.shape[1:], (height, width), strict=True))
        box = Box(Span(z - 1, z + 2), Span(y, y + height), Span(x, x + width))
        own = run.of(box.z)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (own.mean, own.std))
        voxels = read_box(volume, box)
        crop = [(voxels - mean) / std]
        if clean is not None:
            crop.append((_clean_slice(clean, z, box) - mean[1:2]) / std[1:2])
        if noise is not None:
            crop.append(noise.sigma_in(voxels[1:2]) / std[1:2])
        flips = tuple(axis for axis in (1, 2) if rng.integers(2))
        batch.append(np.flip(np.concatenate(crop), flips))
    return torch.from_numpy(np.stack(batch).astype(np.float32))


def _clean_slice(clean: Volume, z: int, box: Box) -> NDArray[Any]:
    """(1, y, x) voxels of the clean slice z. Raises InputError if one is not a finite number."""
    voxels = read_box(clean, Box(Span(z, z + 1), box.y, box.x))
    if not np.isfinite(voxels).all():
        raise InputError(f"{clean.url} holds NaN or infinite voxels in slice z={z}: replace them (with 0, say)")
    return voxels
