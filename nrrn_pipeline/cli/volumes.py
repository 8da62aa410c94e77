"""nrrn info, verify and status: what is there, and how far it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.checking import check
from nrrn_pipeline.cli.options import Output, StorageOptions
from nrrn_pipeline.cli.terminal import by_text, duration_text, err, out, print_rows, progress_bar, step_text
from nrrn_pipeline.cost import bytes_text, counted
from nrrn_pipeline.errors import readable
from nrrn_pipeline.network import architecture_of, bytes_hash, parse_header
from nrrn_pipeline.shipped import SHIPPED, located, read_weights
from nrrn_pipeline.volume import Volume, get_provenance, open_volume
from nrrn_pipeline.volume_drift import glance


def info(
    path: Annotated[str, typer.Argument(help="A volume, a weights file, or the name of shipped weights.")],
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Describe a volume or a weights file."""
    if path in SHIPPED or path.endswith(".safetensors") or os.path.isfile(path):
        data = read_weights(located(path))
        header = parse_header(data, path)
        training = header.get("training")
        record = training if isinstance(training, dict) else {}
        found = architecture_of(header)
        told = {**asdict(found), "sha256": bytes_hash(data), **record}
        print_rows({key: str(value) for key, value in told.items()})
        return
    volume = open_volume(path)
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
    made = get_provenance(path)
    print_rows(rows | ({"nrrn": json.dumps(made, indent=1)} if made else {}))


def _neighbours(volume: Volume) -> str:
    """Whether they are aligned, at a glance."""
    try:
        found = glance(volume)
    except OSError:  # damaged, perhaps, or a run's that goes on just now
        found = None
    return "not known; see nrrn align" if found is None else f"at a glance, {step_text(*found)}"


def verify(
    output: Output,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its checksum.")] = False,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Check that every slab is recorded and its shards are there, as large as they were written; exit status 1 if not.

    With --deep every byte is read, and must have the checksum that it was written with.
    """
    wrong = 0
    with progress_bar("nothing is changed by verifying") as bar:
        task = bar.add_task("verifying", total=None, speed="")
        for checked in check(output, deep):
            bar.start()
            bar.update(task, completed=checked.done, total=checked.total)
            if checked.problem:
                wrong += 1
                out.print(readable(checked.problem))
    if wrong:
        err.print(f"{output} is not whole: {counted(wrong, 'problem')}; nrrn repair makes damaged slabs again")
        raise typer.Exit(1)
    how = "every byte is as it was written" if deep else "every shard is there (--deep reads them)"
    out.print(f"{output} is whole: every slab is recorded, {how}")


def status(
    output: Output,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Say how far the run on DST is, wherever it is driven from: done, failed, running, rate, time left."""
    now = api.status(output)
    rows = {
        "state": now.state,
        "done": f"{now.done} of {counted(now.total, 'slab')}",
        "failed": counted(len(now.failed), "slab"),
        "rate": f"{now.rate / 1e6:.3f} million voxels/s" if now.rate else "unknown",
        "time left": "unknown" if now.seconds_left is None else duration_text(now.seconds_left),
    }
    print_rows(rows)
    for key, reason in now.failed.items():
        out.print(readable(f"slab {key}: {reason}"))
