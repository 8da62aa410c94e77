"""nrrn noise: test data, from a volume that is clean enough to be a reference."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.cli.options import LAYOUT, WHERE, Output, Source, takes_options
from nrrn_pipeline.cli.terminal import Watch, out, progress_bar
from nrrn_pipeline.cost import counted
from nrrn_pipeline.errors import GO_ON
from nrrn_pipeline.noise import Noise


@takes_options(WHERE | LAYOUT | {"roi", "level", "overwrite"})
def noise(
    source: Source,
    output: Output,
    options: api.Options,
    gaussian: Annotated[float, typer.Option(metavar="SIGMA", help="White noise of so many grey levels.")] = 0.0,
    poisson: Annotated[
        float | None, typer.Option(metavar="PEAK", help="Counting noise, of so many counts at the brightest level.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same noise, however the volume is cut.")] = 0,
) -> None:
    """Add synthetic noise to SRC, to measure denoising where the truth is known.

    Example: nrrn noise clean.zarr noisy.zarr --gaussian 30 --seed 1
    """
    with progress_bar(GO_ON) as bar:
        summary = api.add_noise(source, output, Noise(gaussian, poisson, seed), options, Watch(bar))
    out.print(f"{summary.plan.group_url}: complete, {counted(summary.slabs, 'slab')}")
