"""The whole program beside the network alone, on disk and on a far object store: python tests/benchmarks/efficiency.py

    PYTHONPATH=. python tests/benchmarks/efficiency.py [UNITS CHANNELS [Z,Y,X [disk|s3]]]

Without a fourth word it does both. The object store is SeaweedFS, behind a proxy that holds every request back for
20 ms. Prints; gates nothing.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from nrrn_pipeline.benchmark import Task, make_volume, run_benchmark
from nrrn_pipeline.network import NRRN, save_weights
from tests.faults.proxy import FaultProxy
from tests.servers import seaweedfs

DELAY_S = 0.02
TURNS = 2  # the best counts, of the network alone too


def show(where: str, volume_at: str, folder: str, weights: str, shape: tuple[int, int, int]) -> None:
    found = run_benchmark(Task(make_volume(volume_at, shape), weights, folder, turns=TURNS), [])
    run = found.measured[0].run
    print(
        f"{where}: {run.seconds:.1f} s{run.failure}, {found.measured[0].speed / 1e6:.4f} million voxels/s; the network "
        f"alone {found.alone / 1e6:.4f}; {found.efficiency or 0:.1%} of that; memory {run.peak_bytes / 1e6:.0f} MB",
        flush=True,
    )


def main(units: int = 4, channels: int = 64, shape: str = "64,512,512", where: str = "disk s3") -> None:
    z, y, x = map(int, shape.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = str(folder / "w.safetensors")
        save_weights(NRRN(units, channels), weights, {"note": "random, for speed alone"})
        if "disk" in where:
            show("disk", str(folder / "raw.ome.zarr"), str(folder / "disk"), weights, (z, y, x))
        if "s3" not in where:
            return
        (folder / "store").mkdir()
        with seaweedfs(folder / "store") as store, FaultProxy(store.endpoint, delay_s=DELAY_S) as proxy:
            store.make_bucket("lab")
            with replace(store, endpoint=proxy.endpoint).in_use():
                show(f"S3, {DELAY_S * 1e3:.0f} ms away", "s3://lab/raw.ome.zarr", "s3://lab/out", weights, (z, y, x))
            print(f"{len(proxy.requests)} requests")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])  # type: ignore[arg-type]
