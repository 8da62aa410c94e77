"""Train weights that are shipped: python workflows/shipped_weights.py NAME FIB25.npz FOLDER [--device cuda]

NAME is nrrn-fast (half an hour on two cores) or nrrn-4x64 (for a GPU). FIB25.npz holds the FlyEM FIB-25 training
sample 1 (250 x 250 x 250 uint8 under "volume", CC BY); slices 0 to 195 alone are learnt from, with noise of many kinds
and strengths added, so that the weights need not be told how noisy a volume is. FOLDER gets NAME.safetensors, which
belongs in nrrn_pipeline/shipped, beside its model card. Run it again after any interruption: it goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr

from nrrn_pipeline import Noise, NrrnError, Options, TrainingVolume, TrainSettings, TrainWatch, add_noise, train
from nrrn_pipeline.network import load_weights, save_weights

LEARNT = 196  # slices
NOISES = [Noise(sigma=sigma, seed=sigma) for sigma in (5, 10, 20, 30, 45, 60, 75)]
NOISES += [Noise(peak=peak, seed=100 + peak) for peak in (1, 2, 4, 8, 16, 30, 50)]
SETTINGS = {
    "nrrn-fast": TrainSettings(units=3, channels=16, steps=4000, seed=1, loss="clean"),
    "nrrn-4x64": TrainSettings(units=4, channels=64, steps=20000, batch=16, crop=128, seed=1, loss="clean"),
}
SOURCE = (
    "FlyEM FIB-25, training sample 1 (CC BY), slices 0-195, with normal noise of sigma 5 to 75 grey levels added, or "
    "as counts of peak 1 to 50"
)
NOTE = "for a first look at FIB-SEM of neurons, with white noise of any strength; other data wants weights of its own"


def main(name: str, source: Path, folder: Path, device: str) -> None:
    """Noise, train, save."""
    clean = folder / "fib25.zarr"
    if not clean.exists():
        zarr.create_array(clean, data=np.load(source)["volume"][:LEARNT], chunks=(8, 128, 128))
    volumes = []
    for noise in NOISES:
        noisy = folder / f"fib25-{noise.sigma:g}-{noise.peak or 0:g}.zarr"
        add_noise(clean, noisy, noise, Options(cluster="serial"))
        volumes.append(TrainingVolume(noisy, clean))
    trained, weights = folder / f"{name}-as-trained.safetensors", folder / f"{name}.safetensors"
    settings = replace(SETTINGS[name], device=device)
    watch = TrainWatch(step=lambda step, loss: step % 100 or print(f"step {step}: loss {loss:.4f}"))
    record = train(volumes, trained, settings, watch)
    for told, volume in zip(record["volumes"], volumes, strict=True):  # where they lay is of no use to others
        told |= {"source": Path(volume.source).name, "clean": clean.name}
    save_weights(load_weights(trained), weights, record | {"source": SOURCE, "note": NOTE})
    print(f"{weights}: {record['seconds']} s, at its best after {record['validation']['best_step']} steps")


if __name__ == "__main__":  # as all that starts processes
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("name", choices=SETTINGS)
    words.add_argument("source", type=Path)
    words.add_argument("folder", type=Path)
    words.add_argument("--device", default="auto")
    given = words.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        main(given.name, given.source, given.folder, given.device)
    except NrrnError as error:
        sys.exit(f"{error}")
