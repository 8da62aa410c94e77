"""Denoise whole FIB-SEM volumes with NRRN.

Names are looked up when they are first used, so that `nrrn_pipeline.network` imports where there is torch and NumPy
alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrrn_pipeline.aligning import align, measure_drift
    from nrrn_pipeline.api import RunWatch, add_levels, add_noise, denoise, import_weights, plan, repair, status, verify
    from nrrn_pipeline.batch import read_manifest, run_batch
    from nrrn_pipeline.cli.terminal import showing_progress
    from nrrn_pipeline.comparing import Yardstick, candidates, compare, write_results
    from nrrn_pipeline.errors import InputError, NrrnError, RunError, SlabsFailedError, StorageError
    from nrrn_pipeline.exporting import export, export_zarr
    from nrrn_pipeline.following import Following, follow
    from nrrn_pipeline.geometry import Box
    from nrrn_pipeline.ingesting import Intake, ingest
    from nrrn_pipeline.noise import Noise
    from nrrn_pipeline.options import Options
    from nrrn_pipeline.places import using_options
    from nrrn_pipeline.planning import Method
    from nrrn_pipeline.previewing import preview, write_preview
    from nrrn_pipeline.run_page import write_report
    from nrrn_pipeline.slabs import Layout
    from nrrn_pipeline.training.fit import TrainSettings, TrainWatch
    from nrrn_pipeline.training.material import TrainingVolume
    from nrrn_pipeline.training.train import train
    from nrrn_pipeline.training_page import write_training_page
    from nrrn_pipeline.volume import open_volume

__all__ = [
    "Box",
    "Following",
    "InputError",
    "Intake",
    "Layout",
    "Method",
    "Noise",
    "NrrnError",
    "Options",
    "RunError",
    "RunWatch",
    "SlabsFailedError",
    "StorageError",
    "TrainSettings",
    "TrainWatch",
    "TrainingVolume",
    "Yardstick",
    "add_levels",
    "add_noise",
    "align",
    "candidates",
    "compare",
    "denoise",
    "export",
    "export_zarr",
    "follow",
    "import_weights",
    "ingest",
    "measure_drift",
    "open_volume",
    "plan",
    "preview",
    "read_manifest",
    "repair",
    "run_batch",
    "showing_progress",
    "status",
    "train",
    "using_options",
    "verify",
    "write_preview",
    "write_report",
    "write_results",
    "write_training_page",
]

_HOMES = {
    "aligning": ("align", "measure_drift"),
    "api": ("RunWatch", "add_levels", "add_noise", "denoise", "import_weights", "plan", "repair", "status", "verify"),
    "batch": ("read_manifest", "run_batch"),
    "cli.terminal": ("showing_progress",),
    "comparing": ("Yardstick", "candidates", "compare", "write_results"),
    "errors": ("InputError", "NrrnError", "RunError", "SlabsFailedError", "StorageError"),
    "following": ("Following", "follow"),
    "exporting": ("export", "export_zarr"),
    "geometry": ("Box",),
    "ingesting": ("Intake", "ingest"),
    "noise": ("Noise",),
    "options": ("Options",),
    "places": ("using_options",),
    "planning": ("Method",),
    "previewing": ("preview", "write_preview"),
    "run_page": ("write_report",),
    "slabs": ("Layout",),
    "training.fit": ("TrainSettings", "TrainWatch"),
    "training.material": ("TrainingVolume",),
    "training.train": ("train",),
    "training_page": ("write_training_page",),
    "volume": ("open_volume",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"nrrn_pipeline.{home}"), name)
    raise AttributeError(f"module 'nrrn_pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
