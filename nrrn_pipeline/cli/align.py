"""nrrn align: how slices are shifted against each other, and a volume in which they are not."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer

from nrrn_pipeline import api, storage
from nrrn_pipeline.align_plan import AlignPlan
from nrrn_pipeline.aligning import planned
from nrrn_pipeline.cli.options import LAYOUT, WHERE, Source, names_a_part_alone, takes_options
from nrrn_pipeline.cli.terminal import Watch, counted_on, drift_text, notes, out, print_rows, progress_bar
from nrrn_pipeline.cost import by_text, counted
from nrrn_pipeline.drift import Drift
from nrrn_pipeline.errors import GO_ON, InputError, few
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.report.figures import drift_curves
from nrrn_pipeline.volume import Volume, open_volume
from nrrn_pipeline.volume_drift import measure_volume_drift

MOST_NAMED = 20  # slices


@takes_options((WHERE - {"device"}) | LAYOUT | {"overwrite", "pyramid", "level", "roi"})
def align(
    source: Source,
    options: Options,
    output: Annotated[
        str | None, typer.Argument(metavar="[DST]", help="OME-Zarr 0.5 to write; without it drift is only measured.")
    ] = None,
    undo_trend: Annotated[
        bool, typer.Option("--undo-trend", help="Undo slow drift too: structure that slants is straightened with it.")
    ] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="The drift, drawn.")] = None,
    table: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="The drift of each slice, as .csv or .json.")
    ] = None,
) -> None:
    """Measure how far each slice of SRC is shifted against the one before; with DST, move them back.

    Slices are moved by whole voxels and cut to what all of them have: voxels are copied as they are, so that noise
    stays as training needs it. Jitter and jumps are undone; slow drift is kept, as structure that slants looks alike.
    Interrupted? Run the same command again.

    Example: nrrn align raw.zarr aligned.zarr --plot drift.png
    """
    report = _Report(plot, table, undo_trend)
    if output is None:
        if not names_a_part_alone(options):
            raise InputError(
                "without DST drift is only measured, by this process: give a DST, or --level and --roi at most"
            )
        volume = open_volume(source, options.level)
        report.measure(volume, options.roi or volume.box)
        return
    made = planned(source, output, undo_trend, options, report.measure)
    if not report.made:
        notes.print("note: slices are moved as the output was begun; their drift is not measured, told or drawn again")
    with progress_bar(GO_ON) as bar:
        summary = api.run_planned(made, options, Watch(bar))
    out.print(f"{made.group_url}: {_result(made, options)}; complete, {counted(summary.slabs, 'slab')}")


def _result(made: AlignPlan, options: Options) -> str:
    moved = [max(map(abs, move)) for move in made.moves if any(move)]
    how = f"{counted(len(moved), 'slice')} moved, by {counted(max(moved), 'voxel')} at most" if moved else "none moved"
    whole = (options.roi or made.source.box).shape
    return f"{by_text(made.target.shape)} of {by_text(whole)} {made.target.dtype}, {how}"


@dataclass
class _Report:
    """What is told of a drift once it is measured, and where."""

    plot: str | None
    table: str | None
    undo_trend: bool
    made: bool = False

    def __post_init__(self) -> None:
        for option, name, suffixes in (("plot", self.plot, (".png",)), ("out", self.table, (".csv", ".json"))):
            if name is not None and not name.lower().endswith(suffixes):
                raise InputError(f"--{option} {name!r} is not understood: give a name that ends with {suffixes[0]}")

    def measure(self, volume: Volume, part: Box) -> Drift:
        """The drift, printed, drawn and written."""
        for name in filter(None, (self.plot, self.table)):  # not sooner: a run that goes on has made them
            storage.check_new_file(name)
        with progress_bar("nothing is written") as bar:
            found = measure_volume_drift(volume, part, counted_on(bar, "measuring", len(part.z)))
        print_rows(self._rows(found))
        if self.plot is not None:
            storage.write_file(absolute(self.plot), drift_curves(found))
        if self.table is not None:
            storage.write_file(absolute(self.table), _table(found, self.undo_trend, self.table))
        self.made = True
        return found

    def _rows(self, found: Drift) -> dict[str, str]:
        lacking = [str(found.first_z + int(i)) for i in np.flatnonzero(~found.known)]
        rows = {
            "not measured": f"slices {few(lacking, MOST_NAMED)}: blank, or unlike all around"
            if lacking
            else "no slices"
        }
        if found.told:
            far = np.hypot(*np.diff(found.position, axis=0, prepend=0).T)
            jumps = [f"{z} ({far[z - found.first_z]:.1f})" for z in found.jumps]
            fate = "undone with the rest" if self.undo_trend else "kept, as slanting structure looks alike"
            rows |= {
                "drift": f"{np.median(found.steps[found.compared]):.2f} voxels from one slice to the next, median; "
                f"{found.steps.max():.2f} at most (z={found.worst_z})",
                "jumps": f"before slices {few(jumps, MOST_NAMED)}" if jumps else "none",
                "trend": f"{found.slope:.2f} voxels a slice at most; {fate}",
            }
        return rows | {"neighbouring slices": drift_text(found)}


def _table(found: Drift, undo_trend: bool, name: str) -> bytes:
    """One row a slice, in voxels."""
    moves = found.moves(undo_trend)
    columns = {
        "z": found.first_z + np.arange(len(found.known)),
        "known": found.known,
        **{f"position_{axis}": found.position[:, i].round(3) for i, axis in enumerate("yx")},
        **{f"trend_{axis}": found.trend[:, i].round(3) for i, axis in enumerate("yx")},
        "step": found.steps.round(3),
        **{f"move_{axis}": moves[:, i] for i, axis in enumerate("yx")},
    }
    rows = [
        dict(zip(columns, row, strict=True)) for row in zip(*(each.tolist() for each in columns.values()), strict=True)
    ]
    if name.lower().endswith(".json"):
        return json.dumps({"jumps": found.jumps, "aligned": found.aligned, "slices": rows}, indent=1).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
