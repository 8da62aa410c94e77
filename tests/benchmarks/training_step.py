"""What reading crops adds to a step of training: python tests/benchmarks/training_step.py SRC.zarr [STEPS]

Steps on crops of the volume as `nrrn train` takes them, from memory and from storage, beside steps on one batch that is
there already: forward, backward, update and nothing else. Each is timed three times, in turn; prints, gates nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from time import perf_counter

from torch import Tensor

from nrrn_pipeline import TrainingVolume, TrainSettings
from nrrn_pipeline.training import triplets
from nrrn_pipeline.training.fit import Training
from nrrn_pipeline.training.material import settled


def measure(source: str, steps: int) -> None:
    """Milliseconds a step."""
    settings, materials, _ = settled(TrainSettings(), [TrainingVolume(source).opened()])
    training, held = Training(settings), triplets.triplets(materials, settings)
    triplets.KEPT_BYTES = 0
    read = triplets.triplets(materials, settings)

    def per_step(batches: Iterator[Tensor]) -> float:
        training.take(next(batches))
        started = perf_counter()
        for _ in range(steps):
            training.take(next(batches))
        return (perf_counter() - started) / steps * 1000

    with closing(held.batches()) as from_memory, closing(read.batches()) as from_storage:
        ways = {"one batch": repeat(next(from_memory)), "from memory": from_memory, "from storage": from_storage}
        for _ in range(3):
            print(", ".join(f"{name} {per_step(batches):.0f} ms" for name, batches in ways.items()), flush=True)


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50)
