"""The whole program beside the network alone, on disk and on a far object store: python tests/benchmarks/efficiency.py

    PYTHONPATH=. python tests/benchmarks/efficiency.py [UNITS CHANNELS [Z,Y,X [TURNS]]]

In turns, the network alone before and after each run: how fast a machine is changes within the hour. The object store
is SeaweedFS, behind a proxy that holds every request back for 20 ms. Prints; gates nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from nrrn_pipeline.benchmark import Task, make_volume, run_benchmark
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.network import NRRN, save_weights
from nrrn_pipeline.volume import Volume, open_volume
from tests.faults.proxy import FaultProxy
from tests.servers import seaweedfs

DELAY_S = 0.02


def show(where: str, source: Volume, folder: str, weights: str) -> None:
    found = run_benchmark(Task(source, weights, folder), [])
    ours = found.measured[0]
    if ours.run.failure:
        sys.exit(f"{where}: {ours.run.failure}")
    ledger, spent = Ledger(open_volume(f"{folder}/nrrn.zarr").url), Counter[str]()
    for key in ledger.done():
        for record in ledger.records(key):
            spent.update(record.spent)
    before, after = (speed / 1e6 for speed in found.alone[0])
    print(
        f"{where}: {ours.run.seconds:.1f} s, {ours.speed / 1e6:.4f} million voxels/s, {found.efficiency:.1%} of the "
        f"network alone, {before:.4f} before and {after:.4f} after; memory {ours.run.peak_bytes / 1e6:.0f} MB; seconds "
        f"of all slabs: {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in spent.items())}",
        flush=True,
    )


def main(units: int = 4, channels: int = 64, shape: str = "64,512,512", turns: int = 2) -> None:
    z, y, x = map(int, shape.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = str(folder / "w.safetensors")
        save_weights(NRRN(units, channels), weights, {"note": "random, for speed alone"})
        (folder / "store").mkdir()
        with seaweedfs(folder / "store") as store, FaultProxy(store.endpoint, delay_s=DELAY_S) as proxy:
            store.make_bucket("lab")
            with replace(store, endpoint=proxy.endpoint).in_use():
                near = make_volume(folder / "raw.ome.zarr", (z, y, x))
                far = make_volume("s3://lab/raw.ome.zarr", (z, y, x))
                for turn in range(turns):
                    show("disk", near, str(folder / f"disk{turn}"), weights)
                    asked = len(proxy.requests)
                    show(f"S3, {DELAY_S * 1e3:.0f} ms away", far, f"s3://lab/out{turn}", weights)
                    print(f"{len(proxy.requests) - asked} requests", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4], *map(int, sys.argv[4:]))  # type: ignore[arg-type]
