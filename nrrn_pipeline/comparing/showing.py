"""What came of a comparison, for people and for programs: a table, a page, results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.comparing.measuring import Compared, Comparison
from nrrn_pipeline.places import absolute
from nrrn_pipeline.report import figures
from nrrn_pipeline.report.page import REFERENCE, Column, Figure, Report, Row, html_of

COLUMNS = {
    "psnr_db": Column("PSNR", "dB", "higher"),
    "ssim": Column("SSIM", "", "higher", 3),
    "flat_iqr": Column("flat IQR", "levels", "lower", 1),
    "edge_rise": Column("edge", "voxels", "lower"),
    "edge_width": Column("edges", "voxels", "lower"),
    "noise_sigma": Column("noise", "levels", "lower"),
    "residual_whiteness": Column("whiteness", "", "lower", 3),
    "residual_neighbour_correlation": Column("neighbours", "", None, 3),
    "residual_low_frequency_share": Column("structure", "", None, 3),
    "largest_brightness_step": Column("step", "levels", "lower"),
    "seam_energy": Column("seams", "", None, 3),
    "million_voxels_per_s": Column("speed", "Mvoxel/s", "higher", 3),
    "parameters": Column("parameters", "", None, 0),
    "gflop_per_tile": Column("arithmetic", "GFLOP", None, 1),
}
ABOUT_NOISE = (
    "Noise: its standard deviation in grey levels, measured in the finest details alone. A filter that blurs does well "
    "on it: read it together with the next three."
)
ABOUT_REMOVED = (
    "What a method removes should look like the noise. Whiteness: the strongest autocorrelation of what was removed, 0 "
    "for white noise. Neighbours: its correlation between successive slices, 0 if they are independent. Structure: the "
    "share of its power below 0.2 cycles per pixel, 0.126 for white noise; more means that structure was removed."
)
NOTES = (
    ABOUT_NOISE,
    ABOUT_REMOVED,
    "Flat IQR: the interquartile range where the signal should be flat. Edge: over how many voxels an edge rises from "
    "10 to 90 %; none where noise drowns it.",
    "Edges: over how many voxels the mean profile across many edges rises, which are found in the input, each on other "
    "slices than the one that it is measured in, and are the same for all methods. To be compared with the input's and "
    "with that of mean: more means that a method blurs. None where there are too few edges; results.json has the "
    "standard error.",
    "Step: the largest change of a slice's mean brightness to the next, in grey levels.",
    "Seams: changes across the borders of tiles and slabs, against all others: near 1, but for what the image itself "
    "has there.",
    "Arithmetic: floating-point operations for a tile of 256 x 256 pixels, in units of 10^9. Speed: with all "
    "workers together, measuring the slices' mean and standard deviation included; none of a run that was resumed.",
)


def results_of(comparison: Comparison) -> dict[str, Any]:
    """All measures as JSON, the input first: {"results": [{"method": "input", "psnr_db": ...}, ...]}."""
    results = [
        {"method": found.name} | {name: _number(value) for name, value in found.measures.items()}
        for found in comparison.compared
    ]
    return {"source": comparison.source.url, "roi": str(comparison.box), "results": results}


def _number(value: float | None) -> float | None:
    """None for what JSON has no number for, such as the PSNR of equal images."""
    return value if value is not None and math.isfinite(value) else None


def write_results(comparison: Comparison, folder: str, facts: Mapping[str, str]) -> list[str]:
    """results.json, results.csv and index.html in a folder on disk; their paths."""
    results = json.dumps(results_of(comparison) | {"facts": dict(facts)}, indent=1, allow_nan=False)
    texts = {
        "results.json": f"{results}\n",
        "results.csv": csv_of(comparison),
        "index.html": html_of(report_of(comparison, facts)),
    }
    paths = [f"{absolute(folder)}/{name}" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        storage.write_file(path, text.encode())
    return paths


def csv_of(comparison: Comparison) -> str:
    """A line for each method, the input first, after one of names."""
    text = io.StringIO()
    shown = shown_columns(comparison.compared)
    lines = csv.writer(text)
    lines.writerow(["method", *shown])
    for found in comparison.compared:
        lines.writerow([found.name, *(found.measures.get(name, "") for name in shown)])
    return text.getvalue()


def shown_columns(compared: Sequence[Compared]) -> dict[str, Column]:
    """Those that any method has a number in."""
    there = {name for found in compared for name, value in found.measures.items() if value is not None}
    return {name: column for name, column in COLUMNS.items() if name in there}


def report_of(comparison: Comparison, facts: Mapping[str, str]) -> Report:
    """What the page shows."""
    shown = shown_columns(comparison.compared)
    rows = [
        Row(found.name, {column.name: found.measures.get(name) for name, column in shown.items()})
        for found in comparison.compared
    ]
    pictures = {found.name: found.picture for found in comparison.compared}
    if comparison.reference is not None:
        pictures[REFERENCE] = comparison.reference
    return Report(
        title=f"Denoising of {comparison.source.group_url}",
        facts=facts,
        columns=[*shown.values()],
        rows=rows,
        views={"The slice": pictures},
        figures=_figures(comparison, rows),
        notes=NOTES,
    )


def _figures(comparison: Comparison, rows: Sequence[Row]) -> list[Figure]:
    found, made = comparison.compared, []
    if comparison.reference is not None:
        made = [
            Figure(figures.bars(rows, COLUMNS[name]), f"{COLUMNS[name].name} against the reference.")
            for name in ("psnr_db", "ssim")
        ]
        if len(found[0].patches) > 1:
            decibels = {each.name: [patch.psnr_db for patch in each.patches] for each in found}
            likeness = {each.name: [patch.ssim for patch in each.patches] for each in found}
            made += [
                Figure(figures.patch_histogram(decibels), "PSNR of each patch of 256 x 256 pixels."),
                Figure(figures.patch_histogram(likeness, "SSIM", ""), "SSIM of each patch of 256 x 256 pixels."),
            ]
    flat = {each.name: each.flat for each in found if each.flat.size}
    if flat:
        made.append(Figure(figures.box_plots(flat, "signal", "grey levels"), "The signal where it should be flat."))
    profiles = {each.name: each.profile for each in found if each.profile.size}
    if profiles:
        made.append(Figure(figures.profile(profiles, unit="voxels"), "The signal along the line across an edge."))
    for each in found:
        if each.losses or each.looks:
            caption = f"How {each.name} learned: the loss of its steps, and on slices that it did not learn from."
            made.append(Figure(figures.training_curves(each.losses, each.looks), caption))
    residuals = {each.name: each.residual for each in found if each.residual is not None}
    if residuals:
        caption = "Autocorrelation of what each method removed. White noise has a point in the middle, and no more."
        made.append(Figure(figures.residual_autocorrelation(residuals), caption))
    return made
