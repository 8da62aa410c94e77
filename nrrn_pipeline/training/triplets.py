"""Random crops of slice triplets, streamed from a volume of any size."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
from nrrn_pipeline.training.fit import HELD_OUT, TrainSettings
from nrrn_pipeline.training.recorruption import recorrupted
from nrrn_pipeline.volume import Volume, read_box
from nrrn_pipeline.volume_noise import noise_of

SLICES = 128  # enough to train on; more would cost a pass over the whole volume for their statistics
LEAST_LEFT = 0.7  # of what holding slices out should leave: those next to them are lost too
RUN = 16  # consecutive slices read together, or a chunk's depth if that is more


Place = tuple[SliceStatistics, int]  # a run of slices, and the centre slice of a triplet in it


@dataclass(frozen=True)
class Triplets:
    """Crops of a volume at random places, randomly flipped, each slice z-scored as a whole; float32.

    learnt: the triplets that batches come from; held_out: others, which share no slice with these. Batches are
    (n, 3, y, x). With the `clean` volume, (n, 4, y, x): last the clean centre slice, by the noisy one's mean and
    standard deviation. With `noise`, (n, 4, y, x): the centre slice is recorrupted, and last is what is asked for.
    """

    volume: Volume
    settings: TrainSettings
    clean: Volume | None
    noise: NoiseModel | None
    learnt: tuple[Place, ...]
    held_out: tuple[Place, ...]

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Endless, seeded: same settings, same batches; `first` is the number of the one to begin with.

        Raises InputError for a clean voxel that is not a finite number.
        """
        return (self._batch(self.learnt, step) for step in count(first))

    def validation(self, batches: int) -> list[Tensor]:
        """So many of what is held out, always the same; none if nothing is."""
        return [self._batch(self.held_out, number, HELD_OUT) for number in range(batches if self.held_out else 0)]

    def _batch(self, places: tuple[Place, ...], *key: int) -> Tensor:
        """One batch, whatever was drawn before."""
        random = np.random.default_rng((self.settings.seed, *key))
        return torch.from_numpy(np.stack([self._crop(places, random) for _ in range(self.settings.batch)]))

    def _crop(self, places: tuple[Place, ...], random: np.random.Generator) -> NDArray[np.float32]:
        """(3 or 4, y, x)."""
        volume = self.volume
        height, width = (min(self.settings.crop, length) for length in volume.shape[1:])
        run, z = places[random.integers(len(places))]
        y, x = (int(random.integers(n - m + 1)) for n, m in zip(volume.shape[1:], (height, width), strict=True))
        box = Box(Span(z - 1, z + 2), Span(y, y + height), Span(x, x + width))
        own = run.of(box.z)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (own.mean, own.std))
        voxels = read_box(volume, box)
        crop = [*((voxels - mean) / std)]
        if self.clean is not None:
            crop.append((_clean_slice(self.clean, z, box) - mean[1]) / std[1])
        elif self.noise is not None:
            seen, asked = recorrupted(voxels[1], self.noise, random)
            crop[1] = (seen - mean[1]) / std[1]
            crop.append((asked - mean[1]) / std[1])
        flips = tuple(axis for axis in (1, 2) if random.integers(2))
        return np.flip(np.stack(crop), flips).astype(np.float32)


def triplets(
    volume: Volume,
    settings: TrainSettings,
    clean: Volume | None = None,
    noise: NoiseModel | None = None,
    without: Collection[int] = (),
) -> Triplets:
    """What to train on.

    Crops come from about 128 slices, in runs spread evenly over the volume, but for blank slices and those `without`.
    Loss recorrupted is by the `noise` model, or one that is measured here.

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
    return Triplets(volume, settings, clean, noise, *_split(places, settings.hold_out))


def _split(places: list[Place], share: float) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """What to learn from, and that share, in the middle, to be held out; nothing if too much would be lost."""
    number = int(share * len(places))
    start = (len(places) - number) // 2
    held = tuple(places[start : start + number])
    touching = {z + apart for _, z in held for apart in range(-2, 3)}
    learnt = tuple((run, z) for run, z in places if z not in touching)
    return (learnt, held) if len(learnt) >= LEAST_LEFT * (1 - share) * len(places) else (tuple(places), ())


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


def _clean_slice(clean: Volume, z: int, box: Box) -> NDArray[Any]:
    """(y, x) voxels of the clean slice z. Raises InputError if one is not a finite number."""
    voxels: NDArray[Any] = read_box(clean, Box(Span(z, z + 1), box.y, box.x))[0]
    if not np.isfinite(voxels).all():
        raise InputError(f"{clean.url} holds NaN or infinite voxels in slice z={z}: replace them (with 0, say)")
    return voxels
