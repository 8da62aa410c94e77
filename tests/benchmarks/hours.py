"""Hours for volumes of 0.1 to 100 teravoxels, as `nrrn plan` foretells them: python tests/benchmarks/hours.py

Hours here are of all cores, from one timed tile. GPU-hours are arithmetic alone: what the network computes, by the
TFLOP/s that a GPU is said to sustain, the only argument (100). The largest takes wider shards, lest it has too many.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import zarr

from nrrn_pipeline import Layout, Options, plan
from nrrn_pipeline.network import NRRN, save_weights

SHAPES = {0.1: (4000, 5000, 5000), 1.0: (8000, 10000, 12500), 10.0: (16000, 25000, 25000), 100.0: (40000, 50000, 50000)}

WIDE = Layout(shard=(128, 1024, 1024))


def main(sustained: float = 100.0) -> None:
    print(
        f"| teravoxels | network | slabs | read, TB | written, TB | hours here | GPU-hours at {sustained:g} TFLOP/s |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_weights(NRRN(4, 64), folder / "4x64.safetensors", {"note": "random, for speed alone"})
        for teravoxels, shape in SHAPES.items():
            source = folder / f"{teravoxels}.zarr"  # without a chunk: planning reads no voxels
            zarr.create_array(source, shape=shape, dtype="uint8", chunks=(16, 256, 256), shards=(64, 1024, 1024))
            for name, weights in {
                "nrrn-fast": "nrrn-fast",
                "4 units, 64 channels": folder / "4x64.safetensors",
            }.items():
                found = plan(
                    source, folder / "out.zarr", weights, Options(layout=WIDE if teravoxels > 10 else Layout())
                )
                cost = found.cost
                print(
                    f"| {teravoxels:g} | {name} | {cost.slabs:,} | {cost.fetched_bytes / 1e12:.1f} | "
                    f"{cost.written_bytes / 1e12:.1f} | {found.seconds / 3600:,.0f} | "
                    f"{cost.flop / sustained / 1e12 / 3600:,.3g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
