"""Seconds a gigavoxel for volumes of 1, 4 and 16 times a size: python tests/benchmarks/growth.py [UNITS CHANNELS]

On workers that have started, and done a volume before; each size as often as all take about as long, in turns, since
machines are not always as fast. By a filter that takes next to no time, unless a network is asked for. Prints; gates
nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from nrrn_pipeline import Method, Options, RunWatch
from nrrn_pipeline.api import carry_out, open_runner
from nrrn_pipeline.benchmark import make_volume
from nrrn_pipeline.network import NRRN, save_weights
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.volume import Volume

SHAPES = ((64, 1024, 1024), (64, 2048, 2048), (256, 2048, 2048))
TURNS = 3


def main(units: int = 0, channels: int = 4) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "w.safetensors" if units else None
        options = Options(overwrite=True, method=Method(name=None if units else "mean"))
        if weights:
            save_weights(NRRN(units, channels), weights, {"note": "random, for speed alone"})
        sources: list[Volume] = [make_volume(folder / f"{n}.ome.zarr", shape) for n, shape in enumerate(SHAPES)]
        plans = [make_plan(of.group_url, folder / f"{n}.out.zarr", weights, options) for n, of in enumerate(sources)]
        spent: dict[int, list[float]] = {n: [] for n in range(len(SHAPES))}
        with open_runner(plans, options) as (runner, where):
            print(where, flush=True)
            carry_out(plans[0], options, runner, RunWatch())
            for _ in range(TURNS):
                for number, made in enumerate(plans):
                    found = [carry_out(made, options, runner, RunWatch()) for _ in range(4 ** (2 - number))]
                    spent[number].append(sum(each.seconds for each in found) / len(found))
        for number, shape in enumerate(SHAPES):
            each = [seconds / plans[number].box.size * 1e9 for seconds in spent[number]]
            told = ", ".join(f"{seconds:.2f}" for seconds in each)
            print(f"{' x '.join(map(str, shape))}, {len(plans[number].slabs)} slabs: {told} s a gigavoxel")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
