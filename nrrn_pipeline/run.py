"""Running a plan: check the output, see to statistics, make what slabs are not done, and check that all are."""

from __future__ import annotations

import platform
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, overload

from nrrn_pipeline import storage
from nrrn_pipeline.errors import GO_ON, InputError, RunError
from nrrn_pipeline.geometry import Box, boxes_of
from nrrn_pipeline.keeping import Keeping
from nrrn_pipeline.lease import Lease, wait_for_end
from nrrn_pipeline.ledger import Ledger, Record, box_key
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.progress import Progress, Tally, waiting
from nrrn_pipeline.pyramid import covering, plans_above
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.runners import Runner, raise_permanent
from nrrn_pipeline.slab import SlabTask, denoise_slab
from nrrn_pipeline.slabs import CopyPlan, Plan, Slab, slab_key
from nrrn_pipeline.statistics import SliceStatistics, merge_boxes
from nrrn_pipeline.statistics_pass import all_statistics, used_statistics
from nrrn_pipeline.volume import create_volume, get_provenance, is_zarr, set_level, set_provenance, stored_units
from nrrn_pipeline.writing import CopyTask, copy_slab


def run_plan(
    plan: Plan,
    runner: Runner,
    device: str = "auto",
    overwrite: bool = False,
    again: frozenset[str] = frozenset(),
    keeping: Keeping | None = None,
) -> Generator[Progress, None, None]:
    """Carry out a plan, or what is left of it, yielding its progress; when it ends, the output is complete.

    `overwrite` deletes an output that exists, but not an unfinished one with the same settings: that is resumed, so
    that a job which is started again by the same command always gets further. `again`: slabs to do though they are
    recorded. `keeping`: workers keep the chunks that their next slabs read too.

    Raises InputError if the output exists and was made otherwise (unless `overwrite`), another driver is at work on it,
    or the source holds NaN; nothing is written then. Raises SlabsFailedError if slabs failed on every attempt,
    RunError if storage refuses, or one slab after the other fails for one reason: what is done is kept.
    """
    check_output(plan, overwrite)
    ledger = Ledger(plan.target.url)
    for waited in wait_for_end(ledger.url):
        yield waiting(waited)
    replacing = overwrite and storage.exists(plan.root_url) and not resumable(plan)
    statistics = None
    if isinstance(plan, DenoisePlan):
        statistics = yield from all_statistics(plan, runner, None if replacing else ledger.statistics_for(plan))
    check_output(plan, overwrite)  # once more, as to measure takes long
    lease, state = Lease(ledger.url), "interrupted"
    try:
        for waited in lease.take():
            yield waiting(waited)
        _claim_output(plan, statistics, replacing and not resumable(plan))
        create_output(plan)
        _forget(plan, again)
        try:
            yield from _slabs(plan, runner, lease, *work_of(plan, statistics, device, keeping))
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


def check_output(plan: Plan, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, or that exists, unless this plan began it or it may be overwritten.

    Raises InputError; leaves all as it was.
    """
    url, ledger = plan.root_url, Ledger(plan.target.url)
    try:
        if overwrite and (not plan.is_level or ledger.begun()):
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
            raise InputError(f"{url} exists and was not made by nrrn: choose another output, or --overwrite")
        storage.check_writable(url)
    except OSError as error:
        raise InputError(f"the output {url} cannot be written: {error.strerror or error}; choose another") from error


def _is_bare_claim(plan: Plan) -> bool:
    """Whether there is nothing but a ledger's files: a driver was killed before it began, or when all was deleted."""
    if is_zarr(plan.root_url):
        return False
    files, ledger = storage.list_tree(plan.root_url, partials=True), _ledger_below(plan)
    # another may look whether it can write
    ours = [name.startswith(f"{ledger}/") or ".probe" in name for name in files]
    return all(ours) if ours else not storage.listed(plan.root_url)  # a file, else one that looks has just gone


def _ledger_below(plan: Plan) -> str:
    """The ledger's folder, relative to what is made as a whole."""
    return Ledger(plan.target.url).url.removeprefix(f"{plan.root_url}/")


def _damaged_but_ours(plan: Plan) -> bool:
    """Whether the ledger's settings cannot be read, but the output's own attributes say that they are the plan's."""
    try:
        Ledger(plan.target.url).settings()
    except InputError:
        return _provenance_fits(plan)
    return False


def _provenance_fits(plan: Plan) -> bool:
    try:
        return (get_provenance(plan.root_url) or {}).get("fingerprint") == plan.fingerprint
    except InputError:  # no Zarr, as when it was killed before the group was made, or damaged
        return False


def resumable(plan: Plan) -> bool:
    """Whether an output that exists is this plan's, and unfinished."""
    try:
        state = (get_provenance(plan.root_url) or {}).get("state")
        return state == "unfinished" and (_damaged_but_ours(plan) or not Ledger(plan.target.url).changes(plan))
    except InputError:  # no Zarr, as when it was killed before the group was made, or damaged: nothing to keep
        return False


def _claim_output(plan: Plan, statistics: SliceStatistics | None, replacing: bool) -> None:
    """Make the output this plan's, under its lease: begin it, or clear what a killed run left half-written."""
    ledger = Ledger(plan.target.url)
    if replacing:
        storage.remove_all_but(ledger.url, "drivers")  # first: a record must never outlive its voxels
        if plan.is_level:
            set_level(plan.target, there=False)
        storage.remove_all_but(plan.root_url, f"{_ledger_below(plan)}/drivers")
    elif ledger.begun() and _damaged_but_ours(plan):
        ledger.mend(plan)
    ledger.begin(plan)
    if statistics is not None and ledger.statistics() != statistics:
        ledger.put_statistics(statistics)
    storage.remove_partials(plan.target.url)
    storage.remove_partials(plan.group_url, deep=False)


def create_output(plan: Plan) -> None:
    """Make the group and the array, or let them grow to the plan's slices."""
    create_volume(plan.target, _provenance(plan))
    provenance = get_provenance(plan.root_url) or _provenance(plan)
    if provenance.get("fingerprint") != plan.fingerprint or plan.is_level:
        now = {"state": "unfinished", "fingerprint": plan.fingerprint, "settings": plan.settings}
        set_provenance(plan.root_url, provenance | now)


def finish_output(plan: Plan) -> str:
    """Write down that all of the plan's slabs are done, and what they tell; the output's state, growing or complete."""
    if isinstance(plan, CopyPlan) and plan.measures:
        _keep_statistics(plan)
    if plan.is_level:  # first: one that seems complete is not looked at again
        set_level(plan.target)
    provenance = get_provenance(plan.root_url) or {}
    state = "growing" if plan.growing else "complete"
    if provenance.get("state") != state:
        set_provenance(plan.root_url, provenance | {"state": state, "completed": _now()})
    return state


def _keep_statistics(plan: CopyPlan) -> None:
    """Merge what was measured slab by slab; should any of it be damaged, whoever needs it can measure again."""
    ledger = Ledger(plan.target.url)
    with suppress(ValueError):
        parts = ledger.read_measured([box_key(plan.target_box(slab)) for slab in plan.slabs])
        ledger.put_own_statistics(merge_boxes(parts))
    ledger.forget_measured()


def _forget(plan: Plan, again: frozenset[str]) -> None:
    """Let slabs count as not done."""
    if again:
        set_provenance(plan.root_url, (get_provenance(plan.root_url) or {}) | {"state": "unfinished"})
        Ledger(plan.target.url).forget_all(again)


GROWTH = {"roi", "source shape", "slab", "shard", "chunk"}  # settings of a level that change with its base's slices
Task = SlabTask | CopyTask


def work_of(
    plan: Plan, statistics: SliceStatistics | None, device: str, keeping: Keeping | None
) -> tuple[Callable[[Any], Record], Callable[[Slab], Task]]:
    """What workers do of a plan, and what they are sent for each slab. `statistics`: the source's, to denoise it."""
    if isinstance(plan, CopyPlan):
        return partial(copy_slab, plan), CopyTask
    assert isinstance(plan, DenoisePlan)
    assert statistics is not None
    used = used_statistics(plan, statistics)
    return partial(denoise_slab, plan, device, keeping=keeping), lambda slab: SlabTask(slab, used.of(slab.read.z))


def _slabs(
    plan: Plan, runner: Runner, lease: Lease, work: Callable[[Any], Record], task_for: Callable[[Slab], Task]
) -> Iterator[Progress]:
    """Make every slab that is not recorded, or not stored as its record says."""
    slabs, ledger = plan.slabs, Ledger(plan.target.url)
    recorded = yield from forget_torn(plan)
    forget_above(plan, recorded)
    forget_measured_before(plan, recorded)
    failed_before = ledger.failed()
    for key in failed_before & recorded:  # its driver was killed before it could
        ledger.clear_failure(key)
    left: Sequence[int] = range(len(slabs))
    if recorded:
        left = array("L", (number for number, slab in enumerate(slabs) if slab.key not in recorded))
    tasks = _Tasks(slabs, left, task_for)
    tally = Tally(plan.stage, len(slabs), sum(slab.key in recorded for slab in slabs) if recorded else 0)
    yield tally.progress()
    for outcome in runner(work, tasks):
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


@dataclass(frozen=True)
class _Tasks(Sequence[Task]):
    """What workers are sent for some slabs, by number; each made when it is asked for."""

    slabs: Sequence[Slab]
    numbers: Sequence[int]
    task_for: Callable[[Slab], Task]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Task: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Task]: ...

    def __getitem__(self, place: int | slice) -> Task | Sequence[Task]:
        if isinstance(place, slice):
            return _Tasks(self.slabs, self.numbers[place], self.task_for)
        return self.task_for(self.slabs[self.numbers[place]])


def forget_torn(plan: Plan) -> Generator[Progress, None, set[str]]:
    """The slabs that are recorded, and stored as their records say; others' records are deleted."""
    ledger = Ledger(plan.target.url)
    recorded = ledger.done()
    for key, wrong in ledger.torn(recorded, _units(plan), stored_units(plan.target)).items():
        ledger.forget(key)
        del recorded[key]
        yield Progress(plan.stage, 0, len(plan.slabs), note=f"slab {key}: {wrong}; it is done again")
    return set(recorded)


def forget_measured_before(plan: Plan, recorded: set[str]) -> None:
    """What is known of the output's slices holds no more if slabs are done again: files may have been mended."""
    if isinstance(plan, CopyPlan) and plan.measures and len(recorded) < len(plan.slabs):
        Ledger(plan.target.url).forget_own_statistics()


def forget_above(plan: Plan, recorded: set[str]) -> None:
    """What levels of lower resolution were made of slabs that are not recorded is to be made again, after them.

    Before these are done: a run that is killed in between leaves no level that seems whole and is not. Levels of a
    volume that has grown since are deleted.
    """
    changed: Iterable[Box] = (plan.target_box(slab) for slab in plan.slabs if slab.key not in recorded)
    grown = False
    for level in plans_above(plan.target) if Ledger(_next_level(plan)).begun() else []:
        ledger = Ledger(level.target.url)
        if not ledger.begun():
            return
        changes: set[str] = set()
        with suppress(InputError):  # of settings that are damaged there is nothing to compare
            changes = ledger.keys_changed(level)
        if grown := grown or (bool(changes) and changes <= GROWTH):
            set_level(level.target, there=False)
            storage.remove_tree(ledger.url)  # first: a record must never outlive its voxels
            storage.remove_tree(level.target.url)
        elif changed := covering(level, changed):
            if is_zarr(level.root_url):  # it may have been killed before it made the array
                set_provenance(level.root_url, (get_provenance(level.root_url) or {}) | {"state": "unfinished"})
            ledger.forget_all({slab_key(box) for box in changed})


def _next_level(plan: Plan) -> str:
    number = plan.target.level_path
    return f"{plan.group_url}/{int(number) + 1 if number.isdecimal() else 'none'}"


def refuse_incomplete(plan: Plan) -> None:
    """Raises RunError if a slab is not recorded, or not stored as its record says."""
    ledger = Ledger(plan.target.url)
    recorded = ledger.done()
    if missing := [slab.key for slab in plan.slabs if slab.key not in recorded]:
        raise RunError(f"{len(missing)} slabs have no record, such as {min(missing)}; {GO_ON}")
    if torn := ledger.torn(recorded, _units(plan), stored_units(plan.target)):
        raise RunError(f"{len(torn)} slabs were damaged meanwhile, such as {min(torn)}; {GO_ON}")


def _units(plan: Plan) -> Iterator[tuple[str, set[Box]]]:
    return ((slab.key, units_of(plan, slab)) for slab in plan.slabs)


def units_of(plan: Plan, slab: Slab) -> set[Box]:
    """The target's write units that a slab owns."""
    return set(boxes_of(plan.target_box(slab), plan.target.write_unit))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _provenance(plan: Plan) -> dict[str, Any]:
    packages = ("nrrn-pipeline", "torch", "zarr", "dask", "numpy")
    return {
        "state": "unfinished",
        "begun": _now(),
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        **plan.origins,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
