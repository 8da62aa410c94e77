"""What a person sees: results on standard output; progress, notes and errors on standard error.

Where that is no terminal, as in the log of a job, progress is a line now and then; in a notebook it is a bar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nrrn_pipeline import api
from nrrn_pipeline.cost import counted, duration_text
from nrrn_pipeline.drift import LARGEST, Drift
from nrrn_pipeline.errors import GO_ON, readable
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.progress import Progress as RunProgress
from nrrn_pipeline.slabs import Plan
from nrrn_pipeline.training.processes import say_once

out, notes, err = (  # results; what --quiet leaves out; errors
    Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False) for stderr in (False, True, True)
)
LINE_EVERY_S = 30.0


class LogLines(Progress):
    """Progress where nothing can be drawn over: a line every LINE_EVERY_S, and one when a task is done."""

    def __init__(self) -> None:
        super().__init__(disable=True)  # the drawing alone: tasks and their speeds are kept
        self._said: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As Progress does; and say how far the task is, if it is time to."""
        task = self.tasks[task_id]  # no task is ever removed
        before = task.finished, task.fields.get("speed")
        super().update(task_id, **changes)
        ends = task.finished and (task.finished, task.fields.get("speed")) != before
        now = self.get_time()
        if ends or now >= self._said.setdefault(task_id, task.start_time or now) + LINE_EVERY_S:
            self._said[task_id] = now
            left = task.time_remaining
            told = (
                f"{task.description}: {task.completed:g}" + (f" of {task.total:g}" if task.total is not None else ""),
                task.fields.get("speed"),
                f"{duration_text(left)} left" if left else "",
            )
            notes.print(readable(", ".join(filter(None, told))))


class Watch(api.RunWatch):
    """Shows a run on a progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def started(self, plan: Plan, where: str) -> None:
        """Say where."""
        notes.print(f"{counted(len(plan.slabs), 'slab')} on {where}")
        self.bar.start()

    def progressed(self, progress: RunProgress) -> None:
        """Move the bar on, or say what should be known."""
        if progress.note:
            notes.print(readable(progress.note))
            return
        if progress.stage not in self.tasks:
            self.tasks[progress.stage] = self.bar.add_task(progress.stage, total=progress.total, speed="")
        task = self.tasks[progress.stage]
        elapsed = self.bar.tasks[task].elapsed
        speed = f"{progress.voxels / elapsed / 1e6:.3f} million voxels/s" if progress.voxels and elapsed else ""
        self.bar.update(task, completed=progress.done, speed=speed)

    def looked(self, there: int, done: int) -> None:
        """Say how far a volume that is followed has come."""
        notes.print(f"{counted(there, 'slice')} there, {done} denoised")


@contextmanager
def progress_bar(when_interrupted: str) -> Iterator[Progress]:
    """A progress bar on standard error, shown once it is started, and a word on what Ctrl-C leaves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    drawn = notes.is_terminal or notes.is_jupyter
    bar = Progress(*columns, TimeRemainingColumn(), console=notes) if drawn else LogLines()

    def stop() -> None:
        if bar.live.is_started:
            bar.stop()

    try:
        yield bar
    except KeyboardInterrupt:
        stop()
        say_once(lambda: err.print(f"nrrn: interrupted; {when_interrupted}"))
        raise
    finally:
        stop()


def counted_on(bar: Progress, what: str, total: int | None = None) -> Callable[[int, int], None]:
    """Is told how many are done, of how many, and shows it."""
    task = bar.add_task(what, total=total, speed="")

    def progressed(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    return progressed


@contextmanager
def showing_progress() -> Iterator[api.RunWatch]:
    """A watch that shows how runs go, in a notebook, a terminal or a log: `denoise(..., watch=watch)`."""
    with progress_bar(GO_ON) as bar:
        yield Watch(bar)


def facts_of(summary: api.Summary) -> dict[str, Any]:
    """What a run did, for scripts."""
    seconds = summary.seconds
    return {
        "output": summary.plan.group_url,
        "state": "growing" if summary.plan.growing else "complete",
        "slabs": summary.slabs,
        "resumed": summary.resumed,
        "done": summary.done,
        "level_slabs": summary.level_slabs,
        "voxels": summary.voxels,
        "seconds": seconds,
        "voxels_per_second": summary.voxels / seconds if seconds else None,
        "peak_memory_bytes": summary.peak_memory_bytes,
    }


def print_json(facts: Mapping[str, Any]) -> None:
    """One line of JSON on standard output; what is no number there is null."""
    typer.echo(json.dumps(_in_json(facts), allow_nan=False))


def _in_json(value: Any) -> Any:
    match value:
        case np.ndarray() | np.generic():
            return _in_json(value.tolist())
        case Mapping():
            return {str(name): _in_json(part) for name, part in value.items()}
        case str() | int() | None:
            return value
        case float():
            return value if isfinite(value) else None
        case Sequence() | set() | frozenset():
            return [_in_json(part) for part in (value if isinstance(value, Sequence) else sorted(value))]
        case _:
            return str(value)


def print_rows(rows: dict[str, str]) -> None:
    """Names and values, a line each, on standard output."""
    width = max(map(len, rows))
    for name, value in rows.items():
        shown = "\n".join(map(readable, value.split("\n")))
        out.print(f"{readable(name):{width}}  {shown}")  # never cut: scripts read it too


def network_text(network: Architecture) -> str:
    """A network in words."""
    kind = "" if network.kind == "nrrn" else f"{network.kind} ({network.inputs}), "
    return f"{kind}{counted(network.units, 'unit')}, {counted(network.channels, 'channel')}"


def drift_text(found: Drift) -> str:
    """Whether neighbouring slices are aligned, in words."""
    if not found.told:
        return "cannot be compared: most share no structure that noise does not hide"
    return step_text(float(found.steps.max()), found.worst_z)


def step_text(largest: float, z: int) -> str:
    """The same, of the largest shift between neighbours, at a slice z."""
    if largest <= LARGEST:
        return f"aligned within {max(largest, 0.1):.1f} voxels"
    return f"WARNING: shifted against each other by up to {largest:.1f} voxels (z={z}); nrrn align moves them back"


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    """In columns for people, with tabs for scripts."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(padded).rstrip() if out.is_terminal else "\t".join(line))  # rich would expand tabs
