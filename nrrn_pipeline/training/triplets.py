"""Random crops of slice triplets, streamed from volumes of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from nrrn_pipeline.run import measured
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.statistics import SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.training.fit import HELD_OUT, TrainSettings
from nrrn_pipeline.training.masks import BLOCK, Blocks, blocks_of
from nrrn_pipeline.training.material import Material
from nrrn_pipeline.training.recorruption import recorrupted
from nrrn_pipeline.volume import Volume, read_box

SLICES = 128  # enough to train on; more would cost a pass over the whole volume for their statistics
LEAST_LEFT = 0.7  # of what holding slices out should leave: those next to them are lost too
RUN = 16  # consecutive slices read together, or a chunk's depth if that is more


@dataclass(frozen=True, eq=False)
class Place:
    """A triplet to take crops from: slices z - 1, z, z + 1, and their statistics.

    blocks: those of its centre slice that have something to learn from; None: all have.
    """

    material: Material
    z: int
    statistics: SliceStatistics
    blocks: Blocks | None

    def corner(self, size: tuple[int, int], random: np.random.Generator) -> tuple[int, int]:
        """Where a crop of `size` (y, x) begins: anywhere in the part, or around any voxel of a block."""
        spans = self.material.part.spans[1:]
        if self.blocks is None:
            y, x = (of.start + random.integers(len(of) - n + 1) for of, n in zip(spans, size, strict=True))
        else:
            block = np.argwhere(self.blocks)[random.integers(np.count_nonzero(self.blocks))]
            wanted = block * BLOCK + random.integers(BLOCK, size=2) - np.array(size) // 2
            y, x = (min(max(at, of.start), of.stop - n) for at, of, n in zip(wanted, spans, size, strict=True))
        return int(y), int(x)


@dataclass(frozen=True)
class Triplets:
    """Crops at random places, randomly flipped, each slice z-scored as a whole; float32.

    crop: voxels along y, x. learnt: the triplets that batches come from; held_out: others, which share no slice with
    these. Batches are (n, 3, y, x). For loss clean, (n, 4, y, x): last the clean centre slice, by the noisy one's mean
    and standard deviation. For loss recorrupted, (n, 4, y, x): the centre slice is recorrupted, and last is what is
    asked for.
    """

    settings: TrainSettings
    crop: tuple[int, int]
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

    def held_out_of(self, material: Material) -> list[int]:
        """The centre slices of a volume that are held out."""
        return sorted(place.z for place in self.held_out if place.material is material)

    def _batch(self, places: tuple[Place, ...], *key: int) -> Tensor:
        """One batch, whatever was drawn before."""
        random = np.random.default_rng((self.settings.seed, *key))
        return torch.from_numpy(np.stack([self._crop(places, random) for _ in range(self.settings.batch)]))

    def _crop(self, places: tuple[Place, ...], random: np.random.Generator) -> NDArray[np.float32]:
        """(3 or 4, y, x)."""
        place = places[random.integers(len(places))]
        of, z, (height, width) = place.material, place.z, self.crop
        y, x = place.corner(self.crop, random)
        box = Box(Span(z - 1, z + 2), Span(y, y + height), Span(x, x + width))
        mean, std = (np.array(own, np.float32)[:, None, None] for own in (place.statistics.mean, place.statistics.std))
        voxels = read_box(of.volume, box)
        crop = [*((voxels - mean) / std)]
        if self.settings.loss == "clean" and of.clean is not None:
            crop.append((_clean_slice(of.clean, z, box) - mean[1]) / std[1])
        elif self.settings.loss == "recorrupted" and of.noise is not None:
            seen, asked = recorrupted(voxels[1], of.noise.model, random)
            crop[1] = (seen - mean[1]) / std[1]
            crop.append((asked - mean[1]) / std[1])
        flips = tuple(axis for axis in (1, 2) if random.integers(2))
        return np.flip(np.stack(crop), flips).astype(np.float32)


def triplets(materials: Sequence[Material], settings: TrainSettings) -> Triplets:
    """What to train on; all triplets are drawn alike often, those of each volume, and held out by their share of it.

    Of each volume crops come from about 128 slices, in runs spread evenly over it, but for blank slices and those left
    out. Crops are no larger than the smallest of the volumes' parts. Materials and loss are those of material.settled.

    Raises InputError if a volume has no three consecutive slices with images, or with something of the mask in the
    middle one; or a voxel is not a finite number; ValueError if one lacks what the loss needs.
    """
    needed = {"clean": "clean", "recorrupted": "noise"}.get(settings.loss)
    if needed and any(getattr(material, needed) is None for material in materials):
        raise ValueError(f"loss {settings.loss} needs {needed} of every volume")
    learnt, held_out = [], []
    for material in materials:
        more, held = _split(_places(material), settings.hold_out)
        learnt += more
        held_out += held
    height, width = (min(settings.crop, *(len(material.part.spans[axis]) for material in materials)) for axis in (1, 2))
    return Triplets(settings, (height, width), tuple(learnt), tuple(held_out))


def training_runs(volume: Volume, z: Span) -> list[Span]:
    """Runs of consecutive slices, whole chunks deep, spread evenly over `z`; runs that touch are one."""
    depth = -(-RUN // volume.chunk[0]) * volume.chunk[0]
    starts = range(z.start // volume.chunk[0] * volume.chunk[0], z.stop, depth)
    number = min(len(starts), max(1, SLICES // depth))
    runs: list[Span] = []
    for start in sorted({starts[round(i)] for i in np.linspace(0, len(starts) - 1, number)}):
        run = Span(max(start, z.start), min(start + depth, z.stop))
        if runs and runs[-1].stop == run.start:
            runs[-1] = Span(runs[-1].start, run.stop)
        else:
            runs.append(run)
    return runs


def _places(material: Material) -> list[Place]:
    """All triplets that there are something to learn from. Raises InputError if there is none."""
    volume, part, mask = material.volume, material.part, material.mask
    runs = training_runs(volume, part.z)
    found = []
    for run in runs:
        statistics = _measured(volume, run)
        masked = None if mask is None else blocks_of(mask, Box(run, part.y, part.x))
        for z in range(run.start + 1, run.stop - 1):
            own, blocks = statistics.of(Span(z - 1, z + 2)), None if masked is None else masked[z - run.start]
            blank = min(own.std) == 0 or (blocks is not None and not blocks.any())
            if not blank and not {z - 1, z, z + 1}.intersection(material.without):
                found.append(Place(material, z, own, blocks))
    if not found:
        looked_at = ", ".join(f"{run.start}:{run.stop}" for run in runs)
        raise InputError(
            f"{volume.url} has no three consecutive slices to learn from in z={looked_at}: they are blank, too few, "
            f"{'' if mask is None else 'out of the mask, '}or noisy unlike the others (name the loss, and all slices "
            "count)"
        )
    return found


def _split(places: list[Place], share: float) -> tuple[list[Place], list[Place]]:
    """What to learn from, and that share, in the middle, to be held out; nothing if too much would be lost."""
    number = int(share * len(places))
    start = (len(places) - number) // 2
    held = places[start : start + number]
    touching = {place.z + apart for place in held for apart in range(-2, 3)}
    learnt = [place for place in places if place.z not in touching]
    return (learnt, held) if len(learnt) >= LEAST_LEFT * (1 - share) * len(places) else (places, [])


def _measured(volume: Volume, run: Span) -> SliceStatistics:
    outcomes = run_serially(partial(measure_box, volume), statistics_boxes(volume, run))
    return merge_boxes(measured(volume, outcome) for outcome in outcomes)


def _clean_slice(clean: Volume, z: int, box: Box) -> NDArray[Any]:
    """(y, x) voxels of the clean slice z. Raises InputError if one is not a finite number."""
    voxels: NDArray[Any] = read_box(clean, Box(Span(z, z + 1), box.y, box.x))[0]
    if not np.isfinite(voxels).all():
        raise InputError(f"{clean.url} holds NaN or infinite voxels in slice z={z}: replace them (with 0, say)")
    return voxels
