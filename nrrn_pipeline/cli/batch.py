"""nrrn batch: many volumes in one go, words in, one table out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer
from rich.progress import Progress

from nrrn_pipeline import api
from nrrn_pipeline.batch import (
    BatchWatch,
    Job,
    Result,
    exit_status,
    read_manifest,
    run_batch,
    table_of,
    watch_batch,
)
from nrrn_pipeline.cli.options import WORDS, Json, takes_options
from nrrn_pipeline.cli.terminal import Watch, err, notes, print_columns, print_json, progress_bar
from nrrn_pipeline.cost import counted
from nrrn_pipeline.errors import GO_ON, readable
from nrrn_pipeline.progress import Progress as RunProgress


class BatchBar(Watch, BatchWatch):
    """Shows the volume at work on a progress bar, and says of each how it ended."""

    def __init__(self, bar: Progress, results: dict[Job, Result]) -> None:
        super().__init__(bar)
        self.results = results

    def taken(self, job: Job, number: int, total: int) -> None:
        """Say which, and begin its bars."""
        for task in self.tasks.values():
            self.bar.reset(task, visible=False)
        notes.print(readable(f"{job.source}: volume {number} of {total}"))

    def progressed(self, progress: RunProgress) -> None:
        """Move the bar on, from planning on."""
        self.bar.start()
        super().progressed(progress)
        if not progress.note:
            self.bar.update(self.tasks[progress.stage], total=progress.total, visible=True)

    def ended(self, result: Result) -> None:
        """Keep it for the table; say what went wrong at once, slab by slab."""
        self.results[result.job] = result
        if result.reason:
            source = result.job.source
            said = result.reason if source in result.reason else f"{source}: {result.reason}"
            for line in f"nrrn: {said}".split("\n"):
                err.print(readable(line))

    def noted(self, text: str) -> None:
        """Say it."""
        notes.print(readable(text))


@takes_options(WORDS - {"roi", "overwrite", "shard_of"})
def batch(
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST",
            help="FILE.csv with columns source, output and any of weights, level, roi, slab, chunk, shard, tile, halo, "
            "images, stats, method, stitch; FILE.toml with tables volume of the same keys, and a table defaults; a "
            "glob, in quotes; or a folder with / at its end, for every Zarr in it.",
        ),
    ],
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="Of volumes that name none.")] = None,
    into: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Of a glob's or folder's outputs, which keep their names.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep looking for volumes, until Ctrl-C; take each once it is written.")
    ] = False,
    every: Annotated[
        float, typer.Option(help="Seconds between looks; a volume is written when two looks find the same files.")
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Denoise many volumes, one after the other on one cluster. Run it again: it does what is left or has been mended.

    Ends with a table of all volumes on standard output, of tabs if that is no terminal. Options are for volumes whose
    manifest does not say otherwise.

    Example: nrrn batch 's3://lab/raw/*.zarr' --into s3://lab/clean --weights lab.safetensors
    """
    look = partial(read_manifest, manifest, weights, into, empty=watch, method=options.method.name)
    results: dict[Job, Result] = {}
    try:
        with progress_bar(GO_ON) as bar:
            shown = BatchBar(bar, results)
            ended = watch_batch(look, options, every, shown) if watch else run_batch(look(), options, shown)
        results = {result.job: result for result in ended}  # in the manifest's order
    finally:  # also of what an interrupted batch has done
        if results:
            _print_table([*results.values()], as_json)
    raise typer.Exit(exit_status([*results.values()]))


def _print_table(results: Sequence[Result], as_json: bool) -> None:
    """All volumes; how many, on standard error."""
    if as_json:
        columns, *lines = table_of(results)
        print_json({"volumes": [dict(zip(columns, line, strict=True)) for line in lines]})
    else:
        print_columns(table_of(results))
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    err.print(f"{counted(len(results), 'volume')}: {counts}")
