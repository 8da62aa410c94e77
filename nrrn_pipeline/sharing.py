"""Carrying out a plan together with other processes, without a scheduler: each its share, then what others left."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from nrrn_pipeline import presence, storage
from nrrn_pipeline.errors import GO_ON, InputError, RunError, SlabsFailedError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.keeping import Keeping
from nrrn_pipeline.ledger import Ledger, Record, box_key
from nrrn_pipeline.members import Member, Share
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.progress import Progress, Tally, waiting
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.run import (
    Task,
    check_output,
    create_output,
    finish_output,
    forget_above,
    forget_measured_before,
    forget_torn,
    refuse_incomplete,
    work_of,
)
from nrrn_pipeline.runners import Runner, raise_permanent
from nrrn_pipeline.slabs import Plan, Slab
from nrrn_pipeline.statistics import SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.statistics_pass import covers, known_statistics, measured, refuse_changed_source

MERGING = "statistics"  # the claim of who merges what all have measured


def run_share(
    plan: Plan, share: Share, runner: Runner, device: str = "auto", keeping: Keeping | None = None
) -> Generator[Progress, None, None]:
    """Do a share of the plan, and what other processes leave, until all is done; yields this process's progress.

    `keeping`: as in run_plan.

    Raises InputError if the output exists and was made otherwise, or a driver is at work on it; nothing is written
    then. Raises SlabsFailedError if slabs failed wherever they were tried, RunError if storage refuses, the source
    holds NaN, or one slab after the other fails here for one reason: what is done is kept.
    """
    check_output(plan)
    ledger = Ledger(plan.target.url)
    member = Member(ledger.url, share)
    try:
        for waited in member.join():
            yield waiting(waited)
        ledger.begin(plan)
        try:
            statistics = None
            if isinstance(plan, DenoisePlan):
                statistics = yield from _statistics(plan, runner, member)
            create_output(plan)
            yield from _slabs(plan, runner, member, *work_of(plan, statistics, device, keeping))
        except InputError as error:  # the output is begun by now
            raise RunError(f"{error}. Mend this; {GO_ON}") from error
        finish_output(plan)
        ledger.forget_measured()
    except OSError as error:
        raise_permanent(error, f"the output {plan.group_url}")
        raise RunError(f"the output {plan.group_url}: {reason_of(error)}; {GO_ON}") from error
    finally:
        member.leave()
    with suppress(OSError):  # all is done: what is left behind does no harm
        if member.clear_up():
            storage.remove_partials(plan.target.url)


def _statistics(plan: DenoisePlan, runner: Runner, member: Member) -> Generator[Progress, None, SliceStatistics]:
    """All slices' mean and std, of which this process measures a part; another may merge them."""
    ledger = Ledger(plan.target.url)
    kept = ledger.statistics()
    if kept is not None:
        refuse_changed_source(plan, kept)
    elif (kept := known_statistics(plan)) is not None:
        ledger.put_statistics(kept)
    missing = plan.statistics_z if kept is None else Span(kept.z.stop, plan.statistics_z.stop)
    boxes = {box_key(box): box for box in statistics_boxes(plan.source, missing)} if len(missing) > 0 else {}
    names = {f"{MERGING}-{key}": key for key in boxes}

    def boxes_for(left: set[str]) -> Iterator[Box]:
        for name in _claimed(member, list(names), left, lambda name: ledger.is_measured(names[name])):
            yield boxes[names[name]]

    pauses = _Pauses()
    while kept is None or not covers(kept, plan):
        done = ledger.measured()
        yield Progress("statistics", len(done & boxes.keys()), len(boxes))
        left = {name for name, key in names.items() if key not in done}
        if left:
            worked = False
            for outcome in runner(partial(measure_box, plan.source), boxes_for(left)):
                ledger.put_measured(measured(plan.source, outcome))
                member.drop(f"{MERGING}-{box_key(outcome.item)}")
                worked = True
            pauses.after(worked)
        elif member.claim(MERGING):
            _merge(ledger, plan, list(boxes))
            member.drop(MERGING)
        else:
            pauses.after(False)
        kept = ledger.statistics()
    return kept


def _merge(ledger: Ledger, plan: DenoisePlan, keys: Sequence[str]) -> None:
    """Put together what all have measured, unless another did so, and has cleared up perhaps."""
    kept = ledger.statistics()
    if covers(kept, plan):
        return
    try:
        later = merge_boxes(ledger.read_measured(keys))
    except ValueError:
        return  # what was damaged is deleted, and measured again
    ledger.put_statistics(later if kept is None else kept.followed_by(later))


def _slabs(
    plan: Plan, runner: Runner, member: Member, work: Callable[[Any], Record], task_for: Callable[[Slab], Task]
) -> Iterator[Progress]:
    """Do what is claimed, until every slab is recorded, or has failed since this process began."""
    ledger = Ledger(plan.target.url)
    slabs = {slab.key: slab for slab in plan.slabs}
    done = yield from forget_torn(plan)
    forget_above(plan, done)
    forget_measured_before(plan, done)
    failed_before = {key: ledger.failure(key) for key in ledger.failed()}
    tally = Tally(plan.stage, len(slabs), len(done))
    yield tally.progress()

    def tasks(left: set[str]) -> Iterator[Task]:
        for key in _claimed(member, list(slabs), left, ledger.is_done):
            yield task_for(slabs[key])

    pauses = _Pauses()
    while left := slabs.keys() - done - (failed := _failed_since(ledger, done, failed_before)):
        worked = False
        for outcome in runner(work, tasks(left)):
            member.check()
            worked, key = True, outcome.item.slab.key
            if outcome.error is not None:
                ledger.put_failure(key, reason_of(outcome.error), by=member.presence.owner)
            elif key in failed_before:
                ledger.clear_failure(key)
            member.drop(key)
            tally.add(key, outcome)
            member.facts.update(tally.facts())
            yield tally.progress(outcome.result)
        pauses.after(worked)
        done = set(ledger.done())
        yield tally.progress(done=len(done))
    if failed:
        raise SlabsFailedError.of({key: ledger.failure(key)[0] for key in failed}, len(slabs))
    refuse_incomplete(plan)


def _claimed(member: Member, pieces: Sequence[str], left: set[str], is_done: Callable[[str], bool]) -> Iterator[str]:
    """What the member can claim and nobody has done meanwhile."""
    for key in member.claimed(pieces, left):
        if is_done(key):  # by who had claimed it
            member.drop(key)
        else:
            yield key


class _Pauses:
    """Between looks at what others do while all that is left is in their hands; should one die, it is ours."""

    def __init__(self) -> None:
        self.next_s = 0.0

    def after(self, worked: bool) -> None:
        """No pause while there is work, else each as long again as the last, but no longer than signs of life take."""
        if worked:
            self.next_s = 0.0
            return
        self.next_s = min(2 * self.next_s, presence.RENEW_S) or presence.LOOK_S
        time.sleep(self.next_s)


def _failed_since(ledger: Ledger, done: set[str], before: dict[str, tuple[str, str]]) -> set[str]:
    """Slabs that some process has set aside since this one began."""
    return {key for key in ledger.failed() - done if ledger.failure(key) != before.get(key)}
