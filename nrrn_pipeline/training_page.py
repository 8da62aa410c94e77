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
from nrrn_pipeline.comparing.measuring import LEAST_SIDE, Compared, Comparison, compare
from nrrn_pipeline.comparing.methods import Candidate
from nrrn_pipeline.comparing.showing import ABOUT_NOISE, ABOUT_REMOVED, COLUMNS
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, joined
from nrrn_pipeline.network import architecture_of, parse_header
from nrrn_pipeline.noise_details import NoiseCurve
from nrrn_pipeline.noise_model import NoiseModel
from nrrn_pipeline.options import Options
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.report import figures
from nrrn_pipeline.report.page import DENOISED, Figure, Report, Row, write_page
from nrrn_pipeline.report.pictures import removed_picture
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.training.masks import best_window, blocks_of, image_blocks
from nrrn_pipeline.training.material import MASK_DTYPES
from nrrn_pipeline.training.train import CHOSEN, TRIED
from nrrn_pipeline.volume import Volume, open_volume

SLICES, SIDE = 8, 512  # that are shown and measured, at most
LEAST_SHOWN = 64  # voxels along y and x, where there are so many
MEASURES = (
    "noise_sigma",
    "residual_whiteness",
    "residual_neighbour_correlation",
    "residual_low_frequency_share",
)
MOST_COUNTS = 2**16  # that a noise model is drawn with, whatever a file says


@dataclass(frozen=True)
class Learnt:
    """What weights tell of their training, for people; of one volume what it was, what was learnt from, its noise.

    held_out: its longest stretch of slices that were; None if none were, of any volume.
    """

    name: str
    facts: dict[str, str]
    source: str
    shape: tuple[int, ...]
    dtype: str
    part: Box
    mask: str | None
    held_out: Span | None
    noise: NoiseCurve | None


def check_page(page: Location, parts: Sequence[Box] = ()) -> None:
    """Raises InputError if no page of training on such parts can be made here, or written there; writes nothing."""
    for part in parts:
        if min(part.shape[1:]) < LEAST_SIDE:
            raise InputError(
                f"no page can be made of what was learnt from {part}: that takes {LEAST_SIDE} x {LEAST_SIDE} voxels at "
                "least; leave the page out, or give a larger part"
            )
    lacking = [name for name, module in (("matplotlib", "matplotlib"), ("PyWavelets", "pywt")) if not find_spec(module)]
    if lacking:
        raise InputError(f"a page of a training needs {' and '.join(lacking)}: pip install nrrn-pipeline[evaluation]")
    storage.check_new_file(page)


def write_training_page(weights: Location, page: Location, device: str = "auto", watch: RunWatch | None = None) -> None:
    """Write one HTML file that shows how weights were trained, and what they do on slices held out from training.

    These are of the first volume that has any, which is denoised there as `denoise` would: up to SLICES slices, SIDE x
    SIDE voxels where there is most to see. Slices in the middle if nothing was held out; the page says so.

    Raises InputError if the weights do not tell of their training, the volume is not there any more, or the page exists
    or cannot be written; RunError if denoising broke off.
    """
    check_page(page)
    learnt = _learnt(weights)
    volume = _volume_of(learnt, weights)
    box = _box_shown(learnt, volume)
    with TemporaryDirectory(prefix="nrrn-") as folder:
        options = Options(roi=box, cluster="serial", device=device)
        comparison = compare(volume.url, folder, [Candidate(DENOISED, located(weights))], options, watch=watch)
    write_page(page, _shown(learnt, comparison))


def _learnt(weights: Location) -> Learnt:
    """Raises InputError for weights without a record of their training, or with one that cannot be."""
    header = parse_header(read_weights(located(weights)), weights)
    record = header.get("training")
    if not isinstance(record, dict) or not record.get("volumes"):
        raise InputError(f"{weights} tells of no volume that it was trained on: give weights that nrrn train wrote")
    try:
        volumes = record["volumes"]
        shown = next((of for of in volumes if of["held_out"]), volumes[0])
        held_out = max(joined({Span(int(z), int(z) + 1) for z in shown["held_out"]}), key=len, default=None)
        network = architecture_of(header)
        facts = {
            "weights": located(weights),
            **_facts_of_volumes(volumes),
            "network": f"{network}: {network.parameters} parameters",
            **_facts_of_course(record),
        }
        return Learnt(
            name=located(weights).rpartition("/")[2],
            facts=facts,
            source=str(shown["source"]),
            shape=tuple(int(length) for length in shown["shape"]),
            dtype=str(shown["dtype"]),
            part=Box.parse(shown["roi"]),
            mask=None if shown["mask"] is None else str(shown["mask"]),
            held_out=held_out,
            noise=_noise_of(shown["noise"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"what {weights} tells of its training is damaged, or of another version ({error!r}): give weights that "
            "this version of nrrn train wrote"
        ) from error


def _volume_of(learnt: Learnt, weights: Location) -> Volume:
    """The one that is shown. Raises InputError if it is not there, or another one."""
    try:
        volume = open_volume(learnt.source)
    except InputError as error:
        raise InputError(f"the page shows what {weights} learnt from, but {error}; put it back there") from error
    if (volume.shape, volume.dtype) != (learnt.shape, learnt.dtype):
        raise InputError(
            f"{volume.url} is {volume.dtype} of shape {volume.shape}, but {weights} learnt from {learnt.dtype} of "
            f"{learnt.shape} there: restore it"
        )
    return volume


def _box_shown(learnt: Learnt, volume: Volume) -> Box:
    """Of slices held out, or else of the part, those in the middle; where one of these has most image, and mask."""
    z = (learnt.held_out or learnt.part.z).middle(SLICES)
    middle = z.start + len(z) // 2
    slice_ = Box(Span(middle, middle + 1), learnt.part.y, learnt.part.x)
    refuse_outside(slice_, volume.box)
    blocks = image_blocks(volume, slice_)
    if learnt.mask is not None:
        mask = open_volume(learnt.mask, dtypes=MASK_DTYPES)
        refuse_outside(slice_, mask.box, "the mask's part")
        masked = blocks & blocks_of(mask, slice_)
        blocks = masked if masked.any() else blocks
    if not blocks.any():
        raise InputError(f"{volume.url} is constant in {slice_}, which was to be shown: restore it")
    window = best_window({middle: blocks[0]}, slice_)
    y, x = (_around(found, part) for found, part in zip(window.spans[1:], slice_.spans[1:], strict=True))
    return Box(z, y, x)


def _around(window: Span, part: Span) -> Span:
    """The window if it is large enough to be measured; else the part around it that is."""
    if len(window) >= LEAST_SHOWN:
        return window.middle(SIDE)
    return part.around((window.start + window.stop) // 2, LEAST_SHOWN)


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
        held_out = ", ".join(map(str, joined({Span(z, z + 1) for z in volume["held_out"]}))) or "nothing"
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


def _shown(learnt: Learnt, comparison: Comparison) -> Report:
    """What the page shows."""
    given, denoised = comparison.compared
    rows = [Row(of.name, {COLUMNS[name].name: of.measures.get(name) for name in MEASURES}) for of in (given, denoised)]
    box = comparison.box
    measured = f"{box} of {learnt.source}, "
    measured += "held out from training" if learnt.held_out else "from which it learnt: no slices were held out"
    about = {"measured": measured, "pictures": f"of slice z={box.z.start + len(box.z) // 2}"}
    caution = () if learnt.held_out else ("No slices were held out: what is shown, the network has learnt from.",)
    return Report(
        title=f"How {learnt.name} was trained",
        facts=learnt.facts | about,
        columns=[COLUMNS[name] for name in MEASURES],
        rows=rows,
        views={"The slice": {of.name: of.picture for of in (given, denoised)}},
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
        caption = f"Noise of {learnt.source} by its signal, as it was measured before training."
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
