"""What training learns from: noisy volumes as users name them, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.training.choosing import loss_for
from nrrn_pipeline.training.fit import AUTO, TrainSettings
from nrrn_pipeline.training.masks import Blocks, best_window, blocks_of
from nrrn_pipeline.volume import DTYPES, Volume, open_volume
from nrrn_pipeline.volume_noise import measure_volume, noise_of

Location = str | os.PathLike[str]

MASK_DTYPES = (*DTYPES, "bool")
SLICES = 128  # enough to train on; more would cost a pass over the whole volume for their statistics
RUN = 16  # consecutive slices read together, or a chunk's depth if that is more; no more than SLICES


@dataclass(frozen=True)
class TrainingVolume:
    """A noisy volume to train on, `level` of its pyramid.

    clean: the same voxels without noise, for loss clean. mask: not 0 where there is something to learn from, of the
    same shape. roi: the part to learn from, in the level's voxels; all of it, unless told.
    """

    source: Location
    clean: Location | None = None
    mask: Location | None = None
    roi: Box | None = None
    level: int = 0

    def opened(self) -> Material:
        """Raises InputError if something is not there, or does not fit the noisy volume."""
        volume = open_volume(self.source, self.level)
        clean = None if self.clean is None else open_volume(self.clean, self.level)
        mask = None if self.mask is None else open_volume(self.mask, self.level, MASK_DTYPES)
        if clean is not None and (clean.shape, clean.dtype) != (volume.shape, volume.dtype):
            raise InputError(
                f"{clean.url} has shape {clean.shape} and dtype {clean.dtype}, {volume.url} {volume.shape} and "
                f"{volume.dtype}: give the clean volume of the same voxels, in the same dtype"
            )
        if mask is not None and mask.shape != volume.shape:
            raise InputError(
                f"the mask {mask.url} has shape {mask.shape}, {volume.url} {volume.shape}: give one of the same voxels"
            )
        if self.roi is not None:
            refuse_outside(self.roi, volume.box)
        return Material(volume, self.roi or volume.box, clean, mask)


@dataclass(frozen=True)
class Material:
    """An opened training volume: the `part` of it to learn from; its noise, if the loss needs it; slices left out."""

    volume: Volume
    part: Box
    clean: Volume | None = None
    mask: Volume | None = None
    noise: NoiseCurve | None = None
    without: tuple[int, ...] = ()

    @property
    def volumes(self) -> list[Volume]:
        """That crops are read from."""
        return [self.volume] if self.clean is None else [self.volume, self.clean]

    @property
    def runs(self) -> list[Span]:
        """About SLICES slices to learn from."""
        return training_runs(self.volume, self.part.z)

    def masked(self) -> dict[int, Blocks] | None:
        """Of each slice (z) of the runs, which blocks the mask leaves; read anew. None without a mask.

        Raises InputError if it leaves none.
        """
        if self.mask is None:
            return None
        found: dict[int, Blocks] = {}
        for run in self.runs:
            found |= zip(range(run.start, run.stop), blocks_of(self.mask, Box(run, *self.part.spans[1:])), strict=True)
        if not any(own.any() for own in found.values()):
            looked_at = ", ".join(map(str, self.runs))
            raise InputError(
                f"the mask {self.mask.url} leaves nothing of {self.part} in z={looked_at}, where it was looked at: "
                "give a --roi where it does, or another mask"
            )
        return found


def training_runs(volume: Volume, z: Span) -> list[Span]:
    """Runs of consecutive slices, from the first of a chunk on, spread evenly over `z`; runs that touch are one.

    About SLICES in all, or all there are.
    """
    if len(z) <= SLICES:
        return [z]
    chunk = volume.chunk[0]
    depth = -(-RUN // chunk) * chunk
    cells = [
        Span(max(start, z.start), min(start + depth, z.stop))
        for start in range(z.start // chunk * chunk, z.stop, depth)
    ]
    least = max(3, (min(depth, SLICES) - RUN) // 2)  # what the ends of the part leave of deep chunks is little
    whole = [Span(cell.start, min(cell.stop, cell.start + SLICES)) for cell in cells if len(cell) >= least]
    number = min(len(whole), max(1, SLICES // depth))
    places = np.linspace(0, len(whole) - 1, number) if number > 1 else [len(whole) // 2]
    runs: list[Span] = []
    for run in (whole[i] for i in sorted({round(place) for place in places})):
        touching = runs and runs[-1].stop == run.start
        runs = [*runs[:-1], Span(runs[-1].start, run.stop)] if touching else [*runs, run]
    return runs


def settled(settings: TrainSettings, materials: Sequence[Material]) -> tuple[TrainSettings, list[Material], str | None]:
    """The settings with a loss instead of auto; the volumes with their noise, where it needs it; why it was chosen.

    Raises InputError if the volumes and the loss do not go together, or the noise cannot be measured.
    """
    settings, found, why = _chosen(settings, list(materials))
    for material in found:
        _refuse_unfit(settings.loss, material)
    if settings.loss == "recorrupted":
        found = [of if of.noise else replace(of, noise=noise_of(of.volume, _measured_in(of))) for of in found]
    return settings, found, why


def _measured_in(material: Material) -> Box:
    """Where noise is measured: in the part, or where the mask leaves most of it."""
    blocks = material.masked()
    return material.part if blocks is None else best_window(blocks, material.part)


def _chosen(settings: TrainSettings, materials: list[Material]) -> tuple[TrainSettings, list[Material], str | None]:
    """Auto is clean where there are clean slices; else it depends on the noise that is the least white."""
    if settings.loss != AUTO:
        return settings, materials, None
    if any(material.clean for material in materials):
        return replace(settings, loss="clean"), materials, "there are clean slices"
    places = [_measured_in(material) for material in materials]
    try:
        found = [measure_volume(material.volume, place) for material, place in zip(materials, places, strict=True)]
    except InputError as error:
        raise InputError(f"the volume's noise cannot choose a loss: {error}; or name the loss yourself") from error
    loss, why = loss_for(max(found, key=lambda of: of.most_shared), settings.architecture)
    known = [
        replace(material, noise=noise.curve, without=noise.outliers)
        for material, noise in zip(materials, found, strict=True)
    ]
    return replace(settings, loss=loss), known, why


def _refuse_unfit(loss: str, material: Material) -> None:
    clean, url = material.clean, material.volume.url
    if (clean is None) == (loss == "clean"):
        raise InputError(
            f"loss clean needs the clean volume beside the noisy one, {url}: name it, or use loss recorrupted or "
            "blind-spot"
            if clean is None
            else f"loss {loss} needs no clean volume: leave {clean.url} out, or use loss clean"
        )
