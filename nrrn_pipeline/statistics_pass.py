"""The pass before denoising: every slice's mean and std, from whoever knows them already, else measured box by box."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import cast

from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.runners import Outcome, Runner
from nrrn_pipeline.statistics import MeasuredBox, SliceStatistics, measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.volume import Volume, stored_units


def all_statistics(
    plan: DenoisePlan, runner: Runner, kept: SliceStatistics | None
) -> Generator[Progress, None, SliceStatistics]:
    """Every slice's mean and std, of the slices that the plan needs; only those are measured that nobody knows.

    `kept`: with the output. Raises InputError if they are of another source than there is now, or it holds NaN.
    """
    if kept is None:
        return known_statistics(plan) or (yield from _measure(plan, runner, plan.statistics_z))
    refuse_changed_source(plan, kept)
    if covers(kept, plan):
        return kept
    later = yield from _measure(plan, runner, Span(kept.z.stop, plan.statistics_z.stop))
    return kept.followed_by(later)


def known_statistics(plan: DenoisePlan) -> SliceStatistics | None:
    """Those that whoever made the source has kept with it, if the plan's slices are among them and still as they were.

    Lists the source's objects, whose sizes must be those that were recorded, and reads one slice, if any are kept.
    """
    ledger = Ledger(plan.source.url)
    known = ledger.own_statistics()
    if known is None or known.first_z > plan.statistics_z.start or not covers(known, plan):
        return None
    if not _is_as_recorded(ledger, plan.source):
        return None
    known = known.of(plan.statistics_z)
    return known if _still_hold(plan.source, known) else None


def _is_as_recorded(ledger: Ledger, source: Volume) -> bool:
    """Whether all slabs of a volume are recorded, and stored in the sizes that they were written in."""
    try:
        slabs, recorded = ledger.slabs(), ledger.done()
        units = ((key, set(boxes_of(keep, source.write_unit))) for key, keep in slabs.items())
    except InputError:  # damaged
        return False
    return slabs.keys() <= recorded.keys() and not ledger.torn(recorded, units, stored_units(source))


def covers(kept: SliceStatistics | None, plan: DenoisePlan) -> bool:
    """Whether all slices that the plan needs were measured."""
    return kept is not None and kept.z.stop >= plan.statistics_z.stop


def statistics_of(
    plan: DenoisePlan, runner: Runner, spans: Sequence[Span]
) -> Generator[Progress, None, list[SliceStatistics]]:
    """What slices of some spans are normalised with in the whole run; no others are measured, unless all count.

    Raises InputError if they hold NaN.
    """
    if plan.method.statistics == "volume":
        found = used_statistics(plan, (yield from all_statistics(plan, runner, None)))
    elif (known := known_statistics(plan)) is not None:
        found = known
    else:
        return (yield from _measure_each(plan, runner, spans))
    return [found.of(z) for z in spans]


def _measure(plan: DenoisePlan, runner: Runner, z: Span) -> Generator[Progress, None, SliceStatistics]:
    (found,) = yield from _measure_each(plan, runner, [z])
    return found


def _measure_each(
    plan: DenoisePlan, runner: Runner, spans: Sequence[Span]
) -> Generator[Progress, None, list[SliceStatistics]]:
    groups = [statistics_boxes(plan.source, z) for z in spans]
    boxes = [*dict.fromkeys(box for group in groups for box in group)]
    parts: dict[Box, MeasuredBox] = {}
    yield Progress("statistics", 0, len(boxes))
    for outcome in runner(partial(measure_box, plan.source), boxes):
        parts[outcome.item] = measured(plan.source, outcome)
        yield Progress("statistics", len(parts), len(boxes))
    return [merge_boxes(parts[box] for box in group) for group in groups]


def measured(source: Volume, outcome: Outcome) -> MeasuredBox:
    """What measure_box gave for one box. Raises RunError, with the place, if it failed on every attempt."""
    if outcome.error is None:
        return cast("MeasuredBox", outcome.result)
    raise RunError(
        f"{source.url} cannot be read at voxels {outcome.item}: {reason_of(outcome.error)}. Repair it there, or leave "
        f"slices {outcome.item.z} out with --roi (statistics are of whole slices)"
    ) from outcome.error


def refuse_changed_source(plan: DenoisePlan, kept: SliceStatistics) -> None:
    """Raises InputError if a slice in the middle has another mean or std than when the output was begun."""
    if not _still_hold(plan.source, kept):
        raise InputError(
            f"{plan.source.url} has changed since {plan.group_url} was begun: slice z={_middle(kept)} has another mean "
            "or std. Choose another output, or delete this one"
        )


def _still_hold(source: Volume, kept: SliceStatistics) -> bool:
    """Whether a slice in the middle has the mean and std that were kept."""
    middle = Span(_middle(kept), _middle(kept) + 1)
    now = merge_boxes(measure_box(source, box) for box in statistics_boxes(source, middle))
    (mean, std), (mean_then, std_then) = ((s.mean[0], s.std[0]) for s in (now, kept.of(middle)))
    return max(abs(mean - mean_then), abs(std - std_then)) <= 1e-6 * std  # sums of floats differ between processors


def _middle(kept: SliceStatistics) -> int:
    return (kept.z.start + kept.z.stop) // 2


def used_statistics(plan: DenoisePlan, statistics: SliceStatistics) -> SliceStatistics:
    """What slices are normalised with: their own statistics, or the volume's."""
    return statistics.pooled() if plan.method.statistics == "volume" else statistics
