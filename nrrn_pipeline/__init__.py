"""Denoise whole FIB-SEM volumes with NRRN.

Names are looked up when they are first used, so that `nrrn_pipeline.network` imports where there is torch and NumPy
alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrrn_pipeline.api import Options, denoise, plan, train
    from nrrn_pipeline.errors import InputError, NrrnError, RunError
    from nrrn_pipeline.planning import Layout
    from nrrn_pipeline.training.fit import TrainSettings
    from nrrn_pipeline.volume import open_volume

__all__ = [
    "InputError",
    "Layout",
    "NrrnError",
    "Options",
    "RunError",
    "TrainSettings",
    "denoise",
    "open_volume",
    "plan",
    "train",
]

_HOMES = {
    "api": ("Options", "denoise", "plan", "train"),
    "errors": ("InputError", "NrrnError", "RunError"),
    "planning": ("Layout",),
    "training.fit": ("TrainSettings",),
    "volume": ("open_volume",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"nrrn_pipeline.{home}"), name)
    raise AttributeError(f"module 'nrrn_pipeline' has no attribute {name!r}")
