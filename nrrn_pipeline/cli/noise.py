"""nrrn noise: how noisy a volume is. nrrn add-noise: test data, from a volume clean enough to be a reference."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import numpy as np
import typer

from nrrn_pipeline import api, storage
from nrrn_pipeline.cli.options import (
    BOX,
    LAYOUT,
    WHERE,
    Json,
    LevelNumber,
    Output,
    Source,
    StorageOptions,
    parse_box,
    takes_options,
)
from nrrn_pipeline.cli.terminal import Watch, drift_text, out, print_json, print_rows, progress_bar
from nrrn_pipeline.cost import counted
from nrrn_pipeline.errors import GO_ON, InputError, few
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.places import absolute
from nrrn_pipeline.report.figures import noise_curves
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.training.choosing import loss_for
from nrrn_pipeline.volume import open_volume
from nrrn_pipeline.volume_noise import VolumeNoise, measure_volume

MOST_NAMED = 20  # outliers


def noise(
    source: Source,
    level: LevelNumber = 0,
    roi: Annotated[str | None, typer.Option(metavar=BOX, help="Measure this part only.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Noise by signal and by slice, drawn.")] = None,
    as_json: Json = False,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Measure the noise of SRC: how strong, on which signal, in which slices, and whether it is white.

    Example: nrrn noise raw.zarr --plot noise.png
    """
    if plot is not None:
        if not plot.lower().endswith(".png"):
            raise InputError(f"--plot {plot!r} is no PNG file: give a name that ends with .png")
        storage.check_new_file(plot)
    volume, part = open_volume(source, level), parse_box("roi", roi)
    if part is not None:
        refuse_outside(part, volume.box)
    found = measure_volume(volume, part, with_drift=True)
    if as_json:
        loss, why = loss_for(found, Architecture.published("nrrn"))
        print_json(asdict(found) | {"white": found.white, "loss": loss, "why": why})
    else:
        print_rows(_rows(found))
    if plot is not None:
        storage.write_file(absolute(plot), noise_curves(found))


def _rows(found: VolumeNoise) -> dict[str, str]:
    curve, sigma = found.curve, np.array(found.sigma)
    strong, model = sigma[sigma > 0], found.curve.model
    ends = {"black": model.black, "white": model.white}
    loss, why = loss_for(found, Architecture.published("nrrn"))
    named = few([f"{z} ({sigma[z - found.first_z]:.3g})" for z in found.outliers], MOST_NAMED)
    return {
        "noise": f"{np.median(strong):.3g} grey levels, median of {counted(len(strong), 'slice')}",
        "by signal": f"{curve.sigma[0]:.3g} at {curve.signal[0]:.3g}, {curve.sigma[-1]:.3g} at {curve.signal[-1]:.3g}; "
        f"variance = {model.gain:.3g} x signal + {model.offset:.3g}"
        + (f": counts, each of {model.gain:.4g} grey levels" if model.counts else ""),
        "cut off": " and ".join(f"at {name} ({at:g})" for name, at in ends.items() if at is not None) or "nowhere",
        "along z": " -> ".join(f"{np.median(part):.3g}" for part in np.array_split(strong, min(5, len(strong)))),
        "unlike their neighbours": f"slices {named}" if named else "no slices",
        "successive slices": f"correlate by {found.likeness:.2f}",
        **({} if found.drift is None else {"neighbouring slices": drift_text(found.drift)}),
        "loss to train with": f"{loss}: {why}",
    }


@takes_options(WHERE | LAYOUT | {"roi", "level", "overwrite"})
def add_noise(
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

    Example: nrrn add-noise clean.zarr noisy.zarr --gaussian 30 --seed 1
    """
    with progress_bar(GO_ON) as bar:
        summary = api.add_noise(source, output, Noise(gaussian, poisson, seed), options, Watch(bar))
    out.print(f"{summary.plan.group_url}: complete, {counted(summary.slabs, 'slab')}")
