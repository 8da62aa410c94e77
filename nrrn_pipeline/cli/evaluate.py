"""nrrn evaluate: methods of denoising side by side, words in, a table and a page out."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.cli.options import BOX, WORDS, Source, parse_box, takes_options
from nrrn_pipeline.cli.terminal import Watch, err, print_columns, progress_bar
from nrrn_pipeline.comparing import Comparison, Yardstick, candidates, compare, shown_columns, write_results
from nrrn_pipeline.errors import GO_ON, InputError
from nrrn_pipeline.evaluation.signal import Line
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.network import KINDS


@takes_options(WORDS - {"shard_of", "method", "pyramid"})
def evaluate(
    source: Source,
    options: api.Options,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(FILTERS)}; NAME=FILE with weights; or {', '.join(KINDS)}, for the file "
            "of that kind among --weights."
        ),
    ],
    folder: Annotated[str, typer.Option("--out", metavar="DIR", help="For outputs, results.json, .csv, index.html.")],
    reference: Annotated[str | None, typer.Option(help="A clean volume of the same shape, if there is one.")] = None,
    flat: Annotated[str | None, typer.Option(metavar=BOX, help="A part where the signal should be flat.")] = None,
    edge: Annotated[
        str | None, typer.Option(metavar="Z:Y,X:Y,X[:W]", help="A line across an edge, from, to, and W voxels wide.")
    ] = None,
    weights: Annotated[list[str] | None, typer.Option(help="A weights file; may be repeated.")] = None,
) -> None:
    """Denoise SRC by several methods, and measure each: against a reference, or without one.

    Example: nrrn evaluate raw.zarr --methods nrrn,gaussian-avg,nlm-avg --weights lab.safetensors --out compared
    """
    if "://" in folder or not folder:
        raise InputError(f"--out {folder!r} is no folder on disk: give one for tables and pages")
    found = candidates(methods, weights or [])
    yardstick = Yardstick(reference, parse_box("flat", flat), _parse_line(edge))
    with progress_bar(GO_ON) as bar:
        comparison = compare(source, os.path.abspath(folder), found, options, yardstick, Watch(bar))
    facts = {
        "source": comparison.source.url,
        "part": str(comparison.box),
        "reference": reference or "none: measures that need one are left out",
        "command": shlex.join(["nrrn", *sys.argv[1:]]),
    }
    paths = write_results(comparison, folder, facts)
    print_columns(_table(comparison))
    err.print(f"written: {', '.join(paths)}")


def _parse_line(text: str | None) -> Line | None:
    try:
        return None if text is None else Line.parse(text)
    except ValueError:
        raise InputError(
            f"--edge {text!r} is not understood: expected Z:Y,X:Y,X such as 16:100,20:100,60, and :W for its width"
        ) from None


def _table(comparison: Comparison) -> list[list[str]]:
    columns = shown_columns(comparison.compared)
    names = (f"{column.name}, {column.unit}" if column.unit else column.name for column in columns.values())
    rows = (
        [found.name, *(column.text(found.measures.get(name)) for name, column in columns.items())]
        for found in comparison.compared
    )
    return [["method", *names], *rows]
