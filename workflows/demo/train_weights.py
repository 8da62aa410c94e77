"""Train the demo's weights: python workflows/demo/train_weights.py FIB25.npz OUT.safetensors

FIB25.npz holds the FlyEM FIB-25 training sample 1 (250 x 250 x 250 uint8 under "volume", CC BY). Training sees the
noisy version of slices 0 to 195 alone; the demo's crop starts at slice 206.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sample import add_noise, write_ome_zarr

from nrrn_pipeline import TrainSettings, TrainWatch, train
from nrrn_pipeline.network import load_weights, save_weights

SOURCE = "FlyEM FIB-25, training sample 1 (CC BY), slices 0-195, Gaussian noise of sigma 30 grey levels added, seed 25"
NOTE = "For the demo: a small network for one kind of data and noise. Train on your own volume before you use it."
SETTINGS = TrainSettings(steps=2400, seed=1)


def main(source: str, weights: str) -> None:
    """Noise, train, save."""
    noisy = add_noise(np.load(source)["volume"][:196], seed=25)
    with TemporaryDirectory() as folder:
        volume = Path(folder) / "fib25_z0-195_sigma30_seed25.ome.zarr"
        write_ome_zarr(volume, noisy)
        told = TrainWatch(step=lambda step, loss: step % 100 or print(f"step {step}: loss {loss:.4f}"))
        record = train(volume, weights, SETTINGS, told)
    save_weights(load_weights(weights), weights, record | {"source": SOURCE, "note": NOTE})


if __name__ == "__main__":
    main(*sys.argv[1:])
