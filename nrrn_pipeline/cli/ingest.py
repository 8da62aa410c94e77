"""nrrn ingest, pyramid and export: from the microscope's files to a volume, for viewers, and to other tools."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.cli.options import (
    LAYOUT,
    WHERE,
    Json,
    Made,
    Source,
    names_a_part_alone,
    parse_numbers,
    takes_options,
)
from nrrn_pipeline.cli.terminal import Watch, counted_on, facts_of, notes, out, print_json, progress_bar
from nrrn_pipeline.cost import by_text, bytes_text, counted
from nrrn_pipeline.errors import GO_ON, InputError, readable
from nrrn_pipeline.exporting import export as write_file
from nrrn_pipeline.exporting import export_zarr
from nrrn_pipeline.ingesting import Intake, planned
from nrrn_pipeline.options import Options


@takes_options((WHERE - {"device"}) | LAYOUT | {"overwrite", "pyramid", "shard_of", "level"})
def ingest(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC... DST",
            help="A folder of slices, files of them (TIFF, PNG), or a volume (TIFF, MRC, HDF5, N5, .npy, Zarr); then "
            "the OME-Zarr to write.",
            show_default=False,
        ),
    ],
    options: Options,
    voxel_nm: Annotated[
        str | None, typer.Option(metavar="Z,Y,X", help="Size of a voxel in nm, if the files do not say it rightly.")
    ] = None,
    as_dtype: Annotated[
        str | None, typer.Option("--as", metavar="DTYPE", help="uint8, uint16, float32: if it holds every voxel.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Of HDF5 or N5, such as /volumes/raw.")] = None,
    lacking: Annotated[
        str, typer.Option(help="Of slices that are missing, cut short or of another size: refuse, blank, skip.")
    ] = "refuse",
    as_json: Json = False,
) -> None:
    """Bring the microscope's files into one OME-Zarr volume. Interrupted? Run the same command again.

    Example: nrrn ingest slices/ raw.zarr --voxel-nm 5,5,5
    """
    if len(paths) < 2:
        raise InputError("give what to read, SRC, and then the volume to write, DST: nrrn ingest slices/ raw.zarr")
    size = parse_numbers("voxel-nm", voxel_nm)
    made = planned(paths[:-1], paths[-1], Intake(size, as_dtype, dataset, lacking), options)
    for note in made.stack.notes:
        notes.print(readable(f"note: {note}"))
    if not made.target.in_nm:
        notes.print("note: the files do not say how large voxels are: give --voxel-nm Z,Y,X if you know")
    with progress_bar(GO_ON) as bar:
        summary = api.run_planned(made, options, Watch(bar))
    _print_copied(summary, as_json)


def _print_copied(summary: api.Summary, as_json: bool) -> None:
    target = summary.plan.target
    if as_json:
        print_json(facts_of(summary) | {"shape": target.shape, "dtype": target.dtype, "voxel_nm": target.voxel_nm})
        return
    size_text = f", voxels of {by_text(target.voxel_size)} nm" if target.in_nm else ""
    done = counted(summary.slabs, "slab") + (f", {summary.resumed} of them done before" if summary.resumed else "")
    out.print(f"{target.group_url}: {by_text(target.shape)} {target.dtype}{size_text}; complete, {done}")
    if summary.voxels:
        speed = summary.voxels * target.itemsize / summary.seconds
        peak = bytes_text(summary.peak_memory_bytes)
        out.print(f"{summary.seconds:.1f} s, {bytes_text(speed)}/s, peak memory of a worker {peak}")


@takes_options((WHERE - {"device"}) | {"overwrite", "shard_of"})
def pyramid(output: Made, options: Options) -> None:
    """Add levels of lower resolution to DST, for viewers: means of 2 x 2 x 2 voxels, until all of it is one chunk.

    Axes with longer voxels are left until the others are as long. Run again, it goes on where it was, and makes good
    what is torn.

    Example: nrrn pyramid clean.zarr
    """
    with progress_bar(GO_ON) as bar:
        levels = api.add_levels(output, options, Watch(bar))
    out.print(f"{output}: {counted(levels, 'level')} below the full size")


@takes_options((WHERE - {"device"}) | (LAYOUT - {"shard"}) | {"roi", "level", "overwrite", "pyramid", "shard_of"})
def export(
    source: Source,
    output: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="x.tif, .ome.tif, .mrc, .h5, .npy; without a suffix a folder of TIFF; x.zarr: OME-Zarr 0.4 (Zarr 2).",
        ),
    ],
    options: Options,
    as_json: Json = False,
) -> None:
    """Write SRC as other tools read it, with its voxel size. To a .zarr, for tools that know no Zarr 3 or shards, slabs
    are copied on any cluster, and the same command goes on after an interruption; levels are made if SRC has any. All
    else is a file, written slice by slice, without options but --level and --roi.

    Example: nrrn export clean.zarr clean.tif --level 1
    """
    if output.rstrip("/").endswith(".zarr"):
        with progress_bar(GO_ON) as bar:
            summary = export_zarr(source, output, options, Watch(bar))
        _print_copied(summary, as_json)
        return
    if not names_a_part_alone(options):
        raise InputError(f"{output} is written by this process alone: give --level and --roi at most, or write a .zarr")
    with progress_bar("nothing is left of the file") as bar:
        write_file(source, output, options.level, options.roi, counted_on(bar, "exporting"))
    if as_json:
        print_json({"output": output})
    else:
        out.print(f"{output}: written")
