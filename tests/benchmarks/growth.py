"""Seconds a gigavoxel for 1, 4 and 16 times a size: python tests/benchmarks/growth.py [UNITS CHANNELS [TURNS]]

On workers that have started, and done a volume before. Machines are not always as fast: of each size as many voxels are
done, of the smaller ones before the largest and after it, and means count. What is read for a voxel tells how much more
halo a larger volume has: the smallest ends where its slabs do. Prints; gates nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from nrrn_pipeline import Options, RunWatch
from nrrn_pipeline.api import carry_out, open_runner
from nrrn_pipeline.benchmark import make_volume
from nrrn_pipeline.cost import by_text, cost_of, counted
from nrrn_pipeline.network import NRRN, save_weights
from nrrn_pipeline.preparing import make_plan

SHAPES = ((64, 512, 1024), (64, 1024, 2048), (256, 1024, 2048))
ORDER = (*(0, 0, 0, 0, 1) * 2, 2, *(0, 0, 0, 0, 1) * 2)


def main(units: int = 1, channels: int = 4, turns: int = 1) -> None:
    options = Options(overwrite=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "w.safetensors"
        save_weights(NRRN(units, channels), weights, {"note": "random, for speed alone"})
        sources = [make_volume(folder / f"{number}.ome.zarr", shape) for number, shape in enumerate(SHAPES)]
        plans = [make_plan(of.group_url, folder / f"{n}.out.zarr", weights, options) for n, of in enumerate(sources)]
        spent: dict[int, list[float]] = {number: [] for number in range(len(SHAPES))}
        with open_runner(plans, options) as (runner, where):
            print(where, flush=True)
            carry_out(plans[0], options, runner, RunWatch())
            for number in ORDER * turns:
                found = carry_out(plans[number], options, runner, RunWatch())
                spent[number].append(found.seconds / found.voxels * 1e9)
        for number, shape in enumerate(SHAPES):
            plan, each = plans[number], spent[number]
            print(
                f"{by_text(shape)}, {len(plan.slabs)} slabs, {cost_of(plan).read_amplification:.3f} read for a voxel: "
                f"{fmean(each):.1f} s a gigavoxel, {min(each):.1f} to {max(each):.1f} in {counted(len(each), 'run')}"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
