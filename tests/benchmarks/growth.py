"""Seconds a gigavoxel for volumes of 1, 4 and 16 times a size: python tests/benchmarks/growth.py [UNITS CHANNELS]

Without the workers' start. Prints; gates nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from nrrn_pipeline import denoise
from nrrn_pipeline.benchmark import make_volume
from nrrn_pipeline.network import NRRN, save_weights

SHAPES = ((64, 512, 512), (64, 1024, 1024), (256, 1024, 1024))


def main(units: int = 1, channels: int = 4) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_weights(NRRN(units, channels), folder / "w.safetensors", {"note": "random, for speed alone"})
        for shape in SHAPES:
            name = "x".join(map(str, shape))
            source = make_volume(folder / f"{name}.ome.zarr", shape)
            found = denoise(source.group_url, folder / f"{name}.out.zarr", folder / "w.safetensors")
            print(
                f"{name}: {found.seconds:.1f} s, {found.seconds / found.voxels * 1e9:.1f} s a gigavoxel, "
                f"{found.slabs} slabs, peak memory of a worker {found.peak_memory_bytes / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
