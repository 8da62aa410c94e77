"""What came of a training, as one HTML page: made from a weights file and the volume that its record names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nrrn_pipeline import storage
from nrrn_pipeline.api import RunWatch
from nrrn_pipeline.comparing.measuring import Compared, Comparison, compare
from nrrn_pipeline.comparing.methods import Candidate
from nrrn_pipeline.comparing.showing import ABOUT_NOISE, ABOUT_REMOVED, COLUMNS
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.network import architecture_of, parse_header
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.report import figures
from nrrn_pipeline.report.page import Evaluation, Figure, Row, html_of
from nrrn_pipeline.report.pictures import removed_picture
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.training.train import CHOSEN, TRIED
from nrrn_pipeline.volume import Volume, open_volume

SLICES, SIDE = 8, 512  # that are shown and measured, at most
DENOISED = "denoised"
MEASURES = (
    "noise_sigma",
    "residual_whiteness",
    "residual_neighbour_correlation",
    "residual_low_frequency_share",
)
MOST_COUNTS = 2**16  # that a noise model is drawn with, whatever a file says


@dataclass(frozen=True)
class Learnt:
    """What weights tell of their training, for people; the first volume, where to show it, and its noise."""

    name: str
    facts: dict[str, str]
    source: str
    shape: tuple[int, ...]
    box: Box
    held_out: bool
    noise: NoiseCurve | None


def check_page(page: Location) -> None:
    """Raises InputError if no page of a training can be made here, or written there; writes nothing."""
    lacking = [name for name, module in (("matplotlib", "matplotlib"), ("PyWavelets", "pywt")) if not find_spec(module)]
    if lacking:
        raise InputError(f"a page of a training needs {' and '.join(lacking)}: pip install nrrn-pipeline[evaluation]")
    storage.check_new_file(page)


def write_training_page(weights: Location, page: Location, device: str = "auto", watch: RunWatch | None = None) -> None:
    """Write one HTML file that shows how weights were trained, and what they do on slices held out from training.

    These are of the first volume, which is denoised there as `denoise` would: up to SLICES slices, SIDE x SIDE voxels
    around the middle of the part that was learnt from. The middle slices if nothing was held out; the page says so.

    Raises InputError if the weights do not tell of their training, the volume is not there any more, or the page exists
    or cannot be written; RunError if denoising broke off.
    """
    check_page(page)
    learnt = _learnt(weights)
    volume = _volume_of(learnt, weights)
    with TemporaryDirectory(prefix="nrrn-") as folder:
        options = Options(roi=learnt.box, cluster="serial", device=device)
        comparison = compare(volume.url, folder, [Candidate(DENOISED, located(weights))], options, watch=watch)
    storage.write_file(absolute(page), html_of(_shown(learnt, comparison)).encode())


def _learnt(weights: Location) -> Learnt:
    """Raises InputError for weights without a record of their training, or with one that cannot be."""
    header = parse_header(read_weights(located(weights)), weights)
    record = header.get("training")
    if not isinstance(record, dict) or not record.get("volumes"):
        raise InputError(f"{weights} tells of no volume that it was trained on: give weights that nrrn train wrote")
    try:
        first = record["volumes"][0]
        held_out = [int(z) for z in first["held_out"]]
        box = _box_shown(Box.parse(first["roi"]), held_out)
        network = architecture_of(header)
        facts = {
            "weights": located(weights),
            **_facts_of_volumes(record["volumes"]),
            "network": f"{network}: {network.parameters} parameters",
            **_facts_of_course(record),
            "measured": f"{box} of {first['source']}, "
            + ("held out from training" if held_out else "from which it learnt: no slices of it were held out"),
            "pictures": f"of slice z={box.z.start + len(box.z) // 2}",
        }
        source, shape = str(first["source"]), tuple(int(length) for length in first["shape"])
        name = located(weights).rpartition("/")[2]
        return Learnt(name, facts, source, shape, box, bool(held_out), _noise_of(first["noise"]))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"what {weights} tells of its training is damaged, or of another version ({error!r}): give weights that "
            "this version of nrrn train wrote"
        ) from error


def _volume_of(learnt: Learnt, weights: Location) -> Volume:
    """The first volume. Raises InputError if it is not there, or another one."""
    try:
        volume = open_volume(learnt.source)
    except InputError as error:
        raise InputError(f"the page shows what {weights} learnt from, but {error}; put it back there") from error
    if volume.shape != learnt.shape:
        raise InputError(
            f"{volume.url} has shape {volume.shape}, but {weights} learnt from one of {learnt.shape} there: restore it"
        )
    return volume


def _box_shown(part: Box, held_out: Sequence[int]) -> Box:
    """The middle of the longest stretch of slices held out, or of the part; and that of its y and x."""
    stretch = _stretches(held_out)
    z = max(stretch, key=len) if stretch else part.z
    return Box(_middle(z, SLICES), _middle(part.y, SIDE), _middle(part.x, SIDE))


def _stretches(slices: Sequence[int]) -> list[Span]:
    """Slices that follow each other, as spans."""
    found: list[Span] = []
    for z in sorted(set(slices)):
        if found and found[-1].stop == z:
            found[-1] = Span(found[-1].start, z + 1)
        else:
            found.append(Span(z, z + 1))
    return found


def _middle(span: Span, most: int) -> Span:
    start = span.start + max(0, len(span) - most) // 2
    return Span(start, min(start + most, span.stop))


def _noise_of(told: Any) -> NoiseCurve | None:
    """As a record tells it; None if it tells nothing. Raises ValueError, or what Python does, for anything else."""
    if told is None or "signal" not in told:
        return None
    curve = NoiseCurve(tuple(told["signal"]), tuple(told["sigma"]), NoiseModel(**told["model"]))
    model = curve.model
    numbers = [*curve.signal, *curve.sigma, model.gain, model.offset, model.least, model.black or 0, model.white or 0]
    if not curve.signal or len(curve.signal) != len(curve.sigma) or not np.isfinite(numbers).all():
        raise ValueError("its noise")
    if model.counts and not (model.gain > 0 and 0 <= model.counts_at_white <= MOST_COUNTS):
        raise ValueError("its counts")
    return curve


def _facts_of_volumes(volumes: Sequence[dict[str, Any]]) -> dict[str, str]:
    facts = {}
    for number, volume in enumerate(volumes, start=1):
        beside = "".join(f"; {name} {volume[name]}" for name in ("clean", "mask") if volume.get(name))
        held_out = ", ".join(map(str, _stretches(volume["held_out"]))) or "nothing"
        name = "source" if len(volumes) == 1 else f"source {number}"
        facts[name] = f"{volume['source']}, {volume['roi']}{beside}; held out: {held_out}"
    return facts


def _facts_of_course(record: dict[str, Any]) -> dict[str, str]:
    """How training went."""
    settings, validation, taken = record["settings"], record.get("validation"), record["steps_taken"]
    steps = f"{taken} of {settings['steps']} asked for"
    if "stopped" in record:
        steps += f"; it broke off: {record['stopped']}"
    elif taken < settings["steps"]:
        steps += "; it stopped early, as it did no better on slices held out"
    best = "its last weights, as nothing was held out"
    if validation is not None:
        at, looks = validation["best_step"], dict(validation["step_and_loss"])
        best = f"after step {at}: loss on slices held out {looks[at]:.4f}, of {len(looks)} looks"
    height, width = record["crop"]
    tried = enumerate(record.get(TRIED, ()), start=1)
    units = ", ".join(f"{number}: {float(loss):.4f}" for number, loss in tried)
    return {
        **({TRIED: units} if units else {}),
        "loss": f"{record['loss']}" + (f": chosen, as {record[CHOSEN]}" if CHOSEN in record else ""),
        "crops": f"{settings['batch']} a step, of {height} x {width} voxels",
        "steps": steps,
        "best": best,
        "time": f"{record['seconds']:.0f} s",
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None),
        "versions": ", ".join(f"{name} {value}" for name, value in record["versions"].items()),
    }


def _shown(learnt: Learnt, comparison: Comparison) -> Evaluation:
    """What the page shows."""
    given, denoised = comparison.compared
    rows = [Row(of.name, {COLUMNS[name].name: of.measures.get(name) for name in MEASURES}) for of in (given, denoised)]
    caution = () if learnt.held_out else ("No slices were held out: what is shown, the network has learnt from.",)
    return Evaluation(
        title=f"How {learnt.name} was trained",
        facts=learnt.facts,
        columns=[COLUMNS[name] for name in MEASURES],
        rows=rows,
        images={of.name: of.picture for of in (given, denoised)},
        figures=_figures(learnt, given, denoised),
        notes=(*caution, ABOUT_NOISE, ABOUT_REMOVED),
    )


def _figures(learnt: Learnt, given: Compared, denoised: Compared) -> list[Figure]:
    made = []
    if denoised.losses or denoised.looks:
        caption = (
            "Loss by step, on what was learnt from and on slices held out. Without clean slices most of it is noise: "
            "only its fall tells."
        )
        made.append(Figure(figures.training_curves(denoised.losses, denoised.looks), caption))
    if learnt.noise is not None:
        caption = "Noise of the first source by its signal, as it was measured before training."
        made.append(Figure(figures.noise_by_signal(learnt.noise), caption))
    picture, limit = removed_picture(np.subtract(given.picture, denoised.picture, dtype=np.float64))
    caption = (
        f"What was removed from the slice above, a voxel a pixel: middle grey is nothing, black {limit:.3g} grey "
        "levels below it, white as many above. Structure that shows in it was lost."
    )
    made.append(Figure(picture, caption))
    if denoised.residual is not None:
        caption = "Autocorrelation of what was removed. White noise has a point in the middle, and no more."
        made.append(Figure(figures.residual_autocorrelation({DENOISED: denoised.residual}), caption))
    return made
