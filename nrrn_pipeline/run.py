"""Running a plan: check the output, measure statistics, denoise what is not done, and check that all is."""

from __future__ import annotations

import platform
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from time import monotonic
from typing import Any, cast

from nrrn_pipeline import storage
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import GO_ON, InputError, RunError, SlabsFailedError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.lease import Lease, wait_for_end
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.planning import DenoisePlan, Slab
from nrrn_pipeline.presence import LEASE_S
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.runners import Outcome, Runner, raise_permanent
from nrrn_pipeline.slab import SlabTask, denoise_slab
from nrrn_pipeline.statistics import MeasuredBox, SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.volume import Volume, create_volume, get_provenance, is_zarr, set_provenance, stored_units

BREAKER = 5  # slabs that fail one after the other for one reason before a run is stopped


@dataclass(frozen=True)
class Progress:
    """How far a run is: slices' boxes measured, or slabs denoised; `voxels` are those done by this run.

    `note`: something that the user should know, and that the run has dealt with.
    """

    stage: str
    done: int
    total: int
    voxels: int = 0
    record: Record | None = None
    note: str = ""


def run_plan(
    plan: DenoisePlan,
    runner: Runner,
    device: str = "auto",
    overwrite: bool = False,
    again: frozenset[str] = frozenset(),
) -> Iterator[Progress]:
    """Carry out a plan, or what is left of it, yielding its progress; when it ends, the output is complete.

    `overwrite` deletes an output that exists, but not an unfinished one with the same settings: that is resumed, so
    that a job which is started again by the same command always gets further. `again`: slabs to denoise though they are
    recorded.

    Raises InputError if the output exists and was made otherwise (unless `overwrite`), another driver is at work on it,
    or the source holds NaN; nothing is written then. Raises SlabsFailedError if slabs failed on every attempt,
    RunError if storage refuses, or one slab after the other fails for one reason: what is done is kept.
    """
    check_output(plan, overwrite)
    ledger = Ledger(plan.target.url)
    for waited in wait_for_end(ledger.url):
        yield waiting(waited)
    replacing = overwrite and storage.exists(plan.group_url) and not resumable(plan)
    statistics = yield from _all_statistics(plan, runner, None if replacing else ledger.statistics_for(plan))
    check_output(plan, overwrite)  # once more, as to measure takes long
    lease, state = Lease(ledger.url), "interrupted"
    try:
        for waited in lease.take():
            yield waiting(waited)
        _claim_output(plan, statistics, replacing and not resumable(plan))
        create_output(plan)
        _forget(plan, again)
        try:
            yield from _slabs(plan, statistics, runner, device, lease)
        except InputError as error:  # of a worker: weights, device or output are not the planned ones there
            raise RunError(f"{error}. Mend this; {GO_ON}") from error
        lease.check()
        state = finish_output(plan)
    except Exception as error:
        state = "failed"
        if isinstance(error, OSError):
            raise_permanent(error, f"the output {plan.group_url}")
            raise RunError(f"the output {plan.group_url}: {reason_of(error)}; {GO_ON}") from error
        raise
    finally:
        lease.release(state)


def check_output(plan: DenoisePlan, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, or that exists, unless this plan began it or it may be overwritten.

    Raises InputError; leaves all as it was.
    """
    url, ledger = plan.group_url, Ledger(plan.target.url)
    try:
        if overwrite:
            if storage.exists(url) and not ledger.begun() and not is_zarr(url) and not _is_bare_claim(plan):
                raise InputError(
                    f"{url} is no Zarr and is not overwritten: delete it yourself, or choose another output"
                )
        elif ledger.begun():
            if not _damaged_but_ours(plan) and not ledger.grows(plan):
                ledger.refuse_others(plan)
        elif storage.exists(url) and not _is_bare_claim(plan):
            if ledger.begun():  # by another process, just now
                return check_output(plan, overwrite)
            raise InputError(f"{url} exists and was not made by nrrn denoise: choose another output, or --overwrite")
        storage.check_writable(url)
    except OSError as error:
        raise InputError(f"the output {url} cannot be written: {error.strerror or error}; choose another") from error


def _is_bare_claim(plan: DenoisePlan) -> bool:
    """Whether there is nothing but a ledger's files: a driver was killed before it began, or when all was deleted."""
    ledger = f"{plan.target.level_path}/nrrn/"
    if is_zarr(plan.group_url):
        return False
    files = storage.list_tree(plan.group_url, partials=True)
    ours = [name.startswith(ledger) or ".probe" in name for name in files]  # another may look whether it can write
    return all(ours) if ours else not storage.listed(plan.group_url)  # a file, else one that looks has just gone


def _damaged_but_ours(plan: DenoisePlan) -> bool:
    """Whether the ledger's settings cannot be read, but the output's own attributes say that they are the plan's."""
    try:
        Ledger(plan.target.url).settings()
    except InputError:
        return _provenance_fits(plan)
    return False


def _provenance_fits(plan: DenoisePlan) -> bool:
    try:
        return (get_provenance(plan.group_url) or {}).get("fingerprint") == plan.fingerprint
    except InputError:  # no Zarr, as when it was killed before the group was made, or damaged
        return False


def resumable(plan: DenoisePlan) -> bool:
    """Whether an output that exists is this plan's, and unfinished."""
    try:
        state = (get_provenance(plan.group_url) or {}).get("state")
        return state == "unfinished" and (_damaged_but_ours(plan) or not Ledger(plan.target.url).changes(plan))
    except InputError:  # no Zarr, as when it was killed before the group was made, or damaged: nothing to keep
        return False


def refuse_changed_source(plan: DenoisePlan, kept: SliceStatistics) -> None:
    """Raises InputError if a slice in the middle has another mean or std than when the output was begun."""
    z = (kept.z.start + kept.z.stop) // 2
    middle = Span(z, z + 1)
    now = merge_boxes(measure_box(plan.source, box) for box in statistics_boxes(plan.source, middle))
    (mean, std), (mean_then, std_then) = ((s.mean[0], s.std[0]) for s in (now, kept.of(middle)))
    if max(abs(mean - mean_then), abs(std - std_then)) > 1e-6 * std:  # sums of floats differ between processors
        raise InputError(
            f"{plan.source.url} has changed since {plan.group_url} was begun: slice z={z} has another mean or std. "
            "Choose another output, or delete this one"
        )


def _claim_output(plan: DenoisePlan, statistics: SliceStatistics, replacing: bool) -> None:
    """Make the output this plan's, under its lease: begin it, or clear what a killed run left half-written."""
    ledger = Ledger(plan.target.url)
    if replacing:
        storage.remove_all_but(ledger.url, "drivers")  # first: a record must never outlive its voxels
        storage.remove_all_but(plan.group_url, f"{plan.target.level_path}/nrrn/drivers")
    elif ledger.begun() and _damaged_but_ours(plan):
        ledger.mend(plan)
    ledger.begin(plan)
    if ledger.statistics() != statistics:
        ledger.put_statistics(statistics)
    storage.remove_partials(plan.group_url)


def create_output(plan: DenoisePlan) -> None:
    """Make the group and the array, or let them grow to the plan's slices."""
    create_volume(plan.target, _provenance(plan))
    provenance = get_provenance(plan.group_url) or {}
    if provenance.get("fingerprint") != plan.fingerprint:
        now = {"state": "unfinished", "fingerprint": plan.fingerprint, "settings": plan.settings}
        set_provenance(plan.group_url, provenance | now)


def finish_output(plan: DenoisePlan) -> str:
    """Write down that all of the plan's slabs are done; the output's state, growing or complete."""
    provenance = get_provenance(plan.group_url) or {}
    state = "growing" if plan.growing else "complete"
    if provenance.get("state") != state:
        set_provenance(plan.group_url, provenance | {"state": state, "completed": _now()})
    return state


def _forget(plan: DenoisePlan, again: frozenset[str]) -> None:
    """Let slabs count as not done."""
    if again:
        set_provenance(plan.group_url, (get_provenance(plan.group_url) or {}) | {"state": "unfinished"})
    for key in again:
        Ledger(plan.target.url).forget(key)


def _all_statistics(
    plan: DenoisePlan, runner: Runner, kept: SliceStatistics | None
) -> Generator[Progress, None, SliceStatistics]:
    """Every slice's mean and std, of the slices that the plan needs; only those are measured that are not kept."""
    if kept is None:
        return (yield from _measure(plan, runner, plan.statistics_z))
    refuse_changed_source(plan, kept)
    if covers(kept, plan):
        return kept
    later = yield from _measure(plan, runner, Span(kept.z.stop, plan.statistics_z.stop))
    return kept.followed_by(later)


def covers(kept: SliceStatistics | None, plan: DenoisePlan) -> bool:
    """Whether all slices that the plan needs were measured."""
    return kept is not None and kept.z.stop >= plan.statistics_z.stop


def _measure(plan: DenoisePlan, runner: Runner, z: Span) -> Generator[Progress, None, SliceStatistics]:
    boxes = statistics_boxes(plan.source, z)
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
        f"{source.url} cannot be read at voxels {outcome.item}: {reason_of(outcome.error)}. Repair it there, or leave "
        f"slices {outcome.item.z} out with --roi (statistics are of whole slices)"
    ) from outcome.error


def _slabs(
    plan: DenoisePlan, statistics: SliceStatistics, runner: Runner, device: str, lease: Lease
) -> Iterator[Progress]:
    """Denoise every slab that is not recorded, or not stored as its record says."""
    slabs, ledger = plan.slabs, Ledger(plan.target.url)
    recorded = yield from forget_torn(plan)
    failed_before = ledger.failed()
    for key in failed_before & recorded:  # its driver was killed before it could
        ledger.clear_failure(key)
    used = used_statistics(plan, statistics)
    tasks = (SlabTask(slab, used.of(slab.read.z)) for slab in slabs if slab.key not in recorded)
    tally = Tally(len(slabs), sum(slab.key in recorded for slab in slabs) if recorded else 0)
    yield tally.progress()
    for outcome in runner(partial(denoise_slab, plan, device), tasks):
        lease.check()
        key = outcome.item.slab.key
        if outcome.error is not None:
            ledger.put_failure(key, reason_of(outcome.error))
        elif key in failed_before:
            ledger.clear_failure(key)
        tally.add(key, outcome)
        lease.facts.update(tally.facts())
        if outcome.error is None:
            yield tally.progress(outcome.result)
    tally.refuse_failures()
    refuse_incomplete(plan)


def forget_torn(plan: DenoisePlan) -> Generator[Progress, None, set[str]]:
    """The slabs that are recorded, and stored as their records say; others' records are deleted."""
    ledger = Ledger(plan.target.url)
    recorded = ledger.done()
    for key, wrong in ledger.torn(recorded, _units(plan), stored_units(plan.target)).items():
        ledger.forget(key)
        del recorded[key]
        yield Progress("denoising", 0, len(plan.slabs), note=f"slab {key}: {wrong}; it is denoised again")
    return set(recorded)


def refuse_incomplete(plan: DenoisePlan) -> None:
    """Raises RunError if a slab is not recorded, or not stored as its record says."""
    ledger = Ledger(plan.target.url)
    recorded = ledger.done()
    if missing := [slab.key for slab in plan.slabs if slab.key not in recorded]:
        raise RunError(f"{len(missing)} slabs have no record, such as {min(missing)}; {GO_ON}")
    if torn := ledger.torn(recorded, _units(plan), stored_units(plan.target)):
        raise RunError(f"{len(torn)} slabs were damaged meanwhile, such as {min(torn)}; {GO_ON}")


def used_statistics(plan: DenoisePlan, statistics: SliceStatistics) -> SliceStatistics:
    """What slices are normalised with: their own statistics, or the volume's."""
    return statistics.pooled() if plan.method.statistics == "volume" else statistics


def _units(plan: DenoisePlan) -> Iterator[tuple[str, set[Box]]]:
    return ((slab.key, units_of(plan, slab)) for slab in plan.slabs)


@dataclass
class Tally:
    """How many slabs are done, and which failed and why."""

    total: int
    before: int  # done before this run
    voxels: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    in_a_row: list[str] = field(default_factory=list)  # failed slabs since the last that was done
    started: float = field(default_factory=monotonic)
    finished: int = 0  # by this run

    def add(self, key: str, outcome: Outcome) -> None:
        """Count one slab. Raises RunError if BREAKER of them, one after the other, failed for one reason."""
        if outcome.error is None:
            self.finished, self.voxels, self.in_a_row = self.finished + 1, self.voxels + outcome.result.voxels, []
            return
        self.failed[key] = reason_of(outcome.error)
        alike = self.in_a_row and _kind(self.failed[self.in_a_row[-1]]) == _kind(self.failed[key])
        self.in_a_row = [*self.in_a_row, key] if alike else [key]
        if len(self.in_a_row) >= BREAKER:
            raise RunError(
                f"stopped: {len(self.in_a_row)} slabs one after the other failed for one reason, "
                f"{self.failed[key]} ({', '.join(self.in_a_row)}). Mend this; {GO_ON}"
            )

    def progress(self, record: Record | None = None, done: int | None = None) -> Progress:
        """`done`: by others too, if they are at work."""
        done = self.before + self.finished if done is None else done
        return Progress("denoising", done, self.total, self.voxels, record)

    def facts(self) -> dict[str, Any]:
        """What nrrn status shows."""
        return {"slabs": self.finished, "voxels": self.voxels, "seconds": monotonic() - self.started}

    def refuse_failures(self) -> None:
        """Raises SlabsFailedError if any failed."""
        if self.failed:
            raise SlabsFailedError.of(self.failed, self.total)


def _kind(reason: str) -> str:
    """A reason without the words that hold numbers or paths: the same for all slabs that fail alike."""
    return re.sub(r"\S*[/\d]\S*", "", reason)


def units_of(plan: DenoisePlan, slab: Slab) -> set[Box]:
    """The target's write units that a slab owns."""
    return set(boxes_of(plan.target_box(slab), plan.target.write_unit))


def waiting(waited: float) -> Progress:
    """For another driver that may be alive, so many seconds by now."""
    return Progress("waiting for another driver's lease", int(waited), int(LEASE_S))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _provenance(plan: DenoisePlan) -> dict[str, Any]:
    packages = ("nrrn-pipeline", "torch", "zarr", "dask", "numpy")
    return {
        "state": "unfinished",
        "begun": _now(),
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "weights": plan.denoiser.path if isinstance(plan.denoiser, Weights) else None,
        "source group": plan.source.group_url,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
