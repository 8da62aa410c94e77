"""What users call: plan, denoise, train and verify, each in one call; the command line adds only words."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from nrrn_pipeline import storage
from nrrn_pipeline.cluster import address_client, local_client
from nrrn_pipeline.cost import Cost, cost_of, counted, default_workers, refuse_what_cannot_fit, seconds_to_run
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.network import DEVICES, NRRN, choose_device, load_weights, read_header, save_weights, weights_hash
from nrrn_pipeline.planning import DenoisePlan, Layout, Weights, plan_denoise
from nrrn_pipeline.run import DaskRunner, Progress, Runner, check_output, run_plan, run_serially
from nrrn_pipeline.training.fit import TrainSettings, fit
from nrrn_pipeline.training.fit import Watch as TrainWatch
from nrrn_pipeline.training.triplets import triplets
from nrrn_pipeline.volume import Volume, open_volume

Location = str | os.PathLike[str]
PAPER = Weights(path="", sha256="", units=4, channels=64)


@dataclass(frozen=True)
class Options:
    """How to denoise.

    level: pyramid level of an OME-Zarr source. layout: slab, chunk, shard, tile and halo in voxels. roi: the part to
    denoise, in the level's voxels. images: slices that one estimate is made from: 3, 2 or 1. statistics: each "slice"'s
    own mean and std, or those of the whole "volume". device: "auto", "cpu" or "cuda". cluster: "local", "serial" or a
    Dask scheduler's address. workers: local processes; None: as many as cores and memory carry. overwrite: delete an
    output that exists.
    """

    level: int = 0
    layout: Layout = field(default_factory=Layout)
    roi: Box | None = None
    images: int = 3
    statistics: str = "slice"
    device: str = "auto"
    cluster: str = "local"
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for what no machine has."""
        if self.device not in DEVICES:
            raise InputError(f"device {self.device!r} is unknown: use {', '.join(DEVICES)}")
        if not self.here and ":" not in self.cluster:
            raise InputError(f"cluster {self.cluster!r} is unknown: use local, serial or an address as tcp://host:8786")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers {self.workers} is not possible: use 1 or more")

    @property
    def here(self) -> bool:
        """Whether this machine does the work, so that its memory and devices are what counts."""
        return self.cluster in ("serial", "local")


@dataclass(frozen=True)
class Forecast:
    """A plan, its cost, and the time that it should take: `seconds` with `workers` local workers."""

    plan: DenoisePlan
    cost: Cost
    workers: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What a run did. `resumed` slabs were done before; peak_memory_bytes is the largest worker's (0: none worked)."""

    plan: DenoisePlan
    slabs: int
    resumed: int
    voxels: int
    seconds: float
    peak_memory_bytes: int


class Watch(Protocol):
    """Is told how a run goes."""

    def started(self, plan: DenoisePlan, where: str) -> None:
        """Workers are there; `where` says where, with the dashboard's address if there is one."""

    def progressed(self, progress: Progress) -> None:
        """One more piece is done."""


class Silent:
    """Watches and says nothing."""

    def started(self, plan: DenoisePlan, where: str) -> None:
        """Nothing."""

    def progressed(self, progress: Progress) -> None:
        """Nothing."""


def plan(
    source: Location, output: Location, weights: Location | None = None, options: Options | None = None
) -> Forecast:
    """What denoise with the same arguments would do and take; runs one tile for a few seconds and writes nothing.

    Without weights, the paper's network (4 units, 64 channels) is assumed. Raises InputError where denoise would.
    """
    options = options or Options()
    made = _plan(source, output, weights, options)
    check_output(made, options.overwrite)
    workers = _workers(made, options)
    network = load_weights(weights) if weights else NRRN(PAPER.units, PAPER.channels).eval()
    return Forecast(made, cost_of(made), workers, seconds_to_run(made, network, options.device, workers))


def denoise(
    source: Location, output: Location, weights: Location, options: Options | None = None, watch: Watch | None = None
) -> Summary:
    """Denoise a volume into a new OME-Zarr 0.5 group; called again after any interruption, it goes on from there.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError, with nothing written, if that cannot be done as asked; RunError if it broke off, and what is
    done is kept.
    """
    options, watch = options or Options(), watch or Silent()
    made = _plan(source, output, weights, options)
    check_output(made, options.overwrite)
    started, resumed, voxels, peak = perf_counter(), 0, 0, 0
    with _runner(made, options) as (runner, where):
        watch.started(made, where)
        for progress in run_plan(made, runner, options.device, options.overwrite):
            watch.progressed(progress)
            if progress.stage == "denoising":
                voxels = progress.voxels
                if progress.record is None:
                    resumed = progress.done
                else:
                    peak = max(peak, progress.record.peak_memory_bytes)
    return Summary(made, len(made.slabs), resumed, voxels, perf_counter() - started, peak)


def train(
    source: Location,
    weights: Location,
    settings: TrainSettings | None = None,
    level: int = 0,
    watch: TrainWatch | None = None,
) -> dict[str, Any]:
    """Train an NRRN on a noisy volume alone, with the paper's loss, and write it to `weights`; returns its record.

    Raises InputError if the volume or the settings do not allow it, or `weights` exists or cannot be written; RunError
    if training diverges.
    """
    settings = settings or TrainSettings()
    choose_device(settings.device)
    volume = open_volume(source, level)
    target = Path(weights)
    if target.exists():
        raise InputError(f"{target} exists: choose another file, or delete it")
    if not target.resolve().parent.is_dir():
        raise InputError(f"{target} cannot be written: its folder is missing")
    try:
        storage.check_writable(str(target.resolve().parent))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}; choose another file") from error
    started, losses = perf_counter(), []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if watch is not None:
            watch(step, loss)

    network = fit(triplets(volume, settings), settings, note)
    tail = losses[-max(1, len(losses) // 10) :]
    record = {
        "loss": "adjacent slices (Giannios et al., eq. 3)",
        "source": volume.url,
        "shape": list(volume.shape),
        "dtype": volume.dtype,
        "voxel_nm": volume.voxel_nm,
        "settings": asdict(settings),
        "last_loss": sum(tail) / len(tail),
        "seconds": round(perf_counter() - started, 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("nrrn-pipeline", "torch", "numpy")},
    }
    save_weights(network, target, record)
    return record


def describe_weights(path: Location | None) -> Weights:
    """What a plan needs to know of a weights file; of the paper's network without one."""
    if path is None:
        return PAPER
    header = read_header(path)
    return Weights(storage.absolute(path), weights_hash(path), header["units"], header["channels"])


def _plan(source: Location, output: Location, weights: Location | None, options: Options) -> DenoisePlan:
    if options.here:
        choose_device(options.device)
    volume: Volume = open_volume(source, options.level)
    method = (options.images, options.statistics)
    return plan_denoise(
        volume, storage.absolute(output), describe_weights(weights), options.layout, options.roi, method
    )


def _workers(made: DenoisePlan, options: Options) -> int:
    if options.cluster == "serial":
        workers = 1
    else:
        on_gpu = choose_device(options.device).type == "cuda"
        workers = default_workers(made, on_gpu) if options.workers is None else options.workers
    if options.here:
        refuse_what_cannot_fit(made, workers)
    return workers


@contextmanager
def _runner(made: DenoisePlan, options: Options) -> Iterator[tuple[Runner, str]]:
    """The runner that the options ask for, and where it runs, in words."""
    if options.cluster == "serial":
        _workers(made, options)
        yield run_serially, "this process"
        return
    if options.cluster == "local":
        workers = _workers(made, options)
        with local_client(workers) as client:
            yield DaskRunner(client), f"{counted(workers, 'local worker')}, dashboard {client.dashboard_link}"
        return
    with address_client(options.cluster) as client:
        workers = len(client.nthreads())
        where = f"{counted(workers, 'worker')} of {options.cluster}, dashboard {client.dashboard_link}"
        yield DaskRunner(client), where
