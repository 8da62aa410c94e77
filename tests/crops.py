"""Crops to train on, of one volume."""

from __future__ import annotations

from typing import Any

from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.training.material import Material
from nrrn_pipeline.training.triplets import Triplets, triplets
from nrrn_pipeline.volume import Volume


def crops_of(volume: Volume, settings: TrainSettings, noise: NoiseModel | None = None, **known: Any) -> Triplets:
    """What is learnt of a volume of which nothing is known but this."""
    curve = None if noise is None else NoiseCurve((1.0,), (1.0,), noise)
    return triplets([Material(volume, known.pop("part", volume.box), noise=curve, **known)], settings)
