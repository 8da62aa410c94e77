"""What a person sees: lines on standard output, progress and errors on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nrrn_pipeline import api
from nrrn_pipeline.cost import counted
from nrrn_pipeline.drift import LARGEST, Drift
from nrrn_pipeline.errors import readable
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.progress import Progress as RunProgress
from nrrn_pipeline.slabs import Plan
from nrrn_pipeline.training.processes import say_once

out, err = (Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False) for stderr in (False, True))


class Watch(api.RunWatch):
    """Shows a run on a progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def started(self, plan: Plan, where: str) -> None:
        """Say where."""
        err.print(f"{counted(len(plan.slabs), 'slab')} on {where}")
        self.bar.start()

    def progressed(self, progress: RunProgress) -> None:
        """Move the bar on, or say what should be known."""
        if progress.note:
            err.print(readable(progress.note))
            return
        if progress.stage not in self.tasks:
            self.tasks[progress.stage] = self.bar.add_task(progress.stage, total=progress.total, speed="")
        task = self.tasks[progress.stage]
        elapsed = self.bar.tasks[task].elapsed
        speed = f"{progress.voxels / elapsed / 1e6:.3f} million voxels/s" if progress.voxels and elapsed else ""
        self.bar.update(task, completed=progress.done, speed=speed)

    def looked(self, there: int, done: int) -> None:
        """Say how far a volume that is followed has come."""
        err.print(f"{counted(there, 'slice')} there, {done} denoised")


@contextmanager
def progress_bar(when_interrupted: str) -> Iterator[Progress]:
    """A progress bar on standard error, shown once it is started, and a word on what Ctrl-C leaves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=err)

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


def by_text(values: tuple[Any, ...]) -> str:
    """Sizes such as 64 x 512 x 512."""
    return " x ".join(f"{value:g}" for value in values)


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


def duration_text(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    """In columns for people, with tabs for scripts."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(padded).rstrip() if out.is_terminal else "\t".join(line))  # rich would expand tabs
