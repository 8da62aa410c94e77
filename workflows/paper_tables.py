"""The tables and figures of the paper on data that we have: python workflows/paper_tables.py DATA OUT [--scale small]

DATA holds flyem_fib25_training_sample1_250.npz (FlyEM FIB-25, CC BY) and, for Table 2, a crop of the EPFL's CA1 volume,
epfl_ca1_dev_z000-079_y0800-1503_x0160-0863.npz, each (z, y, x) uint8 under "volume". OUT gets weights, denoised
volumes, a page for each comparison, tables.md and results.json; run it again, and weights that are there are used.

--only NAME,NAME makes these sections alone: tables.md has all that were ever made in OUT, each with its date.

`small` is for a CPU: small networks, few steps, few slices, so that methods can be told apart but not judged. `full`
has the paper's networks, for a GPU. The paper's figures stand beside ours, and are of other volumes: compare the order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from paper_bench import EPFL, SCALES, Bench, flattest
from paper_practice import by_strength, how_long, real_noise, transfer

from nrrn_pipeline import (
    Box,
    Layout,
    Method,
    Noise,
    NrrnError,
    open_volume,
)
from nrrn_pipeline.evaluation.metrics import psnr, ssim
from nrrn_pipeline.evaluation.signal import interquartile_range
from nrrn_pipeline.geometry import Span
from nrrn_pipeline.network import Architecture, after_each_unit, load_weights
from nrrn_pipeline.volume import read_box

OHSU = {  # the paper's Table 1: PSNR in dB, SSIM
    "input": (22.97, 0.858),
    "nrrn": (31.11, 0.971),
    "denoisenet-n2c": (32.20, 0.978),
    "denoisenet-single-n2c": (28.34, 0.956),
    "unet-n2c": (31.47, 0.976),
    "unet-single-n2c": (29.18, 0.957),
    "nlm-avg": (31.36, 0.973),
    "nlm": (24.07, 0.620),
    "bm3d": (28.25, 0.875),
    "median-avg": (28.02, 0.950),
    "gaussian-avg": (27.06, 0.920),
}
PAPER_EPFL = {  # the paper's Table 2: PSNR in dB
    "poisson 1": {"nrrn": 17.90, "denoisenet-n2c": 9.47, "unet-n2c": 9.42},
    "poisson 30": {"nrrn": 27.51, "denoisenet-n2c": 19.70, "unet-n2c": 20.98},
    "gaussian 75": {"nrrn": 25.18, "denoisenet-n2c": 14.36, "unet-n2c": 15.06},
    "gaussian 10": {"nrrn": 28.48, "denoisenet-n2c": 25.29, "unet-n2c": 27.20},
}
NOISES = {
    "poisson 1": Noise(peak=1),
    "poisson 30": Noise(peak=30),
    "gaussian 75": Noise(sigma=75),
    "gaussian 10": Noise(sigma=10),
}


def table_1(bench: Bench) -> None:
    """Every method on one noise."""
    volumes = bench.usual
    clean, blind = {"loss": "clean"}, {"loss": "blind-spot"}
    methods = [
        *bench.filters,
        bench.trained("own", volumes),
        bench.trained("nrrn", volumes),
        bench.trained("nrrn-n2v", volumes, **blind),
        bench.trained("nrrn-n2c", volumes, **clean),
        bench.trained("denoisenet-single-n2c", volumes, network="denoisenet", inputs="single", **clean),
        bench.trained("denoisenet-n2c", volumes, network="denoisenet", inputs="channels", **clean),
        bench.trained("unet-single-n2c", volumes, network="unet", inputs="single", **clean),
        bench.trained("unet-n2c", volumes, network="unet", inputs="mean", **clean),
        bench.trained("unet-n2v", volumes, network="unet", inputs="mean", **blind),
    ]
    found = bench.compared("table-1", volumes, methods)
    rows = []
    for name, row in found.items():
        paper = OHSU.get(name)
        ours = [f"{row['psnr_db']:.2f}", f"{row['ssim']:.3f}", f"{row['flat_iqr']:.1f}"]
        alone = [
            f"{row[key]:.3f}" if key in row else "" for key in ("residual_whiteness", "residual_low_frequency_share")
        ]
        rows.append([name, *ours, *alone, *((f"{paper[0]:.2f}", f"{paper[1]:.3f}") if paper else ("", ""))])
    header = "method,PSNR dB,SSIM,flat IQR,whiteness,structure,paper (OHSU): PSNR,SSIM"
    bench.table("Table 1: FIB-25, Gaussian noise of sigma 30", header, rows)


def table_2(bench: Bench) -> None:
    """Trained methods without pre-training, by kind and strength of noise."""
    if bench.lacks(EPFL, "Table 2"):
        return
    rows = []
    for title, noise in NOISES.items():
        volumes = bench.volumes(EPFL, "epfl", noise)
        methods = [
            bench.trained("nrrn", volumes, units=1),
            bench.trained("denoisenet-n2c", volumes, network="denoisenet", loss="clean"),
            bench.trained("unet-n2c", volumes, network="unet", loss="clean"),
            "gaussian-avg",
        ]
        for name, row in bench.compared(f"table-2-{title.replace(' ', '-')}", volumes, methods).items():
            paper = PAPER_EPFL[title].get(name)
            rows.append([title, name, f"{row['psnr_db']:.2f}", f"{row['ssim']:.3f}", f"{paper:.2f}" if paper else ""])
    bench.table("Table 2 and Fig. 4: EPFL, by noise; NRRN of 1 unit", "noise,method,PSNR dB,SSIM,paper: PSNR", rows)


def figure_5(bench: Bench) -> None:
    """After each unit; and by their number."""
    volumes = bench.usual
    methods = [bench.trained(f"nrrn-{units}", volumes, units=units) for units in bench.scale.units]
    found = bench.compared("figure-5", volumes, methods)
    rows = [[name, f"{row['psnr_db']:.2f}", f"{row['ssim']:.3f}"] for name, row in found.items()]
    bench.table("Fig. 5C: NRRN by its number of units", "method,PSNR dB,SSIM", rows)
    network = load_weights(methods[-1].partition("=")[2])
    clean, noisy = (open_volume(volumes[part]) for part in ("clean test", "test"))
    flat = flattest(volumes["clean test"])
    triplet = Box(Span(flat.z.start - 1, flat.z.stop + 1), noisy.box.y, noisy.box.x)
    stack, truth = read_box(noisy, triplet).astype(np.float32), read_box(clean, triplet)[1:2]
    mean, std = stack.mean((1, 2), keepdims=True), stack.std((1, 2), keepdims=True)
    every = np.clip(after_each_unit(network, (stack - mean) / std) * std[1] + mean[1], 0, 255)
    rows = []
    for unit, estimate in enumerate(every, start=1):
        name = f"unit {unit}" if unit < len(every) else "final"
        iqr = interquartile_range(estimate[:, flat.y.start : flat.y.stop, flat.x.start : flat.x.stop])
        rows.append([name, f"{psnr(truth, estimate, 255):.2f}", f"{ssim(truth, estimate, 255):.3f}", f"{iqr:.1f}"])
    bench.table(f"Fig. 5A: after each unit of {len(network.units)}, one slice", "after,PSNR dB,SSIM,flat IQR", rows)


def figure_s1(bench: Bench) -> None:
    """By the number of images that an estimate is made from."""
    volumes = bench.usual
    weights = [bench.trained("nrrn", volumes)]
    rows = []
    for images in (3, 2, 1):
        row = bench.compared(f"figure-s1-{images}", volumes, weights, Method(images))["nrrn"]
        rows.append(
            [
                str(images),
                f"{row['psnr_db']:.2f}",
                f"{row['ssim']:.3f}",
                {3: "31.11, 0.971", 2: "30.42, 0.967"}.get(images, ""),
            ]
        )
    bench.table("Fig. S1: by the number of images", "images,PSNR dB,SSIM,paper (OHSU)", rows)


def stitching(bench: Bench) -> None:
    """Crop-and-discard beside overlaps that are blended, in small tiles, where seams show most."""
    volumes, rows = bench.usual, []
    weights = [bench.trained("nrrn", volumes)]
    for stitch in ("crop", "blend"):
        row = bench.compared(f"stitch-{stitch}", volumes, weights, Method(stitch=stitch), Layout(tile=40))["nrrn"]
        keys = ("psnr_db", "seam_energy", "million_voxels_per_s")
        rows.append([stitch, *(f"{row[key]:.3f}" if key in row else "" for key in keys)])
    bench.table("Stitching of tiles of 40 x 40 pixels", "stitch,PSNR dB,seam energy (1: none),Mvoxel/s", rows)


def figure_s2(bench: Bench) -> None:
    """Parameters and arithmetic of the paper's networks; the same at every scale."""
    networks = [*(Architecture("nrrn", units, 64, "neighbours") for units in range(1, 6))]
    networks += [Architecture("denoisenet", 20, 64, "channels"), Architecture("unet", 4, 64, "mean")]
    rows = [
        [f"{each.kind}, {each.units}", f"{each.parameters:,}", f"{each.flop_per_voxel() * 256**2 / 1e9:.1f}"]
        for each in networks
    ]
    bench.table("Fig. S2: parameters, and GFLOP a tile of 256 x 256", "network,parameters,GFLOP", rows)


SECTIONS = {
    "table-1": table_1,
    "by-strength": by_strength,
    "table-2": table_2,
    "real-noise": real_noise,
    "transfer": transfer,
    "how-long": how_long,
    "figure-5": figure_5,
    "figure-s1": figure_s1,
    "stitching": stitching,
    "figure-s2": figure_s2,
}


def head(name: str) -> list[str]:
    """What all sections have in common."""
    scale = SCALES[name]
    shape, steps = " x ".join(map(str, scale.test)), scale.settings
    return [
        "# The paper's tables on our data",
        "",
        f"`python workflows/paper_tables.py DATA OUT --scale {name}`. Units and channels: NRRN {scale.nrrn}, "
        f"DenoiseNet {scale.denoisenet}, U-Net {scale.unet}. Trained for {steps.steps} steps of "
        f"{steps.batch} crops of {steps.crop} x {steps.crop}; measured on {shape} voxels that "
        "none was trained on. The paper's figures are of other volumes: compare the order.",
        "",
        f"`nrrn` is trained as the paper does, by eq. 3; `own` as `nrrn train` does unless told, {scale.own.steps} "
        f"steps of {scale.own.batch} crops of {scale.own.crop} x {scale.own.crop} by the loss that suits the noise, "
        "without clean slices; `n2c` on clean slices, `n2v` with blind spots.",
        "",
    ]


def make(bench: Bench, name: str) -> None:
    """One section, and what it measured, each into a file of its name."""
    started, trained = time.monotonic(), len(bench.trainings)
    bench.lines, bench.results = [], {}
    SECTIONS[name](bench)
    minutes, new = (time.monotonic() - started) / 60, len(bench.trainings) - trained
    where = f"{os.cpu_count()} cores, torch {version('torch')}, {date.today()}"
    bench.lines += [f"*{minutes:.1f} min, {new} trainings among them; {where}.*", ""]
    folder = bench.out / "sections"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(bench.results, indent=1))
    (folder / f"{name}.md").write_text("\n".join(bench.lines))  # last: where it is, both are
    print("\n".join(bench.lines), flush=True)


def main() -> None:
    """All of them, or those asked for."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("data", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--scale", choices=SCALES, default="small")
    words.add_argument("--only", metavar="NAME,NAME", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    given = words.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        sys.exit(f"section {unknown[0]!r} is unknown: use {', '.join(SECTIONS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.data, given.out, SCALES[given.scale])
    for name in names:
        make(bench, name)
    there = [given.out / "sections" / f"{name}.md" for name in SECTIONS]
    sections = [path.read_text() for path in there if path.exists()]
    results: dict[str, Any] = {}
    for path in there:
        if path.exists():
            results |= json.loads(path.with_suffix(".json").read_text())
    (given.out / "tables.md").write_text("\n".join([*head(given.scale), *sections]))
    (given.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":  # as all that starts processes
    try:
        main()
    except NrrnError as error:
        sys.exit(f"{error}")
