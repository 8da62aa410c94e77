"""From an output to the page: what is told in words, and which figures are drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.comparing.showing import COLUMNS
from nrrn_pipeline.cost import by_text, bytes_text, counted, duration_text
from nrrn_pipeline.errors import InputError, NrrnError
from nrrn_pipeline.evaluation.odd_slices import BLANK, BRIGHTNESS, CONTRAST, STEP
from nrrn_pipeline.filters import filter_text
from nrrn_pipeline.geometry import Span, joined
from nrrn_pipeline.preparing import Location, describe_weights
from nrrn_pipeline.report import figures
from nrrn_pipeline.report.page import DENOISED, INPUT, REMOVED, Figure, Report, Row, write_page
from nrrn_pipeline.run_page.looks import Looks, look_at
from nrrn_pipeline.run_page.made import Made, open_made
from nrrn_pipeline.run_page.measuring import NOISE, Measured, measure, speeds
from nrrn_pipeline.shipped import SHIPPED, model_card
from nrrn_pipeline.volume import Volume
from nrrn_pipeline.volume.metadata import name_of

SHOWN_COLUMNS = ("noise_sigma", "flat_iqr", "residual_whiteness", "residual_low_frequency_share")
MOST_NAMED = 12  # slices, or slabs, before all else; all are in what is folded
ABOUT = (
    "Noise: its standard deviation in grey levels, from the finest details where a slice is smooth; median of the "
    "slices sampled. Flat IQR: the interquartile range of voxels in the flattest parts, found automatically.",
    "What was removed should look like noise. Whiteness: the strongest autocorrelation of it, 0 for white noise. "
    "Structure: the share of its power at coarse scales, 0.126 for white noise; more says that structure was lost.",
    "Pictures: in xz and yz slices go down, and voxels are repeated until their proportions are true. Of a whole slice "
    "at 1:n each pixel is the mean of n x n voxels.",
)
WRONG = {
    BLANK: "blank, and left as it was",
    BRIGHTNESS: "brighter or darker than the slices around",
    STEP: "the first after a step of brightness",
    CONTRAST: "of other contrast than the slices around",
    NOISE: "of other noise than the slices around, by those sampled",
}
SIGNAL, TAKEN, COURSE = "Noise and signal", "What was removed", "The run"


def check_report(page: Location) -> None:
    """Raises InputError if no report can be made here, or written there; writes nothing."""
    if not find_spec("matplotlib"):
        raise InputError("a report needs matplotlib: pip install nrrn-pipeline[evaluation]")
    storage.check_new_file(page)


def write_report(output: Location, page: Location, source: Location | None = None) -> None:
    """Write one HTML file that shows what a denoising run did, finished or not, and what is wrong with its slices.

    Of a volume of any size it reads a few windows and one whole slice (run_page.looks). `source`: where the volume lies
    now that was denoised, if it was moved.

    Raises InputError if there is no denoised output, nothing of it is done, its source is not there or another one, or
    the page exists or cannot be written.
    """
    check_report(page)
    made = open_made(output, source)
    looks = look_at(made)
    write_page(page, report_of(made, looks, measure(made, looks)))


def report_of(made: Made, looks: Looks, measured: Measured) -> Report:
    """What the page shows."""
    columns = [COLUMNS[name] for name in SHOWN_COLUMNS]
    (before, after), (flat_before, flat_after) = map(_median, measured.sigma), measured.iqr
    values = {
        INPUT: (before, flat_before, None, None),
        DENOISED: (after, flat_after, measured.whiteness, measured.structure),
    }
    rows = [
        Row(name, {column.name: value for column, value in zip(columns, own, strict=True)})
        for name, own in values.items()
    ]
    return Report(
        title=f"{name_of(made.output.group_url)}: {name_of(made.source.group_url)} denoised",
        facts=_facts(made, looks, measured),
        views=looks.views,
        columns=columns,
        rows=rows,
        figures=[*_of_signal(made, looks, measured), *_of_removed(measured), *_of_course(made)],
        notes=ABOUT,
        warnings=_warnings(made, measured),
        folded=_folded(made, measured),
        at_a_glance=True,
    )


def _warnings(made: Made, measured: Measured) -> list[str]:
    found = []
    if not made.whole:
        found.append(
            f"Partial: {made.state.done} of {counted(made.state.total, 'slab')} are done ({made.state.state}). Shown "
            f"is what is whole: {made.part} (z, y, x)."
        )
    for key, reason in list(made.state.failed.items())[:MOST_NAMED]:
        found.append(f"Slab {key} failed: {reason}")
    if (more := len(made.state.failed) - MOST_NAMED) > 0:
        found.append(f"{counted(more, 'slab')} more failed: see below.")
    found += [f"{_slices(slices, MOST_NAMED)}: {WRONG[reason]}." for reason, slices in measured.odd.items()]
    if made.statistics is None:
        found.append("The means of the source's slices are lost: jumps of brightness are not looked for.")
    if made.damaged:
        found.append(f"{counted(made.damaged, 'record')} of finished slabs cannot be read: run nrrn verify.")
    return found


def _slices(slices: Sequence[int], most: int | None = None) -> str:
    """Such as "Slices 3, 7 to 9"; of more stretches than `most`, the first."""
    stretches = joined(Span(z, z + 1) for z in slices)
    named = [f"{each.start}" if len(each) == 1 else f"{each.start} to {each.stop - 1}" for each in stretches[:most]]
    more = f" and more, {len(slices)} in all" if most is not None and len(stretches) > most else ""
    return f"Slice {named[0]}" if len(slices) == 1 else f"Slices {', '.join(named)}{more}"


def _facts(made: Made, looks: Looks, measured: Measured) -> dict[str, str]:
    source, output = made.source, made.output
    size = f", voxels of {by_text(output.voxel_nm)} nm" if output.voxel_nm else ""
    place = "" if made.box == source.box else f"; of that {made.box} (z, y, x), in whose numbers all places are told"
    before, after = map(_median, measured.sigma)
    measurable = np.isfinite([before, after]).all()
    shown = "" if looks.window.shape[1:] == made.part.shape[1:] else f"y {looks.window.y}, x {looks.window.x}: "
    return {
        "state": f"{made.state.state}, {made.state.done} of {counted(made.state.total, 'slab')}",
        "noise": f"{before:.3g} grey levels before, {after:.3g} after" if measurable else "none that can be measured",
        "source": f"{source.group_url}, {by_text(source.shape)} {source.dtype}{place}",
        "output": f"{output.group_url}, {by_text(output.shape)}{size}, {bytes_text(_bytes(output))}",
        "method": _method(made),
        "run": _course(made),
        **({"pictures": f"{shown}where there is most image, and one slice as a whole"} if shown else {}),
    }


def _bytes(volume: Volume) -> int:
    return volume.box.size * volume.itemsize


def _method(made: Made) -> str:
    """Weights with their network, or a filter with its strength."""
    settings = made.settings
    if "filter" in settings:
        return filter_text(dict(settings["filter"]))
    where, digest = str(made.provenance.get("weights")), str(settings.get("weights sha256"))
    with suppress(NrrnError):  # they may be gone by now
        found = describe_weights(where)
        if found.sha256 == digest:
            card = f" (card: nrrn weights card {where})" if where in SHIPPED else ""
            return f"{where}{card}, {found.architecture}, sha256 {digest[:12]}"
    return f"{where}, sha256 {digest[:12]}; they are not there any more, or others are"


def _course(made: Made) -> str:
    """When it ran, how long, how fast."""
    told = f"begun {made.provenance.get('begun', 'unknown')}"
    if made.records:
        begun = min(record.finished - record.seconds for record in made.records)
        took = max(record.finished for record in made.records) - begun
        voxels = sum(record.voxels for record in made.records) / made.share
        workers = len({record.worker for record in made.records})
        told += f", {duration_text(took)} with {counted(workers, 'worker')}"
        if took > 0:
            told += f", {voxels / took / 1e6:.3f} million voxels/s"
    return told


def _of_signal(made: Made, looks: Looks, measured: Measured) -> list[Figure]:
    before, after = looks.slices
    z = ", ".join(map(str, looks.z))
    made_of = [
        Figure(
            figures.histograms({INPUT: before, DENOISED: after}),
            f"How often each grey level is, in the pictures of slices {z}. Less noise makes peaks narrower.",
            SIGNAL,
        )
    ]
    lines = dict(zip((INPUT, DENOISED), ((looks.sampled, each) for each in measured.sigma), strict=True))
    caption = f"Noise along z, of {counted(len(looks.sampled), 'slice')} sampled. It should be low and even after."
    made_of.append(Figure(figures.curves(lines, "noise (grey levels)", "slice"), caption, SIGNAL))
    if all(each.size for each in measured.flat):
        flat = dict(zip((INPUT, DENOISED), measured.flat, strict=True))
        caption = "Voxels in the flattest parts, less the median of their part: their spread is noise."
        made_of.append(Figure(figures.box_plots(flat, "deviation", "grey levels"), caption, SIGNAL))
    if made.statistics is not None:
        mean = np.where(np.array(made.statistics.std) > 0, made.statistics.mean, np.nan)  # or a 0 sets the scale
        odd = sorted({z for slices in measured.odd.values() for z in slices})
        at = np.array(odd, int) - made.box.z.start
        slices = np.arange(made.box.z.start, made.box.z.stop)
        drawn = figures.curves({INPUT: (slices, mean)}, "mean grey level", "slice", (odd, mean[at]), from_zero=False)
        caption = "Mean of each slice of the input; blank ones are gaps, others that look wrong circled."
        made_of.append(Figure(drawn, caption, SIGNAL))
    return made_of


def _of_removed(measured: Measured) -> list[Figure]:
    drawn = figures.curves({REMOVED: measured.spectrum}, "power (mean 1)", "frequency (cycles a voxel)", level=1.0)
    about = (
        "Spectrum of what was removed; dashed: white noise. More on the left is structure that was lost, less is noise "
        "that was left."
    )
    also = "Autocorrelation of what was removed. White noise has a point in the middle, and no more."
    correlation = figures.residual_autocorrelation({REMOVED: measured.correlation})
    return [Figure(drawn, about, TAKEN), Figure(correlation, also, TAKEN)]


def _of_course(made: Made) -> list[Figure]:
    if not made.records:
        return []
    seconds, speed = speeds(made.records, made.share)
    units = ((length, unit) for length, unit in ((3600, "hours"), (60, "minutes")) if seconds[-1] > 3 * length)
    length, unit = next(units, (1, "s"))
    drawn = figures.curves({DENOISED: (seconds / length, speed / 1e6)}, "million voxels/s", f"time ({unit})")
    return [Figure(drawn, "Speed over time, of all workers together, from the records of finished slabs.", COURSE)]


def _folded(made: Made, measured: Measured) -> dict[str, dict[str, str]]:
    found = {}
    if measured.odd:
        found["Slices that look wrong"] = {reason: _slices(slices) for reason, slices in measured.odd.items()}
    if made.state.failed:
        found["Slabs that failed"] = dict(made.state.failed)
    told = {name: _text(value) for name, value in made.provenance.items() if name != "settings"}
    found["Settings and provenance"] = {name: _text(value) for name, value in made.settings.items()} | told
    found["Settings and provenance"]["reported"] = datetime.now(UTC).isoformat(timespec="seconds")
    if (weights := made.provenance.get("weights")) in SHIPPED:
        found[f"Model card of {weights}"] = {"card": model_card(str(weights))}
    return found


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _median(sigma: NDArray[np.float64]) -> float:
    """Of what could be measured; NaN if nothing could."""
    there = sigma[np.isfinite(sigma)]
    return float(np.median(there)) if there.size else float("nan")
