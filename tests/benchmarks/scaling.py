"""How well slabs keep workers busy, with a network that only sleeps: a table of 1 to 32 workers.

    python tests/benchmarks/scaling.py [SECONDS [WORKERS...]]

Each row does the same 2,000 slabs, and would take SECONDS (default 60) if workers did nothing but sleep: a slab sleeps
as long as that takes. So scheduler, storage and driver have the same slabs a second to deal with in every row, and a
single worker has the least time for each. Times gate nothing; that every slab is done does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from nrrn_pipeline import Layout, Options
from nrrn_pipeline.cluster import local_client
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner
from tests.support import bare_zarr, tiny_weights

SLABS, SIDE = 2000, 16
WORKERS = (1, 2, 4, 8, 16, 32)


def sleep_instead(seconds: float) -> None:
    """In this process slabs sleep, where they would compute."""
    from nrrn_pipeline import slab

    class Sleeping:
        def lanes(self, _: int) -> int:
            return 1

        def __call__(self, stack: Any) -> Any:
            time.sleep(seconds)
            return stack[1:-1]

    slab.load_network = lambda *_: (Sleeping(), "")


def seconds_for(client: Client, workers: int, folder: Path, seconds: float) -> float:
    client.run(sleep_instead, seconds * workers / SLABS)
    layout = Layout(chunk=(1, SIDE, SIDE), shard=(1, SIDE, SIDE))
    output = folder / f"{workers}.zarr"
    plan = make_plan(folder / "raw.zarr", output, folder / "w.safetensors", Options(layout=layout, device="cpu"))
    began = ended = 0.0
    for progress in run_plan(plan, DaskRunner(client), "cpu"):
        if progress.stage == "denoising":
            began = began or time.monotonic()  # statistics are measured, and the output is claimed
            ended = time.monotonic()
    done = Ledger(plan.target.url).done()
    assert len(done) == SLABS, f"{len(done)} slabs"
    return ended - began


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    counts = sorted(map(int, sys.argv[2:] or WORKERS), reverse=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        bare_zarr(folder / "raw.zarr", rng.integers(0, 256, (SLABS, SIDE, SIDE), np.uint8), (100, SIDE, SIDE))
        tiny_weights(folder / "w.safetensors")
        print(f"{SLABS} slabs, {seconds:g} s of sleep for each worker\nworkers  seconds  slabs/s  efficiency")
        with local_client(counts[0], slabs_each=2) as client:
            for workers in counts:
                client.cluster.scale(workers)
                while len(client.nthreads()) != workers:
                    time.sleep(0.1)
                took = seconds_for(client, workers, folder, seconds)
                print(f"{workers:7}  {took:7.1f}  {SLABS / took:7.1f}  {seconds / took:9.1%}", flush=True)


if __name__ == "__main__":
    main()
