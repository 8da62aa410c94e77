"""Our program and others on one volume with one network, one after the other; and the network alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.api import open_runner
from nrrn_pipeline.benchmark.programs import OURS, Program, Run, best_of, ours, run
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import cells_of
from nrrn_pipeline.machine import cores
from nrrn_pipeline.network import Network, device_text, in_lanes
from nrrn_pipeline.options import Options
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.runners import DaskRunner, raise_permanent
from nrrn_pipeline.slab import load_network
from nrrn_pipeline.volume import Volume, open_volume, read_box

FEW, MORE = 2, 6  # slices of a stack: what it takes beside its slices, and what each takes


@dataclass(frozen=True)
class Task:
    """What all programs are given: a volume, weights, a folder for outputs, and the device for ours.

    turns: how often all of them run; the best of each counts, as other users of a machine only ever make it slower.
    """

    source: Volume
    weights: str
    folder: str
    device: str = "auto"
    turns: int = 1


@dataclass(frozen=True)
class Measured:
    """One program: its best run, and how its output differs from ours, in grey levels; None: there is none to compare.

    turns: seconds of each run. far: share of the voxels that differ by more than 1, which rounding cannot explain.
    """

    name: str
    run: Run
    voxels: int
    turns: tuple[float, ...] = ()
    most: float | None = None
    far: float | None = None

    @property
    def speed(self) -> float:
        """Voxels a second."""
        return self.voxels / self.run.seconds


@dataclass(frozen=True)
class Benchmark:
    """All programs, ours first.

    alone: voxels a second of the network, on what `where` says, just before and just after each run of ours: a machine
    may be half as fast an hour later.
    """

    measured: tuple[Measured, ...]
    alone: tuple[tuple[float, float], ...]
    where: str

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """Our whole program's speed as a share of the network's own, turn by turn; none if it failed."""
        ours = self.measured[0]
        if ours.run.failure:
            return ()
        return tuple(ours.voxels / each / fmean(alone) for each, alone in zip(ours.turns, self.alone, strict=True))

    @property
    def efficiency(self) -> float | None:
        """The mean of all turns; None if ours failed."""
        return fmean(self.efficiencies) if self.efficiencies else None

    @property
    def speed_alone(self) -> float:
        """The mean of all, in voxels a second."""
        return fmean(speed for turn in self.alone for speed in turn)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        programs = [
            asdict(each.run)
            | {"name": each.name, "voxels_per_s": each.speed, "turns_s": each.turns}
            | {"largest_difference": each.most, "far": each.far}
            for each in self.measured
        ]
        alone = {"voxels_per_s": self.speed_alone, "where": self.where, "efficiency": self.efficiency}
        alone |= {"before_and_after_each_turn": self.alone, "efficiency_by_turn": self.efficiencies}
        return {"programs": programs, "network_alone": alone}


def run_benchmark(task: Task, programs: Sequence[Program]) -> Benchmark:
    """Run ours, the network alone timed before and after it, then each other into folder/NAME.zarr; so for each turn.

    Raises InputError if the volume or the weights cannot be used, or an output exists.
    """
    names = [OURS, *(program.name for program in programs)]
    outputs = {name: f"{task.folder}/{name}.zarr" for name in names}
    for url in outputs.values():
        if storage.exists(url):
            raise InputError(f"{url} exists: choose another --out")
    plan = make_plan(task.source.group_url, outputs[OURS], task.weights, Options(device=task.device))
    runs: dict[str, list[Run]] = {name: [] for name in names}
    alone: list[tuple[float, float]] = []
    for _ in range(task.turns):
        if not _failed(runs[OURS]):
            before, where = network_alone(plan, task.device)
            _run_again(ours(task.device), task.source.group_url, outputs[OURS], task.weights, runs[OURS])
            alone.append((before, network_alone(plan, task.device)[0]))
        for program in programs:
            if not _failed(runs[program.name]):
                _run_again(program, task.source.url, outputs[program.name], task.weights, runs[program.name])
    found: list[Measured] = []
    for name, done in runs.items():
        measured = Measured(name, best_of(done), task.source.box.size, tuple(each.seconds for each in done))
        if found and not measured.run.failure and not found[0].run.failure:
            measured = compared(measured, outputs[OURS], outputs[name])
        found.append(measured)
    return Benchmark(tuple(found), tuple(alone), where)


def _failed(done: Sequence[Run]) -> bool:
    """The last of what was run, if any was: it is not tried again."""
    return bool(done and done[-1].failure)


def _run_again(program: Program, source: str, output: str, weights: str, done: list[Run]) -> None:
    """In place of its output of the turn before."""
    storage.remove_tree(output)
    done.append(run(program, source, output, weights))


def compared(measured: Measured, ours_url: str, url: str) -> Measured:
    """The same with how its output differs from ours."""
    try:
        return _compared(measured, open_volume(ours_url), open_volume(url))
    except (InputError, OSError) as error:
        return replace(measured, run=replace(measured.run, failure=str(error)))


def _compared(measured: Measured, expected: Volume, found: Volume) -> Measured:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        told = f"its output is {found.dtype} of shape {found.shape}, not {expected.dtype} of {expected.shape}"
        return replace(measured, run=replace(measured.run, failure=told))
    most, far = 0.0, 0
    for cell in cells_of(expected.box, expected.write_unit):
        apart = np.abs(read_box(expected, cell).astype(np.float64) - read_box(found, cell))
        most, far = max(most, float(apart.max())), far + int((apart > 1).sum())
    return replace(measured, most=most, far=far / expected.box.size)


def network_alone(plan: DenoisePlan, device: str) -> tuple[float, str]:
    """Voxels a second that the network estimates and keeps in the plan's tiles, and where; nothing is read or written.

    On as many workers as denoise would use, each with its threads, all at the same time.
    """
    options = Options(device=device, prefetch=False)
    with open_runner([plan], options) as (runner, where):
        at_once = runner.workers if isinstance(runner, DaskRunner) else 1
        speeds = []
        for outcome in runner(partial(_alone, plan, device), range(at_once)):
            if outcome.error is not None:
                raise_permanent(outcome.error, "the network alone")
                raise outcome.error
            speeds.append(outcome.result)
    machine = device_text() if device != "cpu" else None
    return sum(speeds), f"{where.partition(', dashboard')[0]}, {cores()} cores" + (f", {machine}" if machine else "")


def _alone(plan: DenoisePlan, device: str, _: int) -> float:
    """Voxels a second of one worker, on noise of the size of a tile, with the slices of a slab."""
    network = load_network(plan, device)[0]
    slab = plan.slabs[0]
    tiles, depth = list(plan.tiles(slab)), len(slab.keep.z)
    y, x = tiles[0]
    lanes = network.lanes(len(tiles))
    noise = np.random.default_rng(0).standard_normal((MORE + 2, len(y.read), len(x.read)), dtype=np.float32)
    _seconds(network, noise, lanes)  # chooses algorithms, takes memory
    few, more = (_seconds(network, noise[: slices + 2], lanes) for slices in (FEW, MORE))
    seconds = few + max(0, depth - FEW) * (more - few) / (MORE - FEW)
    return slab.keep.size / (len(tiles) * seconds)


def _seconds(network: Network, stack: NDArray[np.float32], lanes: int) -> float:
    """For one stack, of as many as are estimated at a time."""
    started = perf_counter()
    in_lanes(lanes, network, [stack] * lanes)
    return (perf_counter() - started) / lanes
