"""What users call, each goal in one call; the command line adds words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

from nrrn_pipeline import storage
from nrrn_pipeline.checking import GROWTH_BROKE_OFF, Status, check, status
from nrrn_pipeline.cluster import LocalSettings, started
from nrrn_pipeline.cluster.checks import refuse_unfit_workers
from nrrn_pipeline.cost import (
    Cost,
    cost_of,
    counted,
    default_workers,
    refuse_what_cannot_fit,
    seconds_to_run,
    worker_bytes,
)
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.keeping import drop_shelf
from nrrn_pipeline.lease import wait_for_end
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.network import (
    NRRN,
    Network,
    choose_device,
    gpu_count,
    import_vemden,
    in_slot,
    weights_bytes,
    weights_hash,
)
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.planning import DenoisePlan, Method, plan_denoise
from nrrn_pipeline.preparing import Location, keeping_for, make_plan, plan_for, shape_of
from nrrn_pipeline.profiling import Profile
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.pyramid import plan_pyramid, refuse_foreign
from nrrn_pipeline.run import check_output, run_plan
from nrrn_pipeline.runners import DaskRunner, Runner, ThreadRunner, run_serially
from nrrn_pipeline.sharing import run_share
from nrrn_pipeline.slab import load_network
from nrrn_pipeline.slabs import Layout, Plan
from nrrn_pipeline.statistics_pass import known_statistics
from nrrn_pipeline.volume import Volume, get_provenance, open_volume

__all__ = [
    "Forecast",
    "Options",
    "RunWatch",
    "Status",
    "Summary",
    "add_levels",
    "add_noise",
    "denoise",
    "import_weights",
    "plan",
    "repair",
    "status",
    "verify",
]

COPIED = {"ingested": "ingest", "exported": "export", "aligned": "align"}  # settings that tell what made a volume
PAPER = Weights(path="", sha256="", units=4, channels=64)


@dataclass(frozen=True)
class Forecast:
    """A plan, its cost, and the time that it should take: `seconds` with `workers` local workers."""

    plan: DenoisePlan
    cost: Cost
    workers: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What a run did. `resumed` slabs were done before, `done` by this run, all others by those that share it.

    peak_memory_bytes is the largest worker's (0: none worked). level_slabs: of levels of lower resolution, done too.
    """

    plan: Plan
    slabs: int
    resumed: int
    done: int
    voxels: int
    seconds: float
    peak_memory_bytes: int
    profile: Profile
    level_slabs: int = 0


class RunWatch:
    """Is told how a run goes; override what you want to see."""

    def started(self, plan: Plan, where: str) -> None:
        """Workers are there; `where` says where, with the dashboard's address if there is one."""

    def progressed(self, progress: Progress) -> None:
        """One more piece is done."""

    def looked(self, there: int, done: int) -> None:
        """A volume that is followed has so many slices by now, of which so many are denoised."""


def plan(
    source: Location, output: Location, weights: Location | None = None, options: Options | None = None
) -> Forecast:
    """What denoise with the same arguments would do and take; runs one tile for a few seconds and writes nothing.

    Without weights, the paper's network (4 units, 64 channels) is assumed. The time is that of local workers. Raises
    InputError where denoise would.
    """
    options = options or Options()
    used = PAPER if weights is None and options.method.name in (None, "nrrn") else weights
    made = make_plan(source, output, used, options)
    if made.denoiser == PAPER and not options.overwrite and Ledger(made.target.url).begun():
        raise InputError(f"{made.group_url} is begun: give its --weights, to plan what is left of it")
    check_output(made, options.overwrite)
    return forecast_of(made, options)


def forecast_of(made: DenoisePlan, options: Options) -> Forecast:
    """What a plan will take with these options; runs one tile for a few seconds."""
    workers = _workers([made], options)
    network = _in_slot(made, options.device if options.here else "auto")
    keeping = keeping_for(made, options, workers)
    kept = keeping.most_bytes if keeping else 0
    cost = cost_of(made, options.slabs_each, known_statistics(made) is not None, workers, kept)
    return Forecast(made, cost, workers, seconds_to_run(made, network, workers))


def denoise(
    source: Location,
    output: Location,
    weights: Location | None,
    options: Options | None = None,
    watch: RunWatch | None = None,
) -> Summary:
    """Denoise a volume into a new OME-Zarr 0.5 group; called again after any interruption, it goes on from there.

    Without weights `options.method` has to name a filter.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError, with nothing written, if that cannot be done as asked; RunError if it broke off, and what is
    done is kept.
    """
    options = options or Options()
    return run_planned(make_plan(source, output, weights, options), options, watch or RunWatch())


def run_planned(made: Plan, options: Options, watch: RunWatch, again: frozenset[str] = frozenset()) -> Summary:
    """Carry out a plan on a runner for it alone; `again`: slabs to do though they are done.

    Raises what denoise raises.
    """
    check_output(made, options.overwrite)  # before workers start
    with open_runner(with_levels(made, options), options) as (runner, where):
        watch.started(made, where)
        return carry_out(made, options, runner, watch, again)


def with_levels(made: Plan, options: Options) -> list[Plan]:
    """A plan, and those of the levels that are made too."""
    return [made, *(plan_pyramid(made.target) if options.pyramid else [])]


def carry_out(
    made: Plan, options: Options, runner: Runner, watch: RunWatch, again: frozenset[str] = frozenset()
) -> Summary:
    """Carry out a plan on a runner that is open already; `again`: slabs to do though they are done.

    Levels of lower resolution are made too if `options.pyramid`, and made good if there are any. Raises what denoise
    raises.
    """
    summary = _carry_out(made, options, runner, watch, again)
    if made.growing or not (options.pyramid or Ledger(f"{made.group_url}/1").begun()):
        return summary
    kept = replace(options, overwrite=False)
    levels = [_carry_out(level, kept, runner, watch) for level in plan_pyramid(made.target)]
    return replace(summary, level_slabs=sum(level.done for level in levels))


def _carry_out(
    made: Plan, options: Options, runner: Runner, watch: RunWatch, again: frozenset[str] = frozenset()
) -> Summary:
    started, resumed, done, voxels, peak, profile = perf_counter(), None, 0, 0, 0, Profile(made.stage)
    keeping = keeping_for(made, options, runner.workers if isinstance(runner, DaskRunner) else 1)
    if options.share is None:
        run = run_plan(made, runner, options.device, options.overwrite, again, keeping)
    else:
        run = run_share(made, options.share, runner, options.device, keeping)
    try:
        for progress in run:
            watch.progressed(progress)
            profile.add(progress, perf_counter() - started)
            if progress.stage == made.stage:
                voxels = progress.voxels
                resumed = progress.done if resumed is None else resumed
                if progress.record is not None:
                    done, peak = done + 1, max(peak, progress.record.peak_memory_bytes)
    finally:
        run.close()  # before what is in flight is left alone
        if keeping:
            drop_shelf(keeping.run)  # this process's, if slabs were done here
    return Summary(made, len(made.slabs), resumed or 0, done, voxels, perf_counter() - started, peak, profile)


def add_noise(
    source: Location, output: Location, noise: Noise, options: Options | None = None, watch: RunWatch | None = None
) -> Summary:
    """A volume with synthetic noise, to measure denoising on: made, resumed and checked as denoise does it.

    Of options, method and layout.tile do not count. Raises what denoise raises.
    """
    options = options or Options()
    made = plan_denoise(open_volume(source, options.level), absolute(output), noise, options.layout, options.roi)
    return run_planned(made, options, watch or RunWatch())


def verify(output: Location, deep: bool = False) -> list[str]:
    """What is wrong with an output of denoise; empty if it is whole.

    By listing alone: slabs without a record, shards that are missing or cut short. `deep`: every byte is read, and must
    have the checksum that it was written with. Raises InputError if there is no output of denoise.
    """
    return [checked.problem for checked in check(output, deep) if checked.problem]


def repair(
    output: Location, weights: Location | None = None, options: Options | None = None, watch: RunWatch | None = None
) -> tuple[list[str], Summary | None]:
    """Denoise again exactly the slabs of an output that verify(deep=True) finds damaged; what was wrong, and a summary.

    Source and settings are those that the output was made with, and so are the weights unless given (they may have
    moved). Of `options` only device, precision, cluster, keys, workers, prefetch and keep_gb count.

    Raises InputError if there is no output of denoise, its source or weights are gone or changed, or its metadata are
    damaged.
    """
    volume = open_volume(output)
    ledger = Ledger(volume.url)
    for _ in wait_for_end(ledger.url):  # of another driver's lease
        pass
    found = [checked for checked in check(output, deep=True) if checked.problem]
    problems = [checked.problem or "" for checked in found]
    if not found:
        return [], None
    if beyond := [checked.problem for checked in found if checked.slab is None and checked.level == 0]:
        advice = "" if GROWTH_BROKE_OFF in str(beyond[0]) else "; start again with nrrn denoise --overwrite"
        raise InputError(f"{output} cannot be repaired: {beyond[0]}{advice}")
    for checked in found:
        if checked.slab and checked.level > 0:
            Ledger(f"{volume.group_url}/{checked.level}").forget(checked.slab)
    if all(checked.level > 0 for checked in found):
        levels = _add_levels(volume, replace(options or Options(), overwrite=False), watch or RunWatch())
        return problems, replace(levels[0], done=0, level_slabs=sum(level.done for level in levels))
    settings, provenance = ledger.settings() or {}, get_provenance(volume.group_url) or {}
    if command := next((word for made, word in COPIED.items() if made in settings), None):
        ledger.forget_all({checked.slab for checked in found if checked.slab and checked.level == 0})
        raise RunError(f"{problems[0]}: what is damaged counts as not done now; run the same nrrn {command} again")
    if "noise" in settings:
        raise InputError(f"{output} cannot be repaired: it is synthetic noise; make it again with --overwrite")
    try:
        slab, chunk, shard = (shape_of(settings[name]) for name in ("slab", "chunk", "shard"))
        layout = Layout(slab, chunk, shard, settings["tile"], settings["halo"])
        name = settings["filter"]["name"] if "filter" in settings else None
        stitch = settings.get("stitch", "crop")
        precision = settings.get("precision", (options or Options()).method.precision)
        method = Method(settings["images"], settings["statistics"], name, stitch, precision)
        source, level = source_of(settings["source"], provenance["source group"])
        roi, used = Box.parse(settings["roi"]), weights or provenance["weights"]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{output} cannot be repaired: its settings are damaged ({error})") from error
    again = replace(options or Options(), level=level, roi=roi, layout=layout, method=method, overwrite=False)
    keys = frozenset(checked.slab for checked in found if checked.slab and checked.level == 0)
    if again.here:
        choose_device(again.device)
    opened = open_volume(source, level)
    if ledger.growing():  # what it has more by now is not to be repaired
        opened = replace(opened, shape=(min(opened.shape[0], int(settings["source shape"][0])), *opened.shape[1:]))
    made = replace(plan_for(opened, volume.group_url, used, again), growing=ledger.growing())
    return problems, run_planned(made, again, watch or RunWatch(), keys)


def add_levels(output: Location, options: Options | None = None, watch: RunWatch | None = None) -> int:
    """Add levels of lower resolution to an OME-Zarr volume; called again, it goes on, and makes good what is torn.

    How many levels it has below the first. Of options cluster, keys, workers, prefetch, overwrite (of levels) and share
    count. Raises InputError if it was not made by nrrn, or is not complete; RunError if it broke off.
    """
    return len(_add_levels(open_volume(output), options or Options(), watch or RunWatch()))


def _add_levels(base: Volume, options: Options, watch: RunWatch) -> list[Summary]:
    """What was done for each level."""
    for _ in wait_for_end(Ledger(base.url).url):  # of a driver that is at work on the volume itself
        pass
    refuse_foreign(base)
    plans = plan_pyramid(base)
    for plan in plans:
        check_output(plan, options.overwrite)
    if not plans:
        return []
    with open_runner(plans, options) as (runner, where):
        watch.started(plans[0], where)
        return [_carry_out(plan, options, runner, watch) for plan in plans]


def import_weights(checkpoint: Location, weights: Location) -> NRRN:
    """Turn a checkpoint of the authors' tool (vEMden) into a weights file; no code in it is run.

    Raises InputError if it is no such checkpoint, or `weights` exists or cannot be written.
    """
    network = import_vemden(checkpoint)
    storage.check_new_file(weights)
    record = {"imported from": str(checkpoint), "sha256 of that": weights_hash(checkpoint)}
    storage.write_file(absolute(weights), weights_bytes(network, record))
    return network


def _in_slot(made: DenoisePlan, device: str) -> Network:
    """What a plan denoises with, to be timed; the paper's network has weights that mean nothing."""
    if made.denoiser == PAPER:
        return in_slot(PAPER.architecture.build().eval(), device, made.method.images)
    assert not isinstance(made.denoiser, Noise)
    return load_network(made, device)[0]


def source_of(array_url: str, group_url: str) -> tuple[str, int]:
    """The volume and level that open_volume takes for an array. Raises InputError if there is none."""
    level, opened = 0, open_volume(group_url)
    while opened.url != array_url:
        level += 1
        opened = open_volume(group_url, level)
    return group_url, level


def _workers(plans: Sequence[Plan], options: Options) -> int:
    """Local workers that the options ask for. Raises InputError if this machine is asked for more than it can hold."""
    largest = max(plans, key=lambda made: worker_bytes(made, options.slabs_each))
    settings = options.cluster_settings
    match settings:
        case None | LocalSettings(processes=False):
            workers: int | None = 1
        case LocalSettings():
            workers = settings.workers
        case _:
            workers = None
    if workers is None:
        on_gpu = options.here and choose_device(options.device).type == "cuda"
        fitting = default_workers(largest, gpu_count() if on_gpu else 0, options.slabs_each)
        workers = min(fitting, max(len(made.slabs) for made in plans))
    if options.here:
        refuse_what_cannot_fit(largest, workers, options.slabs_each)
    return workers


@contextmanager
def open_runner(plans: Sequence[Plan], options: Options) -> Iterator[tuple[Runner, str]]:
    """The runner that the options ask for, and where it runs, in words; good for each of the plans in turn.

    Raises InputError if this machine cannot hold it, or the cluster cannot be had.
    """
    settings = options.cluster_settings
    workers = _workers(plans, options) if options.here else None
    if settings is None:
        shared = f", share {options.share}" if options.share else ""
        yield ThreadRunner(options.slabs_each) if shared else run_serially, f"this process{shared}"
        return
    if isinstance(settings, LocalSettings):
        settings = settings.model_copy(update={"workers": workers})
    with started(settings, options.slabs_each) as cluster:
        if not options.here:
            refuse_unfit_workers(cluster.client, plans, options.device)
        there = counted(len(cluster.client.nthreads()), "worker")
        yield DaskRunner(cluster.client, cluster.tend, cluster.patience_s), f"{there} of {cluster.where}"
