"""Jobs, one after the other, on one cluster: what is done already is left alone, what fails stops nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from nrrn_pipeline.api import RunWatch, carry_out, open_runner, with_levels
from nrrn_pipeline.batch.manifest import Job
from nrrn_pipeline.cluster import LocalSettings
from nrrn_pipeline.cost import refuse_what_cannot_fit
from nrrn_pipeline.errors import InputError, NrrnError, RunError, SlabsFailedError, readable
from nrrn_pipeline.network import choose_device
from nrrn_pipeline.options import Options
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.pyramid import plan_pyramid
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.run import check_output
from nrrn_pipeline.runners import Runner
from nrrn_pipeline.volume import get_provenance

State = Literal["done", "done before", "slabs failed", "failed", "waiting"]
COLUMNS = ("volume", "state", "slabs", "seconds", "reason")


@dataclass(frozen=True)
class Result:
    """What became of one volume; `slabs` is 0 where no plan could be made.

    done before: complete with the same settings, and so nothing was read or written. slabs failed: all others are done.
    failed: not begun or broken off, see `reason`. waiting: a watch ended before its turn came.
    """

    job: Job
    state: State
    slabs: int = 0
    seconds: float = 0.0
    reason: str = ""


class BatchWatch(RunWatch):
    """Is told how a batch goes, and each run of it; override what you want to see."""

    def taken(self, job: Job, number: int, total: int) -> None:
        """The volume's turn has come, as the `number`-th of those that are to be denoised."""

    def ended(self, result: Result) -> None:
        """The volume is done, or was before, or failed."""

    def noted(self, text: str) -> None:
        """Something that the user should know, and that concerns no single volume."""


def run_batch(jobs: Sequence[Job], options: Options | None = None, watch: BatchWatch | None = None) -> list[Result]:
    """What became of each volume, in the jobs' order; called again after any interruption, it does what is left.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError, with nothing written, if the options cannot be or the cluster cannot be had; RunError if the
    cluster, and not a volume, broke: what is done is kept.
    """
    results, watch = {}, watch or BatchWatch()
    for result in results_of(jobs, options or Options(), watch):
        results[result.job] = result
        watch.ended(result)
    return [results[job] for job in jobs]


def results_of(jobs: Sequence[Job], options: Options, watch: BatchWatch) -> Iterator[Result]:
    """A result for each volume as it ends. All are planned first, and workers start if any is left to denoise.

    Raises what run_batch raises.
    """
    if options.overwrite or options.share is not None:
        raise InputError("a batch overwrites nothing and is not shared: leave out overwrite and share")
    if options.here:
        choose_device(options.device)  # else each volume would be refused for it
    plans: dict[Job, DenoisePlan] = {}
    for number, job in enumerate(jobs, start=1):
        planned = planned_or_ended(job, options)
        watch.progressed(Progress("planning", number, len(jobs)))
        if isinstance(planned, Result):
            yield planned
        else:
            plans[job] = planned
    if not plans:
        return
    all_plans = [each for plan in plans.values() for each in with_levels(plan, options)]
    with open_runner(all_plans, options) as (runner, where):
        for number, (job, plan) in enumerate(plans.items(), start=1):
            watch.taken(job, number, len(plans))
            watch.started(plan, where)
            result = _carried_out(job, plan, options, runner, watch)
            yield result
            if result.state == "failed":
                _refuse_broken(runner, result)


def planned_or_ended(job: Job, options: Options) -> DenoisePlan | Result:
    """The plan of a volume that is to be denoised; else its result: done before, or failed, as it cannot be."""
    started = perf_counter()
    try:
        plan = make_plan(job.source, job.output, job.weights, job.settings.over(options))
        if _is_complete(plan, options.pyramid):
            return Result(job, "done before", len(plan.slabs), perf_counter() - started)
        check_output(plan)
        if options.here:  # the largest volume would have the whole batch refused
            local = options.cluster_settings
            workers = local.workers if isinstance(local, LocalSettings) else None
            refuse_what_cannot_fit(plan, workers or 1, options.slabs_each)
    except (NrrnError, OSError) as error:
        return Result(job, "failed", 0, perf_counter() - started, reason_of(error))
    return plan


def _is_complete(plan: DenoisePlan, pyramid: bool) -> bool:
    """Whether a run with the same settings ended, as the output says: two small reads, and no listing."""
    try:
        made = get_provenance(plan.group_url) or {}
        levels = [get_provenance(level.root_url) or {} for level in plan_pyramid(plan.target)] if pyramid else []
    except InputError:  # nothing there, or damaged
        return False
    complete = all(each.get("state") == "complete" for each in (made, *levels))
    return complete and made.get("fingerprint") == plan.fingerprint


def _carried_out(job: Job, plan: DenoisePlan, options: Options, runner: Runner, watch: BatchWatch) -> Result:
    state: State
    started, state, reason = perf_counter(), "done", ""
    try:
        carry_out(plan, options, runner, watch)
    except SlabsFailedError as error:
        state, reason = "slabs failed", str(error)
    except (NrrnError, OSError) as error:
        state, reason = "failed", reason_of(error)
    return Result(job, state, len(plan.slabs), perf_counter() - started, reason)


def _refuse_broken(runner: Runner, failed: Result) -> None:
    """Raises RunError if not even an empty task is done: it is the cluster that broke, and not the volume."""
    try:
        broken = next((outcome.error for outcome in runner(bool, [None]) if outcome.error is not None), None)
    except Exception as error:  # clients whose scheduler is gone raise what they like
        broken = error
    if broken is not None:
        raise RunError(
            f"the batch ends, as the cluster cannot do even an empty task; {failed.job.source}: {failed.reason}"
        ) from broken


def exit_status(results: Sequence[Result]) -> int:
    """The command line's: 0 all are done, 3 but for slabs, 1 a volume is not."""
    states = {result.state for result in results}
    if states & {"failed", "waiting"}:
        return 1
    return SlabsFailedError.exit_status if "slabs failed" in states else 0


def table_of(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A line of cells for each volume, after one of COLUMNS; no cell holds a tab or a line's end."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for result in results:
        reason = "; ".join(result.reason.split("\n"))
        cells = (result.job.source, result.state, str(result.slabs), f"{result.seconds:.1f}", reason)
        lines.append(tuple(map(readable, cells)))
    return lines
