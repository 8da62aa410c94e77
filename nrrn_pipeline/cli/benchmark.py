"""nrrn benchmark: how fast this machine denoises, beside other programs."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import date
from importlib.metadata import version
from typing import Annotated

import typer

from nrrn_pipeline import storage
from nrrn_pipeline.benchmark import Task, columns_of, make_volume, parse_programs, run_benchmark, write_benchmark
from nrrn_pipeline.cli.options import Device, StorageOptions, parse_triple
from nrrn_pipeline.cli.terminal import err, network_text, out, print_columns
from nrrn_pipeline.cost import by_text
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.network import NRRN, architecture_of, parse_header, weights_bytes
from nrrn_pipeline.places import absolute
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.volume import open_volume

RANDOM = "weights.safetensors"


def benchmark(
    folder: Annotated[str, typer.Option("--out", metavar="DIR", help="For outputs, benchmark.json, benchmark.md.")],
    source: Annotated[str | None, typer.Argument(metavar="[SRC]", help="Volume (default: one is made).")] = None,
    shape: Annotated[str, typer.Option(metavar="Z,Y,X", help="Of the volume that is made.")] = "64,512,512",
    weights: Annotated[str | None, typer.Option(help="Weights (default: random ones).")] = None,
    units: Annotated[int, typer.Option(help="Of the network with random weights.")] = 4,
    channels: Annotated[int, typer.Option(help="Of the network with random weights.")] = 64,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND", help="A program to run beside; it is given a Zarr array, an output, the weights."
        ),
    ] = None,
    turns: Annotated[int, typer.Option(help="How often each runs, one after the other; the best counts.")] = 1,
    device: Device = "auto",
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Measure speed and memory of nrrn denoise here, as a whole program, beside the network alone and other programs.

    Example: nrrn benchmark --shape 16,512,512 --units 2 --channels 16 --out speed
    """
    programs = parse_programs(against or [])
    if turns < 1:
        raise InputError(f"--turns {turns}: nothing would run; use 1 or more")
    folder = absolute(folder)
    size = parse_triple("shape", shape)
    random, weights = weights is None, weights or f"{folder}/{RANDOM}"
    if not random:
        data = read_weights(located(weights))
    elif storage.exists(weights):
        raise InputError(f"{weights} exists: choose another --out, or give it as --weights")
    else:
        data = weights_bytes(NRRN(units, channels), {"note": "random, for speed alone"})
    network = architecture_of(parse_header(data, weights))
    volume = open_volume(source) if source else make_volume(f"{folder}/source.ome.zarr", size or (64, 512, 512))
    if random:
        storage.write_file(weights, data)
    found = run_benchmark(Task(volume, located(weights), folder, device, turns), programs)
    facts = {
        "volume": f"{volume.url}, {by_text(volume.shape)} {volume.dtype}",
        "network": network_text(network),
        "network alone": f"{found.speed_alone / 1e6:.4f} million voxels/s on {found.where}",
        "our whole program": "failed" if found.efficiency is None else f"{found.efficiency:.1%} of it, turn by turn",
        "machine": f"{platform.machine()}, {platform.system()}, torch {version('torch')}, {date.today()}",
        "command": shlex.join(["nrrn", *sys.argv[1:]]),
    }
    print_columns(columns_of(found))
    for name, value in facts.items():
        out.print(f"{name}: {value}")
    err.print(f"written: {', '.join(write_benchmark(found, folder, facts))}")
    if failed := [each for each in found.measured if each.run.failure]:
        raise RunError(f"{', '.join(each.name for each in failed)} failed: see the table")
