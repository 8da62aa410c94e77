"""Every subcommand: words in, words out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from nrrn_pipeline import api, following
from nrrn_pipeline.checking import check
from nrrn_pipeline.cli.batch import batch as many_volumes
from nrrn_pipeline.cli.benchmark import benchmark as measure_speed
from nrrn_pipeline.cli.evaluate import evaluate as compare_methods
from nrrn_pipeline.cli.ground_truth import ground_truth as average_scans
from nrrn_pipeline.cli.noise import add_noise
from nrrn_pipeline.cli.noise import noise as measure_noise
from nrrn_pipeline.cli.options import (
    WHERE,
    WORDS,
    Device,
    Every,
    Follow,
    Output,
    Settle,
    Source,
    StorageOptions,
    parse_following,
    takes_options,
)
from nrrn_pipeline.cli.terminal import Watch, by_text, duration_text, err, network_text, out, print_rows, progress_bar
from nrrn_pipeline.cli.training import train as train_network
from nrrn_pipeline.cli.training import write_page
from nrrn_pipeline.cluster import load_settings, make_keys
from nrrn_pipeline.cost import bytes_text, counted
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import GO_ON, InputError, readable
from nrrn_pipeline.network import architecture_of, bytes_hash, parse_header
from nrrn_pipeline.shipped import SHIPPED, located, model_card, read_weights
from nrrn_pipeline.trial import rows_of, try_cluster
from nrrn_pipeline.volume import get_provenance, open_volume

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Denoise FIB-SEM volumes with NRRN."
)
weights_app = typer.Typer(no_args_is_help=True, help="Weights files.")
cluster_app = typer.Typer(no_args_is_help=True, help="Dask clusters.")
app.add_typer(weights_app, name="weights")
app.add_typer(cluster_app, name="cluster")


@app.command()
@takes_options(WORDS)
def denoise(
    source: Source,
    output: Output,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="Weights from nrrn train or nrrn weights import.")] = None,
    follow: Follow = False,
    every: Every = None,
    settle: Settle = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went, and what held it up.")] = False,
) -> None:
    """Denoise SRC into DST. Interrupted? Run the same command again: it goes on where it was.

    Example: nrrn denoise raw.zarr clean.zarr --weights lab.safetensors
    """
    looks = parse_following(follow, every, settle)
    with progress_bar(GO_ON) as bar:
        if looks:
            summary = following.follow(source, output, weights, options, looks, Watch(bar))
        else:
            summary = api.denoise(source, output, weights, options, Watch(bar))
    if summary is None:
        out.print(f"{output}: no new slab of {source} is whole yet")
        return
    speed = summary.voxels / summary.seconds
    done = counted(summary.slabs, "slab") + (f", {summary.resumed} of them done before" if summary.resumed else "")
    state = "growing" if summary.plan.growing else "complete"
    shared = f", {summary.done} by this process" if options.share else ""
    out.print(f"{summary.plan.group_url}: {state}, {done}{shared}")
    if summary.voxels:
        peak = bytes_text(summary.peak_memory_bytes)
        out.print(f"{summary.seconds:.1f} s, {speed / 1e6:.3f} million voxels/s, peak memory of a worker {peak}")
    told = {text.partition(";")[0]: text for text in sorted(summary.profile.arithmetic - {"float32"})}
    for arithmetic in told.values():
        out.print(f"precision: {arithmetic}")
    if profile:
        print_rows(summary.profile.rows())


@app.command()
@takes_options(WORDS - {"shard_of"})
def plan(
    source: Source,
    output: Output,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="Weights (default: the paper's network is assumed).")] = None,
) -> None:
    """Say what nrrn denoise would do with the same words, and what it would take. Writes nothing."""
    forecast = api.plan(source, output, weights, options)
    made, cost = forecast.plan, forecast.cost
    denoiser = made.denoiser
    if isinstance(denoiser, Weights):
        method = network_text(denoiser.architecture) + ("" if weights else ": the paper's, as no --weights are given")
    else:
        method = ", ".join(f"{name} {value}" for name, value in denoiser.settings.items())
    rows = {
        "source": f"{made.source.url}, {by_text(made.source.shape)} {made.source.dtype}",
        "output": f"{made.group_url}, {by_text(made.target.shape)}, shards of {by_text(made.target.write_unit)}",
        "method": method,
        "slabs": f"{cost.slabs} of {by_text(made.slab)}, tile {made.tile}, halo {made.halo}",
        "tasks": f"{cost.tasks}: {cost.statistics_tasks} for statistics, {cost.slabs} to denoise",
        "reads": f"{bytes_text(cost.read_bytes)}; {bytes_text(cost.fetched_bytes)} in whole chunks of the source",
        "read amplification": f"{cost.read_amplification:.2f}; {cost.chunk_amplification:.2f} in whole chunks",
        "writes": f"{bytes_text(cost.written_bytes)} before compression",
        "arithmetic": f"{cost.flop / 1e12:.3g} TFLOP" if cost.flop else "unknown",
        "memory": f"{bytes_text(cost.worker_bytes)} a worker at its peak",
        "time": f"{duration_text(forecast.seconds)} of the network with {counted(forecast.workers, 'worker')}, "
        "from one timed tile",
    }
    print_rows(rows)


app.command("batch")(many_volumes)
app.command("evaluate")(compare_methods)
app.command("ground-truth")(average_scans)
app.command("add-noise")(add_noise)
app.command("noise")(measure_noise)
app.command("benchmark")(measure_speed)
app.command("train")(train_network)


@app.command()
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
    }
    made = get_provenance(path)
    print_rows(rows | ({"nrrn": json.dumps(made, indent=1)} if made else {}))


@app.command()
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
        err.print(f"{output} is not whole: {counted(wrong, 'problem')}; nrrn repair denoises damaged slabs again")
        raise typer.Exit(1)
    how = "every byte is as it was written" if deep else "every shard is there (--deep reads them)"
    out.print(f"{output} is whole: every slab is recorded, {how}")


@app.command()
@takes_options(WHERE | {"precision"})
def repair(
    output: Output,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="If the weights have moved since.")] = None,
) -> None:
    """Denoise again exactly the slabs of DST that nrrn verify --deep finds damaged, with the settings it was made with.

    Example: nrrn repair clean.zarr
    """
    with progress_bar(GO_ON) as bar:
        problems, summary = api.repair(output, weights, options, Watch(bar))
    for problem in problems:
        out.print(readable(problem))
    if summary is None:
        out.print(f"{output} is whole: nothing to repair")
    else:
        again = counted(summary.done, "slab")
        state = "growing" if summary.plan.growing else "complete"
        out.print(f"{summary.plan.group_url}: {state}, {again} denoised again")


@app.command()
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


@weights_app.command("list")
def list_weights() -> None:
    """The weights that are shipped, to be given by name, as in --weights nrrn-fast."""
    for name in SHIPPED:
        header = parse_header(read_weights(name), name)
        out.print(f"{name}: {network_text(architecture_of(header))}; {header['training']['note']}")


@weights_app.command("card")
def show_card(name: Annotated[str, typer.Argument(help="Of shipped weights.")]) -> None:
    """What shipped weights were made from, how, how well they do, and what they are not for."""
    if name not in SHIPPED:
        raise InputError(f"no weights {name!r} are shipped: use {', '.join(SHIPPED)}")
    out.print(model_card(name))


weights_app.command("page")(write_page)


@weights_app.command("import")
def import_weights(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of vEMden (.pt).")],
    weights: Annotated[str, typer.Argument(help="Weights file to write (.safetensors).")],
) -> None:
    """Turn a checkpoint of the authors' tool into a weights file; nothing in it is executed."""
    network = api.import_weights(checkpoint, weights)
    out.print(f"{weights}: {network_text(network.architecture)}")


@cluster_app.command("check")
def cluster_check(
    settings: Annotated[str, typer.Argument(metavar="FILE", help="Settings of a cluster, TOML.")],
    folder: Annotated[str, typer.Option("--at", help="Where to denoise a trial slab: a path or URL as of your runs.")],
    device: Device = "auto",
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Start one worker, denoise one small slab on it, and say what was found. Leaves nothing behind.

    Example: nrrn cluster check slurm.toml --at /shared/lab
    """
    found = try_cluster(load_settings(settings), folder, device)
    print_rows(rows_of(found))
    if found.difference > 1:
        err.print(f"nrrn: the worker's voxels are {found.difference} grey levels off: do not use it")
        raise typer.Exit(1)


@cluster_app.command("keys")
def cluster_keys(
    folder: Annotated[str, typer.Argument(help="Folder to make.")],
    host: Annotated[list[str] | None, typer.Option(help="Hosts that the certificate names; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="Days that the certificates hold.")] = 365,
) -> None:
    """Make the certificates that a Dask cluster on other machines needs: without them whoever reaches it runs code.

    Copy FOLDER to every machine, readable by you alone. Start scheduler and workers with DASK_CONFIG=FOLDER, and
    denoise with --cluster tls://HOST:8786 --keys FOLDER.
    """
    made = make_keys(folder, host or (), days)
    out.print(f"{made}: certificates for {counted(days, 'day')}; start dask with DASK_CONFIG={made}")
