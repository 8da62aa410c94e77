"""nrrn info, verify and status: what is there, and how far it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.checking import check
from nrrn_pipeline.cli.options import Json, Made, StorageOptions
from nrrn_pipeline.cli.terminal import counted_on, err, out, print_json, print_rows, progress_bar, step_text
from nrrn_pipeline.cost import by_text, bytes_text, counted, duration_text
from nrrn_pipeline.errors import readable
from nrrn_pipeline.network import architecture_of, bytes_hash, parse_header
from nrrn_pipeline.shipped import SHIPPED, located, read_weights
from nrrn_pipeline.volume import Volume, count_levels, get_provenance, open_volume
from nrrn_pipeline.volume_drift import glance


def info(
    path: Annotated[str, typer.Argument(help="A volume, a weights file, or the name of shipped weights.")],
    as_json: Json = False,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Describe a volume or a weights file.

    Example: nrrn info raw.zarr
    """
    if path in SHIPPED or path.endswith(".safetensors") or os.path.isfile(path):
        data = read_weights(located(path))
        header = parse_header(data, path)
        training = header.get("training")
        record = training if isinstance(training, dict) else {}
        found = architecture_of(header)
        told = {**asdict(found), "sha256": bytes_hash(data), **record}
        if as_json:
            print_json(told)
        else:
            print_rows({key: str(value) for key, value in told.items()})
        return
    volume, made = open_volume(path), get_provenance(path)
    if as_json:
        largest_z = _glance(volume)
        facts = {
            "url": volume.url,
            "shape": volume.shape,
            "dtype": volume.dtype,
            "bytes": volume.box.size * volume.itemsize,
            "voxel_nm": volume.voxel_nm,
            "chunk": volume.chunk,
            "shard": None if volume.chunk == volume.write_unit else volume.write_unit,
            "axes": volume.axes,
            "levels": max(1, count_levels(path)),
            "largest_step": largest_z and {"voxels": largest_z[0], "z": largest_z[1]},
            "nrrn": made,
        }
        print_json(facts)
        return
    rows = {
        "url": volume.url,
        "shape (z, y, x)": by_text(volume.shape),
        "dtype": volume.dtype,
        "bytes": bytes_text(volume.box.size * volume.itemsize),
        "voxel size": f"{by_text(volume.voxel_nm)} nm" if volume.voxel_nm else "unknown",
        "chunk": by_text(volume.chunk),
        "shard": "none" if volume.chunk == volume.write_unit else by_text(volume.write_unit),
        "axes": ",".join(volume.axes),
        "neighbouring slices": _neighbours(volume),
    }
    print_rows(rows | ({"nrrn": json.dumps(made, indent=1)} if made else {}))


def _glance(volume: Volume) -> tuple[float, int] | None:
    """See glance; None if it cannot be read."""
    try:
        return glance(volume)
    except OSError:  # damaged, perhaps, or a run's that goes on just now
        return None


def _neighbours(volume: Volume) -> str:
    """Whether they are aligned, at a glance."""
    found = _glance(volume)
    return "not known; see nrrn align" if found is None else f"at a glance, {step_text(*found)}"


def verify(
    output: Made,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its checksum.")] = False,
    as_json: Json = False,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Check that every slab is recorded and its shards are there, as large as they were written; exit status 1 if not.

    With --deep every byte is read, and must have the checksum that it was written with.

    Example: nrrn verify clean.zarr --deep
    """
    problems = []
    with progress_bar("nothing is changed by verifying") as bar:
        progressed = counted_on(bar, "verifying")
        for checked in check(output, deep):
            progressed(checked.done, checked.total)
            if checked.problem:
                problems.append(checked.problem)
                if not as_json:
                    out.print(readable(checked.problem))
    if as_json:
        print_json({"whole": not problems, "read": deep, "problems": problems})
    if problems:
        err.print(f"{output} is not whole: {counted(len(problems), 'problem')}; nrrn repair makes damaged slabs again")
        raise typer.Exit(1)
    if not as_json:
        how = "every byte is as it was written" if deep else "every shard is there (--deep reads them)"
        out.print(f"{output} is whole: every slab is recorded, {how}")


def status(
    output: Made,
    as_json: Json = False,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Say how far the run on DST is, wherever it is driven from: done, failed, running, rate, time left.

    Example: nrrn status clean.zarr
    """
    now = api.status(output)
    if as_json:
        facts = asdict(now)
        facts["voxels_per_second"] = facts.pop("rate")
        print_json(facts)
        return
    rows = {
        "state": now.state,
        "done": f"{now.done} of {counted(now.total, 'slab')}",
        "failed": counted(len(now.failed), "slab"),
        "rate": f"{now.rate / 1e6:.3f} million voxels/s" if now.rate else "unknown",
        "time left": "unknown" if now.seconds_left is None else duration_text(now.seconds_left),
    }
    if now.levels:
        rows["levels"] = ", ".join(f"{number}: {done} of {total} slabs" for number, (done, total) in now.levels.items())
    print_rows(rows)
    for key, reason in now.failed.items():
        out.print(readable(f"slab {key}: {reason}"))
