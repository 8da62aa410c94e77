"""Each method runs through the same pipeline, and all are measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.api import RunWatch, Summary, carry_out, open_runner
from nrrn_pipeline.comparing.methods import Candidate
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.edges import Edges, find_edges, width_of
from nrrn_pipeline.evaluation.metrics import PatchLikeness, patch_likeness, psnr, refuse_unlike, ssim
from nrrn_pipeline.evaluation.signal import Line, has_edge, interquartile_range, region, rise_distance
from nrrn_pipeline.evaluation.without_reference import (
    autocorrelation,
    brightness_steps,
    low_frequency_share,
    neighbour_correlation,
    noise_sigma,
    seam_energy,
    whiteness,
)
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.network import parse_header
from nrrn_pipeline.options import Options
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.preparing import Location, make_plan
from nrrn_pipeline.report.page import INPUT
from nrrn_pipeline.run import check_output
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.volume import Volume, open_volume, read_box

MOST_VOXELS = 2**28  # that are measured at a time, in memory with some copies in float64
LEAST_SIDE = 11  # pixels: SSIM's window
SHOWN = 1024  # pixels along y and x that are kept of the middle slice, to be shown


@dataclass(frozen=True)
class Yardstick:
    """What methods are held against: a clean volume; a box where the signal should be flat; a line across an edge.

    All in the source's voxels, and none of them needed.
    """

    reference: Location | None = None
    flat: Box | None = None
    edge: Line | None = None


@dataclass(frozen=True)
class Compared:
    """What was found of one method. `measures`: a number each, None where there is none; `picture`: its middle slice.

    flat, profile: the values of the yardstick's box and line; empty without. losses, looks: (step, loss) of its
    training, and on slices that were held out from it; empty where its weights tell none.
    """

    name: str
    measures: dict[str, float | None]
    picture: NDArray[Any] = field(repr=False)
    patches: tuple[PatchLikeness, ...] = ()
    residual: NDArray[np.float64] | None = None
    flat: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    profile: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    losses: tuple[tuple[float, float], ...] = ()
    looks: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All methods, the input first; `reference`: its middle slice, None if there is none."""

    source: Volume
    box: Box
    compared: tuple[Compared, ...]
    reference: NDArray[Any] | None = field(default=None, repr=False)


def compare(
    source: Location,
    folder: str,
    methods: Sequence[Candidate],
    options: Options | None = None,
    yardstick: Yardstick = Yardstick(),
    watch: RunWatch | None = None,
) -> Comparison:
    """Denoise a volume by each method into folder/NAME.ome.zarr, as nrrn denoise does, and measure all of them.

    Called again it denoises only what is left. `options.roi` and `level` say which part. Raises what denoise raises,
    and InputError for what cannot be compared.
    """
    options, watch = options or Options(), watch or RunWatch()
    opened = open_volume(source, options.level)
    box = options.roi or opened.box
    refuse_outside(box, opened.box)
    if box.size > MOST_VOXELS:
        raise InputError(f"{box.size} voxels are too many to compare: give a --roi of {MOST_VOXELS} at most")
    if min(box.shape[1:]) < LEAST_SIDE:
        raise InputError(f"slices of {box} are too small to be measured: {LEAST_SIDE} x {LEAST_SIDE} pixels at least")
    noisy = _finite(opened, box)
    clean = None if yardstick.reference is None else _reference(yardstick.reference, options.level, opened, box, noisy)
    if yardstick.flat is not None:
        refuse_outside(yardstick.flat, box, "flat")
    middle = _middle(box.shape)
    edges = find_edges(noisy)
    compared = [_against(_sharp(Compared(INPUT, {}, noisy[middle]), noisy, edges), noisy, clean, yardstick, box)]
    plans = [_planned(source, folder, candidate, options) for candidate in methods]  # before any of them runs
    with open_runner(plans, options) as (runner, where):
        for candidate, plan in zip(methods, plans, strict=True):
            watch.started(plan, where)
            summary = carry_out(plan, options, runner, watch)
            denoised = read_box(plan.target, plan.target.box)
            found = _removed(Compared(candidate.name, _cost(summary), denoised[middle]), noisy, denoised, plan)
            found = _sharp(_trained(found, candidate), denoised, edges)
            compared.append(_against(found, denoised, clean, yardstick, box))
    return Comparison(opened, box, tuple(compared), None if clean is None else clean[middle])


def _middle(shape: Shape) -> tuple[int, slice, slice]:
    """The middle slice, and of that as much as is shown."""
    y, x = (slice(max(0, (length - SHOWN) // 2), (length + SHOWN) // 2) for length in shape[1:])
    return shape[0] // 2, y, x


def _planned(source: Location, folder: str, candidate: Candidate, options: Options) -> DenoisePlan:
    """What denoise would do for it. Raises InputError where that would."""
    images = options.method.images if candidate.weights else 3  # a filter takes what its name says
    asked = replace(options, method=replace(options.method, name=candidate.method, images=images))
    plan = make_plan(source, f"{folder}/{candidate.name}.ome.zarr", candidate.weights, asked)
    check_output(plan, options.overwrite)
    return plan


def _finite(volume: Volume, box: Box) -> NDArray[Any]:
    voxels = read_box(volume, box)
    if not np.isfinite(voxels).all():
        raise InputError(f"{volume.url} holds NaN or infinite voxels: replace them (with 0, say) before comparing")
    if voxels.min() == voxels.max():
        raise InputError(f"{volume.url} is constant in {box}: there is nothing to be denoised; give another --roi")
    return voxels


def _reference(location: Location, level: int, source: Volume, box: Box, noisy: NDArray[Any]) -> NDArray[Any]:
    opened = open_volume(location, level)
    if opened.shape != source.shape:
        raise InputError(f"the reference {location} has shape {opened.shape}, but the source {source.shape}")
    clean = read_box(opened, box)
    refuse_unlike(clean, noisy, ("reference", "source"))
    return clean


def _data_range(reference: NDArray[Any]) -> float:
    """Grey levels from black to white: all 255 of uint8, of other dtypes those that the reference takes."""
    return 255.0 if reference.dtype == np.uint8 else float(reference.max()) - float(reference.min())


def _against(
    found: Compared, voxels: NDArray[Any], clean: NDArray[Any] | None, yardstick: Yardstick, box: Box
) -> Compared:
    """The same with what its voxels say, by themselves and against the yardstick."""
    measures: dict[str, float | None] = {"noise_sigma": float(noise_sigma(voxels).mean())}
    if len(voxels) > 1:
        measures["largest_brightness_step"] = float(brightness_steps(voxels).max())
    if clean is not None:
        measures["psnr_db"] = psnr(clean, voxels, _data_range(clean))
        measures["ssim"] = ssim(clean, voxels, _data_range(clean))
        found = replace(found, patches=patch_likeness(clean, voxels, _data_range(clean)))
    if yardstick.flat is not None:
        flat = region(voxels, yardstick.flat.shifted(box))
        measures["flat_iqr"] = interquartile_range(flat)
        found = replace(found, flat=flat.ravel())
    if yardstick.edge is not None:
        profile = yardstick.edge.within(box).profile(voxels)
        measures["edge_rise"] = rise_distance(profile) if has_edge(profile) else None
        found = replace(found, profile=profile)
    return replace(found, measures=measures | found.measures)


def _sharp(found: Compared, voxels: NDArray[Any], edges: Edges) -> Compared:
    """The same with the width of the source's edges in its voxels."""
    width = width_of(edges.profiles(voxels))
    voxels_wide, error = (None, None) if width is None else (width.voxels, width.error)
    measures = {"edge_width": voxels_wide, "edge_width_error": error}
    return replace(found, measures=found.measures | measures)


def _removed(found: Compared, noisy: NDArray[Any], denoised: NDArray[Any], plan: DenoisePlan) -> Compared:
    """The same with what it took out of the input, and the seams it left."""
    residual = np.subtract(noisy, denoised, dtype=np.result_type(noisy, denoised, np.float32))
    correlation = autocorrelation(residual)
    measures = {
        "residual_whiteness": whiteness(correlation),
        "residual_neighbour_correlation": neighbour_correlation(residual) if len(residual) > 1 else None,
        "residual_low_frequency_share": low_frequency_share(residual),
        "seam_energy": _seams(denoised, plan),
    }
    return replace(found, measures=found.measures | measures, residual=correlation)


def _trained(found: Compared, candidate: Candidate) -> Compared:
    """The same with what the record in its weights says of their training."""
    if candidate.weights is None:
        return found
    record = parse_header(read_weights(located(candidate.weights)), candidate.weights).get("training")
    record = record if isinstance(record, dict) else {}
    validation = record.get("validation")
    looks = validation.get("step_and_loss") if isinstance(validation, dict) else None
    return replace(found, losses=_points(record.get("step_and_mean_loss")), looks=_points(looks))


def _points(value: Any) -> tuple[tuple[float, float], ...]:
    """Pairs of finite numbers; none if there is anything else, as anybody may have written the file."""
    try:
        points = np.array(value, np.float64)
    except (TypeError, ValueError):
        return ()
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        return ()
    return tuple((float(step), float(loss)) for step, loss in points)


def _seams(voxels: NDArray[Any], plan: DenoisePlan) -> float | None:
    """Of tiles and slabs; None if there is one tile only."""
    borders_y, borders_x = (
        {tile.keep.start - span.start for cut in cuts for tile in plan.tiles_along(cut)} - {0}
        for span, cuts in zip(plan.box.spans[1:], plan.slabs.axes[1:], strict=True)
    )
    return seam_energy(voxels, borders_y, borders_x) if borders_y or borders_x else None


def _cost(summary: Summary) -> dict[str, float | None]:
    assert isinstance(summary.plan, DenoisePlan)
    denoiser, images = summary.plan.denoiser, summary.plan.method.images
    measures: dict[str, float | None] = {}
    if isinstance(denoiser, Weights):
        measures = {
            "parameters": denoiser.architecture.parameters,
            "gflop_per_tile": denoiser.architecture.flop_per_voxel(images) * 256**2 / 1e9,
        }
    if summary.voxels and not summary.resumed:  # nothing is known of a run that was resumed
        measures["million_voxels_per_s"] = summary.voxels / summary.seconds / 1e6
    return measures
