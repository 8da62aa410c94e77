"""nrrn denoise, plan and repair."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from nrrn_pipeline import api, following
from nrrn_pipeline.cli.options import (
    WHERE,
    WORDS,
    Every,
    Follow,
    Json,
    Made,
    Output,
    Settle,
    Source,
    parse_following,
    takes_options,
)
from nrrn_pipeline.cli.terminal import Watch, facts_of, network_text, out, print_json, print_rows, progress_bar
from nrrn_pipeline.cost import by_text, bytes_text, counted, duration_text
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import GO_ON, readable
from nrrn_pipeline.filters import filter_text


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
    as_json: Json = False,
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
    if as_json:
        print_json({"output": output, "state": "waiting"} if summary is None else facts_of(summary))
        return
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


@takes_options(WORDS - {"shard_of", "pyramid"})
def plan(
    source: Source,
    output: Output,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="Weights (default: the paper's network is assumed).")] = None,
    as_json: Json = False,
) -> None:
    """Say what nrrn denoise would do with the same words, and what it would take. Writes nothing.

    Example: nrrn plan raw.zarr clean.zarr --weights lab.safetensors
    """
    forecast = api.plan(source, output, weights, options)
    made, cost = forecast.plan, forecast.cost
    if as_json:
        told = {"output": made.group_url, "settings": made.settings, **asdict(cost), "workers": forecast.workers}
        print_json(told | {"seconds": forecast.seconds})
        return
    denoiser = made.denoiser
    if isinstance(denoiser, Weights):
        method = network_text(denoiser.architecture) + ("" if weights else ": the paper's, as no --weights are given")
    else:
        method = filter_text(denoiser.settings["filter"])
    rows = {
        "source": f"{made.source.url}, {by_text(made.source.shape)} {made.source.dtype}",
        "output": f"{made.group_url}, {by_text(made.target.shape)}, shards of {by_text(made.target.write_unit)}",
        "method": method,
        "slabs": f"{cost.slabs} of {by_text(made.slab)}, tile {made.tile}, halo {made.halo}",
        "tasks": f"{cost.tasks}: {cost.statistics_tasks} for statistics, {cost.slabs} to denoise",
        "reads": f"{bytes_text(cost.read_bytes)}; {bytes_text(cost.fetched_bytes)} in whole chunks of the source, "
        f"by {counted(forecast.workers, 'worker')}",
        "read amplification": f"{cost.read_amplification:.2f}; {cost.chunk_amplification:.2f} in whole chunks",
        "writes": f"{bytes_text(cost.written_bytes)} before compression",
        "arithmetic": f"{cost.flop / 1e12:.3g} TFLOP" if cost.flop else "unknown",
        "memory": f"{bytes_text(cost.worker_bytes)} a worker at its peak"
        + (f", {bytes_text(cost.kept_bytes)} of it chunks of the source that it keeps" if cost.kept_bytes else ""),
        "time": f"{duration_text(forecast.seconds)} of the network with {counted(forecast.workers, 'worker')}, "
        "from one timed tile",
    }
    print_rows(rows)


@takes_options(WHERE | {"precision", "keep"})
def repair(
    output: Made,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="If the weights have moved since.")] = None,
    as_json: Json = False,
) -> None:
    """Denoise again exactly the slabs of DST that nrrn verify --deep finds damaged, with the settings it was made with.

    Example: nrrn repair clean.zarr
    """
    with progress_bar(GO_ON) as bar:
        problems, summary = api.repair(output, weights, options, Watch(bar))
    if as_json:
        print_json({"problems": problems, **({} if summary is None else facts_of(summary))})
        return
    for problem in problems:
        out.print(readable(problem))
    if summary is None:
        out.print(f"{output} is whole: nothing to repair")
    else:
        again = counted(summary.done, "slab")
        state = "growing" if summary.plan.growing else "complete"
        levels = f", {counted(summary.level_slabs, 'slab')} of levels" if summary.level_slabs else ""
        out.print(f"{summary.plan.group_url}: {state}, {again}{levels} done again")
