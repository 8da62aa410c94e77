"""Random crops of slice triplets, streamed from volumes of any size."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import choose_device
from nrrn_pipeline.runners import run_serially
from nrrn_pipeline.statistics import SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.statistics_pass import measured
from nrrn_pipeline.training.ahead import made_ahead
from nrrn_pipeline.training.fit import HELD_OUT, LEARNT, TrainSettings
from nrrn_pipeline.training.masks import BLOCK, Blocks
from nrrn_pipeline.training.material import Material
from nrrn_pipeline.training.processes import ALONE, Processes
from nrrn_pipeline.training.recorruption import recorrupted
from nrrn_pipeline.volume import Volume, read_box

KEPT_BYTES = 2**28  # of voxels that are held in memory, if all that is learnt from is no more
AHEAD_OF_GPU = 4  # threads
LEAST_LEFT = 0.7  # of what holding slices out should leave: those next to them are lost too

Kept = tuple[Box, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Place:
    """A triplet to take crops from: slices z - 1, z, z + 1, and their statistics.

    blocks: those of its centre slice that have something to learn from; None: all have. kept: what is held in memory
    of the volume and the clean one, by their URL: the voxels of a box.
    """

    material: Material
    z: int
    statistics: SliceStatistics
    blocks: Blocks | None
    kept: Mapping[str, Kept]

    def corner(self, size: tuple[int, int], random: np.random.Generator) -> tuple[int, int]:
        """Where a crop of `size` (y, x) begins: anywhere in the part, or around any voxel of a block."""
        spans = self.material.part.spans[1:]
        if self.blocks is None:
            y, x = (of.start + random.integers(len(of) - n + 1) for of, n in zip(spans, size, strict=True))
        else:
            there = np.argwhere(self.blocks)
            wanted = there[random.integers(len(there))] * BLOCK + random.integers(BLOCK, size=2) - np.array(size) // 2
            y, x = (min(max(at, of.start), of.stop - n) for at, of, n in zip(wanted, spans, size, strict=True))
        return int(y), int(x)

    def read(self, volume: Volume, box: Box) -> NDArray[Any]:
        """Voxels of the volume, or the clean one, from memory or storage."""
        if volume.url not in self.kept:
            return read_box(volume, box)
        origin, voxels = self.kept[volume.url]
        return voxels[box.within(origin)]


@dataclass(frozen=True)
class Triplets:
    """Crops at random places, randomly flipped, each slice z-scored as a whole; float32.

    crop: voxels along y, x. learnt: the triplets that batches come from; held_out: others, which share no slice with
    these; share: the crops of each batch that are made here; threads: as many batches are made ahead. Batches are
    (n, 3, y, x). For loss clean, (n, 4, y, x): last the clean centre slice, by the noisy one's mean and standard
    deviation. For loss recorrupted, (n, 4, y, x): the centre slice is recorrupted, and last is what is asked for.
    """

    settings: TrainSettings
    crop: tuple[int, int]
    learnt: tuple[Place, ...]
    held_out: tuple[Place, ...]
    share: range
    threads: int = 1

    def batches(self, first: int = 0) -> Generator[Tensor, None, None]:
        """Endless, seeded: same settings, same batches; `first` is the number of the one to begin with. To be closed.

        Raises InputError for a clean voxel that is not a finite number.
        """
        return made_ahead(partial(self._batch, self.learnt, LEARNT), first, self.threads)

    def validation(self, batches: int) -> list[Tensor]:
        """So many of what is held out, always the same; none if nothing is."""
        return [self._batch(self.held_out, HELD_OUT, number) for number in range(batches if self.held_out else 0)]

    def held_out_of(self, material: Material) -> list[int]:
        """The centre slices of a volume that are held out."""
        return sorted(place.z for place in self.held_out if place.material is material)

    def _batch(self, places: tuple[Place, ...], *key: int) -> Tensor:
        """Of one batch what is made here; each crop's random numbers are its own, whatever else was drawn."""
        randoms = (np.random.default_rng((self.settings.seed, *key, crop)) for crop in self.share)
        return torch.from_numpy(np.stack([self._crop(places, random) for random in randoms]))

    def _crop(self, places: tuple[Place, ...], random: np.random.Generator) -> NDArray[np.float32]:
        """(3 or 4, y, x)."""
        place = places[random.integers(len(places))]
        of, z, (height, width) = place.material, place.z, self.crop
        y, x = place.corner(self.crop, random)
        box = Box(Span(z - 1, z + 2), Span(y, y + height), Span(x, x + width))
        mean, std = (np.array(own, np.float32)[:, None, None] for own in (place.statistics.mean, place.statistics.std))
        voxels = place.read(of.volume, box)
        crop = [*((voxels - mean) / std)]
        if self.settings.loss == "clean" and of.clean is not None:
            crop.append((_finite(of.clean, place, Box(Span(z, z + 1), box.y, box.x))[0] - mean[1]) / std[1])
        elif self.settings.loss == "recorrupted" and of.noise is not None:
            seen, asked = recorrupted(voxels, of.noise.model, random)
            crop[1] = (seen - mean[1]) / std[1]
            crop.append((asked - mean[1]) / std[1])
        flips = tuple(axis for axis in (1, 2) if random.integers(2))
        return np.flip(np.stack(crop), flips).astype(np.float32)


def triplets(materials: Sequence[Material], settings: TrainSettings, processes: Processes = ALONE) -> Triplets:
    """What to train on: all triplets of all materials, drawn alike often; of each volume a share is held out.

    Blank slices and those left out are in none. Crops are no larger than the smallest part. Materials and loss are
    those of material.settled.

    Raises InputError if a volume has no three consecutive slices with images, or with something of the mask in the
    middle one; or a voxel is not a finite number, or the processes cannot share a batch; ValueError if one lacks what
    the loss needs.
    """
    needed = {"clean": "clean", "recorrupted": "noise"}.get(settings.loss)
    if needed and any(getattr(material, needed) is None for material in materials):
        raise ValueError(f"loss {settings.loss} needs {needed} of every volume")
    learnt, held_out = [], []
    by_volume: dict[str, list[Place]] = {}
    keep = sum(map(_bytes_of, materials)) <= KEPT_BYTES
    for material in materials:
        by_volume.setdefault(material.volume.url, []).extend(_places(material, keep))
    for places in by_volume.values():
        more, held = _split(places, settings.hold_out)
        learnt += more
        held_out += held
    height, width = (min(settings.crop, *(len(material.part.spans[axis]) for material in materials)) for axis in (1, 2))
    threads = AHEAD_OF_GPU if choose_device(settings.device).type == "cuda" else 1
    share = processes.share(settings.batch)
    return Triplets(settings, (height, width), tuple(learnt), tuple(held_out), share, threads)


def _bytes_of(material: Material) -> int:
    """All that is learnt from."""
    sizes = (len(run) * len(material.part.y) * len(material.part.x) for run in material.runs)
    return sum(sizes) * sum(of.itemsize for of in material.volumes)


def _places(material: Material, keep: bool) -> list[Place]:
    """All triplets that there is something to learn from. Raises InputError if there is none."""
    masked, found = material.masked(), []
    for run in material.runs:
        statistics = _measured(material.volume, run)
        box = Box(run, material.part.y, material.part.x)
        kept = {of.url: (box, read_box(of, box)) for of in material.volumes} if keep else {}
        for z in range(run.start + 1, run.stop - 1):
            own, blocks = statistics.of(Span(z - 1, z + 2)), None if masked is None else masked[z]
            blank = min(own.std) == 0 or (blocks is not None and not blocks.any())
            if not blank and not {z - 1, z, z + 1}.intersection(material.without):
                found.append(Place(material, z, own, blocks, kept))
    if not found:
        looked_at = ", ".join(map(str, material.runs))
        raise InputError(
            f"{material.volume.url} has no three consecutive slices to learn from in z={looked_at}: they are blank, "
            f"too few, {'' if masked is None else 'out of the mask, '}or noisy unlike the others (name the loss, and "
            "all slices count)"
        )
    return found


def _split(places: list[Place], share: float) -> tuple[list[Place], list[Place]]:
    """Of one volume's, what to learn from, and that share, in the middle, to be held out; nothing if too much is lost.

    Parts of it may overlap.
    """
    places = sorted(places, key=lambda place: place.z)
    number = int(share * len(places))
    start = (len(places) - number) // 2
    held = places[start : start + number]
    touching = {place.z + apart for place in held for apart in range(-2, 3)}
    learnt = [place for place in places if place.z not in touching]
    return (learnt, held) if len(learnt) >= LEAST_LEFT * (1 - share) * len(places) else (places, [])


def _measured(volume: Volume, run: Span) -> SliceStatistics:
    outcomes = run_serially(partial(measure_box, volume), statistics_boxes(volume, run))
    return merge_boxes(measured(volume, outcome) for outcome in outcomes)


def _finite(clean: Volume, place: Place, box: Box) -> NDArray[Any]:
    """(z, y, x) clean voxels. Raises InputError if one is not a finite number."""
    voxels = place.read(clean, box)
    if not np.isfinite(voxels).all():
        raise InputError.not_finite(clean.url, box.z.start)
    return voxels
