"""Tables of what users ask, for paper_tables.py: any noise, no clean data, weights of another volume, and how long."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paper_bench import EPFL, FIB25, SEEDS, SHIPPED, STRENGTHS, Bench, took_file

from nrrn_pipeline import Noise, open_volume
from nrrn_pipeline.evaluation.edges import Width, find_edges, wider_by, width_of
from nrrn_pipeline.volume import read_box


def by_strength(bench: Bench) -> None:
    """What `nrrn train` makes of noisy slices alone, beside filters and the same network trained on clean slices."""
    found = {}
    for title in bench.scale.strengths:
        volumes = bench.volumes(FIB25, "fib25", STRENGTHS[title])
        own = [bench.trained("own", volumes), bench.trained("own-n2c", volumes, loss="clean")]
        methods = [*bench.filters, SHIPPED, *own]
        found[title] = bench.compared(f"strength-{title.replace(' ', '-')}", volumes, methods)
    rows = [
        [name, *(f"{row[name]['psnr_db']:.2f}, {row[name]['ssim']:.3f}" for row in found.values())]
        for name in next(iter(found.values()))
    ]
    for name, others in (("own above the best filter", bench.filters), ("own above own-n2c", ["own-n2c"])):
        ahead = [
            {key: row["own"][key] - max(row[other][key] for other in others) for key in ("psnr_db", "ssim")}
            for row in found.values()
        ]
        rows.append([name, *(f"{each['psnr_db']:+.2f}, {each['ssim']:+.3f}" for each in ahead)])
    bench.table("FIB-25 by noise: PSNR dB, SSIM", f"method,{','.join(found)}", rows)


def real_noise(bench: Bench) -> None:
    """What no clean slices are needed for: what is removed is white, as the noise is, and edges stay narrow."""
    if bench.lacks(EPFL, "EPFL with the noise it came with"):
        return
    volumes, depth, side = bench.slices(EPFL, "epfl"), bench.scale.test[0], bench.scale.wide
    weights = [
        bench.trained("own", volumes),
        bench.trained("nrrn", volumes),
        bench.trained("nrrn-n2v", volumes, loss="blind-spot"),
    ]
    wide = bench.stored(EPFL, "epfl-wide", lambda volume: volume[-depth:, :side, :side])
    found = bench.compared("real-noise", {"test": wide}, [*bench.filters, SHIPPED, *weights])
    edges = find_edges(voxels(wide))
    across = {name: edges.profiles(voxels(bench.out / "real-noise" / f"{name}.ome.zarr")) for name in [*found][1:]}
    across["input"] = edges.profiles(voxels(wide))
    keys = ("noise_sigma", "residual_whiteness", "residual_neighbour_correlation", "residual_low_frequency_share")
    rows = [
        [
            name,
            *(f"{row[key]:.3f}" if key in row else "" for key in keys),
            text_of(width_of(across[name])),
            text_of(wider_by(across[name], across["mean"]), "+") if name != "mean" else "",
        ]
        for name, row in found.items()
    ]
    header = "method,noise left,whiteness (0: white),with neighbours,structure (0.126: none),edges in voxels"
    bench.table("EPFL with the noise it came with: what each method removed", f"{header},wider than in mean", rows)
    bench.lines += [
        f"{depth} x {side} x {side} voxels. Edges: the 10-90 % rise of the mean profile of {len(edges.places)} edges, "
        "found on other slices than measured; \N{PLUS-MINUS SIGN} one standard error; `mean` is that of three slices.",
        "",
    ]


def voxels(path: Path) -> NDArray[Any]:
    """All of a volume."""
    volume = open_volume(path)
    return read_box(volume, volume.box)


def text_of(width: Width | None, sign: str = "") -> str:
    """With its error; a dash for none."""
    return "-" if width is None else f"{width.voxels:{sign}.3f} ± {width.error:.3f}"


def transfer(bench: Bench) -> None:
    """Weights of another volume, as they are and tuned, beside training from nothing; no clean slices."""
    if bench.lacks(EPFL, "Transfer learning"):
        return
    noise = STRENGTHS["poisson 30"]
    _, _, start = bench.trained("own", bench.volumes(FIB25, "fib25", noise)).partition("=")
    volumes = bench.volumes(EPFL, "epfl", noise)
    tuned = [bench.trained(f"own-tuned-{steps}", volumes, steps=steps, start=start) for steps in bench.scale.tuned]
    anew = [bench.trained(f"own-anew-{steps}", volumes, steps=steps) for steps in bench.scale.anew]
    found = bench.compared("transfer", volumes, ["gaussian-avg", f"own-fib25={start}", *tuned, *anew])
    rows = [[name, f"{row['psnr_db']:.2f}", f"{row['ssim']:.3f}"] for name, row in found.items()]
    bench.table("Transfer learning: from FIB-25 to EPFL, Poisson noise of peak 30", "method,PSNR dB,SSIM", rows)
    bench.lines += [
        f"`own-fib25`: {bench.scale.own.steps} steps on FIB-25 with that noise, none on EPFL; `tuned`: from there, so "
        "many steps on EPFL; `anew`: from random weights. Against slices with the noise that EPFL came with.",
        "",
    ]


def how_long(bench: Bench) -> None:
    """Of `nrrn train` on a volume of which nothing is known, each number of steps being a training of its own."""
    depth, height, width = bench.scale.fresh
    clean = bench.stored(FIB25, "fib25-fresh", lambda volume: mirrored(volume[:depth], height, width))
    noise, own = Noise(sigma=30), bench.scale.fresh_own
    volumes = bench.volumes(FIB25, "fib25", noise) | {"train": bench.noisy(clean, replace(noise, seed=SEEDS["train"]))}
    weights = {
        f"own-{steps}": bench.trained(f"own-{steps}", volumes, **asdict(replace(own, steps=steps)))
        for steps in bench.scale.fresh_steps
    }
    found = bench.compared("how-long", volumes, [*bench.filters, *weights.values()])
    keys = ("psnr_db", "ssim")
    best = {key: max(bench.filters, key=lambda name: found[name][key]) for key in keys}
    rows = [
        [f"{name}, the best filter", "", *(f"{found[name][key]:.3f}" for key in keys), "", "", ""]
        for name in dict.fromkeys(best.values())
    ]
    for name, of in weights.items():
        took = took_file(Path(of.partition("=")[2]))
        ahead = [found[name][key] - found[best[key]][key] for key in keys]
        beaten = sum(all(found[name][key] > found[each][key] for key in keys) for each in bench.filters)
        rows.append(
            [
                name,
                took.read_text().strip() if took.exists() else "",
                *(f"{found[name][key]:.3f}" for key in keys),
                *(f"{each:+.3f}" for each in ahead),
                f"{beaten} of {len(bench.filters)}",
            ]
        )
    header = "training by steps,seconds,PSNR dB,SSIM,above the best filter: PSNR,SSIM,filters beaten in both"
    bench.table("How long until it beats every filter: FIB-25, Gaussian noise of sigma 30", header, rows)
    bench.lines += [
        f"Trained on {depth} x {height} x {width} voxels, other slices than are measured, mirrored to that size; "
        "seconds are those of all that `nrrn train` does, from the noisy volume to the weights.",
        "",
    ]


def mirrored(volume: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Slices of that size, each continued by its mirror images."""
    more = [max(0, wanted - length) for wanted, length in zip((height, width), volume.shape[1:], strict=True)]
    return np.pad(volume, ((0, 0), (0, more[0]), (0, more[1])), mode="reflect")
