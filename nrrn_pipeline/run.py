"""Running a plan: check the output, measure statistics, denoise what is not done, and check that all is.

A runner takes a task and its items, in any order, on any machines, and gives an outcome for each. `run_serially` is
the specification; the Dask runner must be told apart from it by speed alone.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol, cast

import distributed
from distributed.comm.core import CommClosedError

from nrrn_pipeline import storage
from nrrn_pipeline.errors import GO_ON, InputError, NrrnError, RunError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.planning import DenoisePlan, Slab
from nrrn_pipeline.slab import SlabTask, denoise_slab
from nrrn_pipeline.statistics import MeasuredBox, SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.volume import Volume, create_volume, get_provenance, is_zarr, set_provenance, stored_units

ATTEMPTS = 3  # of one item before it is set aside
POLL_S = 5.0  # how often a driver that waits looks whether there is anybody to wait for
PATIENCE_S = 300.0  # without any worker, before a run is given up
_PERMANENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Outcome:
    """What became of one item: a result, or the error of its last attempt."""

    item: Any
    result: Any = None
    error: BaseException | None = None


class Runner(Protocol):
    """Runs a task on every item; an error that no retry can mend is raised at once, as RunError or InputError."""

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, in any order."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: slices' boxes measured, or slabs denoised; `voxels` are those done by this run."""

    stage: str
    done: int
    total: int
    voxels: int = 0
    record: Record | None = None


def run_serially(task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
    """One item after the other, in this process."""
    for item in items:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcome = Outcome(item, task(item))
            except Exception as error:
                _raise_permanent(error)
                outcome = Outcome(item, error=error)
                if attempt < ATTEMPTS:
                    continue
            yield outcome
            break


@dataclass(frozen=True)
class DaskRunner:
    """Items as single futures on a Dask cluster, a bounded number of them at a time: no graph, no voxels sent."""

    client: distributed.Client

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome an item, as they finish. Whatever is in flight when the caller stops asking is cancelled."""
        waiting = ((item, 1) for item in items)
        again: list[tuple[Any, int]] = []
        running: dict[Any, tuple[Any, int]] = {}
        try:
            resources = self._resources()
            while True:
                while len(running) < self._at_once() and (entry := again.pop() if again else next(waiting, None)):
                    running[self.client.submit(task, entry[0], pure=False, resources=resources)] = entry
                if not running:
                    return
                for future in self._finished(list(running)):
                    item, attempt = running.pop(future)
                    error = future.exception()
                    if error is None:
                        yield Outcome(item, future.result())
                        continue
                    _raise_permanent(error)
                    if attempt < ATTEMPTS:
                        again.append((item, attempt + 1))
                    else:
                        yield Outcome(item, error=error)
        except (distributed.CancelledError, CommClosedError) as error:
            raise RunError(f"the Dask scheduler is gone or was restarted; {GO_ON}") from error
        finally:
            self.client.cancel(list(running))

    def _finished(self, running: list[Any]) -> list[Any]:
        """Some that have ended, as soon as there are any. Raises RunError if no worker is left to end them."""
        deserted_s = 0.0
        while deserted_s < PATIENCE_S:
            try:
                return list(distributed.wait(running, timeout=POLL_S, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                deserted_s = 0.0 if self.client.nthreads() else deserted_s + POLL_S
        raise RunError(f"the cluster has had no worker for {PATIENCE_S:.0f} s: start some; {GO_ON}")

    def _at_once(self) -> int:
        """One item a thread: one that waits behind another is suspected too when that kills their worker."""
        return max(1, sum(int(threads) for threads in self.client.nthreads().values()))

    def _resources(self) -> dict[str, int] | None:
        """One GPU a task, on a cluster whose workers declare GPUs."""
        workers = self.client.scheduler_info()["workers"].values()
        return {"GPU": 1} if any("GPU" in worker.get("resources", {}) for worker in workers) else None


def run_plan(plan: DenoisePlan, runner: Runner, device: str = "auto", overwrite: bool = False) -> Iterator[Progress]:
    """Carry out a plan, or what is left of it, yielding its progress; when it ends, the output is complete.

    `overwrite` deletes an output that exists, but not an unfinished one with the same settings: that is resumed, so
    that a job which is started again by the same command always gets further.

    Raises InputError if the output exists and was made otherwise (unless `overwrite`), or the source holds NaN; nothing
    is written then. Raises RunError if a slab failed on every attempt or storage is full: what is done is kept.
    """
    check_output(plan, overwrite)
    ledger = Ledger(plan.target.url)
    replacing = overwrite and storage.exists(plan.group_url) and not _resumable(plan)
    statistics = None if replacing else ledger.statistics()
    if statistics is None:
        statistics = yield from _measure(plan, runner)
    else:
        _refuse_changed_source(plan, statistics)
    _claim_output(plan, statistics, replacing)
    create_volume(plan.target, _provenance(plan))
    used = statistics.pooled() if plan.method.statistics == "volume" else statistics
    try:
        yield from _slabs(plan, used, runner, device)
    except InputError as error:  # of a worker: weights, device or output are not the planned ones there
        raise RunError(f"{error}. Mend this; {GO_ON}") from error
    provenance = get_provenance(plan.group_url) or {}
    if provenance.get("state") != "complete":
        set_provenance(plan.group_url, provenance | {"state": "complete", "completed": _now()})


def check_output(plan: DenoisePlan, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, or that exists, unless this plan began it or it may be overwritten.

    Raises InputError; leaves all as it was.
    """
    url, ledger = plan.group_url, Ledger(plan.target.url)
    if overwrite:
        if storage.exists(url) and not ledger.begun() and not is_zarr(url):
            raise InputError(f"{url} is no Zarr and is not overwritten: delete it yourself, or choose another output")
    elif ledger.begun():
        ledger.refuse_others(plan)
    elif storage.exists(url):
        raise InputError(f"{url} exists and was not made by nrrn denoise: choose another output, or --overwrite")
    try:
        storage.check_writable(url)
    except OSError as error:
        raise InputError(f"the output {url} cannot be written: {error.strerror or error}; choose another") from error


def _resumable(plan: DenoisePlan) -> bool:
    """Whether an output that exists is this plan's, and unfinished."""
    try:
        state = (get_provenance(plan.group_url) or {}).get("state")
        return state == "unfinished" and not Ledger(plan.target.url).changes(plan)
    except InputError:  # no Zarr, as when it was killed before the group was made, or damaged: nothing to keep
        return False


def _refuse_changed_source(plan: DenoisePlan, kept: SliceStatistics) -> None:
    """Raises InputError if a slice in the middle has another mean or std than when the output was begun."""
    z = (plan.statistics_z.start + plan.statistics_z.stop) // 2
    middle = Span(z, z + 1)
    now = merge_boxes(measure_box(plan.source, box) for box in statistics_boxes(plan.source, middle))
    (mean, std), (mean_then, std_then) = ((s.mean[0], s.std[0]) for s in (now, kept.of(middle)))
    if max(abs(mean - mean_then), abs(std - std_then)) > 1e-6 * std:  # sums of floats differ between processors
        raise InputError(
            f"{plan.source.url} has changed since {plan.group_url} was begun: slice z={z} has another mean or std. "
            "Choose another output, or delete this one"
        )


def _claim_output(plan: DenoisePlan, statistics: SliceStatistics, replacing: bool) -> None:
    """Make the output this plan's: begin it, or clear what a killed run left half-written."""
    ledger = Ledger(plan.target.url)
    try:
        if replacing:
            if storage.exists(ledger.url):
                storage.remove_tree(ledger.url)  # first: a record must never outlive its voxels
            storage.remove_tree(plan.group_url)
        ledger.begin(plan)
        if ledger.statistics() is None:
            ledger.put_statistics(statistics)
        storage.remove_partials(plan.group_url)
    except OSError as error:
        _raise_permanent(error)
        raise


def _measure(plan: DenoisePlan, runner: Runner) -> Generator[Progress, None, SliceStatistics]:
    """Every slice's mean and std, of the slices that the plan needs."""
    boxes = statistics_boxes(plan.source, plan.statistics_z)
    parts = []
    yield Progress("statistics", 0, len(boxes))
    for outcome in runner(partial(measure_box, plan.source), boxes):
        parts.append(measured(plan.source, outcome))
        yield Progress("statistics", len(parts), len(boxes))
    return merge_boxes(parts)


def measured(source: Volume, outcome: Outcome) -> MeasuredBox:
    """What measure_box gave for one box. Raises RunError, with the place, if it failed on every attempt."""
    if outcome.error is None:
        return cast("MeasuredBox", outcome.result)
    raise RunError(
        f"{source.url} cannot be read at voxels {outcome.item}: {_line(outcome.error)}. Repair it there, or leave that "
        "part out with --roi"
    ) from outcome.error


def _slabs(plan: DenoisePlan, statistics: SliceStatistics, runner: Runner, device: str) -> Iterator[Progress]:
    """Denoise every slab that the ledger lacks."""
    slabs, ledger = plan.slabs, Ledger(plan.target.url)
    recorded, stored = ledger.done(), stored_units(plan.target)
    left = [slab for slab in slabs if slab.key not in recorded or not stored >= units_of(plan, slab)]
    tasks = (SlabTask(slab, statistics.of(slab.read.z)) for slab in left)
    done, voxels, failed = len(slabs) - len(left), 0, []
    yield Progress("denoising", done, len(slabs))
    for outcome in runner(partial(denoise_slab, plan, device), tasks):
        if outcome.error is not None:
            failed.append(f"{outcome.item.slab.key}: {_line(outcome.error)}")
            continue
        done, voxels = done + 1, voxels + outcome.result.voxels
        yield Progress("denoising", done, len(slabs), voxels, outcome.result)
    if failed:
        some = "; ".join(failed[:5])
        raise RunError(f"{len(failed)} of {len(slabs)} slabs failed every time: {some}. All others are done; {GO_ON}")
    if missing := {slab.key for slab in slabs} - ledger.done():
        raise RunError(f"{len(missing)} slabs have no record, such as {min(missing)}; {GO_ON}")


def units_of(plan: DenoisePlan, slab: Slab) -> set[Box]:
    """The target's write units that a slab owns."""
    return set(boxes_of(plan.target_box(slab), plan.target.write_unit))


def _raise_permanent(error: BaseException) -> None:
    """Raise what no retry can mend."""
    if isinstance(error, NrrnError):
        raise error
    if isinstance(error, OSError) and error.errno in _PERMANENT:
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"storage refused a read or write: {error.strerror}{where}. Mend this; {GO_ON}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _provenance(plan: DenoisePlan) -> dict[str, Any]:
    packages = ("nrrn-pipeline", "torch", "zarr", "dask", "numpy")
    return {
        "state": "unfinished",
        "begun": _now(),
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "weights": plan.weights.path,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
