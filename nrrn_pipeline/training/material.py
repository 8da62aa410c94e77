"""What training learns from: noisy volumes as users name them, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.planning import refuse_outside
from nrrn_pipeline.training.choosing import loss_for
from nrrn_pipeline.training.fit import AUTO, TrainSettings
from nrrn_pipeline.volume import Volume, open_volume
from nrrn_pipeline.volume_noise import measure_volume, noise_of

Location = str | os.PathLike[str]


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
        clean, mask = (None if url is None else open_volume(url, self.level) for url in (self.clean, self.mask))
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


def settled(settings: TrainSettings, materials: Sequence[Material]) -> tuple[TrainSettings, list[Material], str | None]:
    """The settings with a loss instead of auto; the volumes with their noise, where it needs it; why it was chosen.

    Raises InputError if the volumes and the loss do not go together, or the noise cannot be measured.
    """
    settings, found, why = _chosen(settings, list(materials))
    for material in found:
        _refuse_unfit(settings.loss, material)
    if settings.loss == "recorrupted":
        found = [
            material if material.noise else replace(material, noise=noise_of(material.volume, material.part))
            for material in found
        ]
    return settings, found, why


def _chosen(settings: TrainSettings, materials: list[Material]) -> tuple[TrainSettings, list[Material], str | None]:
    """Auto is clean where all volumes have clean slices; else it depends on the noise that is the least white."""
    if settings.loss != AUTO:
        return settings, materials, None
    if any(material.clean for material in materials):
        return replace(settings, loss="clean"), materials, "there are clean slices"
    try:
        found = [measure_volume(material.volume, material.part) for material in materials]
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
