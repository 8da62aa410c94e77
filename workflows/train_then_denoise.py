"""Train on a noisy volume itself, try it on a region, denoise all: python workflows/train_then_denoise.py SRC FOLDER

FOLDER gets weights.safetensors, trial.zarr (a region, exactly as the full run will be) and denoised.zarr. What is there
already is used: run it again after any interruption.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from nrrn_pipeline import Box, NrrnError, Options, TrainSettings, denoise, open_volume, train

OPTIONS = Options()
SETTINGS = TrainSettings()  # minutes on a few cores; the paper's network has units=4, channels=64


def main(source: str, folder: str, settings: TrainSettings = SETTINGS, options: Options = OPTIONS) -> None:
    """Weights, a trial, the whole volume."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    weights = place / "weights.safetensors"
    if not weights.exists():
        record = train(source, weights, settings)
        print(f"trained for {record['seconds']} s: {record['loss']}", flush=True)
    z, y, x = open_volume(source).shape
    middle = Box.parse(f"{z // 2}:{min(z // 2 + 8, z)},0:{min(y, 512)},0:{min(x, 512)}")
    denoise(source, place / "trial.zarr", weights, replace(options, roi=middle))
    print(f"look at {place / 'trial.zarr'} while the rest is done", flush=True)
    summary = denoise(source, place / "denoised.zarr", weights, options)
    print(f"{place / 'denoised.zarr'}: {summary.slabs} slabs in {summary.seconds:.0f} s")


if __name__ == "__main__":  # as all that starts processes
    try:
        main(*sys.argv[1:3])
    except NrrnError as error:
        sys.exit(f"{error}")
