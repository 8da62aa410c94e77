"""Train on a noisy volume itself, try it on a region, denoise all: python workflows/train_then_denoise.py SRC FOLDER

FOLDER gets weights.safetensors, report/training.html (how training went), report/index.html (a region, exactly as the
full run will be, beside filters) and denoised.zarr. What is there already is used: run it again after any interruption.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from nrrn_pipeline import (
    Box,
    NrrnError,
    Options,
    TrainSettings,
    candidates,
    compare,
    denoise,
    open_volume,
    train,
    write_results,
    write_training_page,
)

OPTIONS = Options()
SETTINGS = TrainSettings()  # minutes on a few cores; the paper's network has units=4, channels=64


def main(source: str, folder: str, settings: TrainSettings = SETTINGS, options: Options = OPTIONS) -> None:
    """Weights, a report on a region, the whole volume."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    weights = place / "weights.safetensors"
    if not weights.exists():
        record = train(source, weights, settings)
        print(f"trained for {record['seconds']} s: {record['loss']}", flush=True)
    z, y, x = open_volume(source).shape
    middle = Box.parse(f"{z // 2}:{min(z // 2 + 8, z)},0:{min(y, 512)},0:{min(x, 512)}")
    report = str(place / "report")
    training = place / "report/training.html"
    training.parent.mkdir(exist_ok=True)
    if not training.exists():
        write_training_page(weights, training, options.device)
    methods = candidates(f"mean,gaussian-avg,nlm-avg,nrrn={weights}", [])
    write_results(compare(source, report, methods, replace(options, roi=middle)), report, {"region": str(middle)})
    print(f"look at {training} and {report}/index.html while the rest is done", flush=True)
    summary = denoise(source, place / "denoised.zarr", weights, options)
    print(f"{place / 'denoised.zarr'}: {summary.slabs} slabs in {summary.seconds:.0f} s")


if __name__ == "__main__":  # as all that starts processes
    try:
        main(*sys.argv[1:3])
    except NrrnError as error:
        sys.exit(f"{error}")
