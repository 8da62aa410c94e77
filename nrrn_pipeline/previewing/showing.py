"""A preview for people: in a few lines, and on one page that shows each region before, after, and what was removed."""

from __future__ import annotations

from nrrn_pipeline import storage
from nrrn_pipeline.cost import by_text, bytes_text, counted, duration_text
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.filters import filter_text
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.previewing.regions import Preview
from nrrn_pipeline.report.page import DENOISED, INPUT, Column, Report, Row, compared, write_page

NOTES = (
    "What is shown as denoised is what the full run will write there, byte for byte, with the same options on the same "
    "machine.",
    "Noise: its standard deviation, measured in the finest details of the smooth half of each region. A method that "
    "blurs does well on it: see whether edges stay as sharp as they are in the input.",
    "Removed: the input less the denoised. It should look like noise; structure that shows in it was lost.",
)


def write_preview(preview: Preview, page: Location) -> None:
    """One HTML file, complete in itself. Raises InputError if it exists, or cannot be written."""
    storage.check_new_file(page)
    write_page(page, report_of(preview))


def rows_of(preview: Preview) -> dict[str, str]:
    """What was found, a line each: of every region the noise before and after, and what the full run will take."""
    regions = {
        region.name: f"noise {_noise(region.noise_before)} -> {_noise(region.noise_after)} grey levels"
        for region in preview.regions
    }
    return _facts(preview) | regions


def _facts(preview: Preview) -> dict[str, str]:
    forecast, plan = preview.forecast, preview.forecast.plan
    return {
        "source": f"{plan.source.url}, {by_text(plan.source.shape)} {plan.source.dtype}",
        "method": _method(plan),
        **({"precision": preview.precision} if preview.precision else {}),
        "preview": f"{preview.seconds:.1f} s",
        "full run": f"{duration_text(forecast.seconds)} of computing with {counted(forecast.workers, 'worker')}: "
        f"{counted(forecast.cost.slabs, 'slab')}, {bytes_text(forecast.cost.written_bytes)} before compression",
    }


def report_of(preview: Preview) -> Report:
    """What the page shows."""
    regions, plan = preview.regions, preview.forecast.plan
    noise = {INPUT: [each.noise_before for each in regions], DENOISED: [each.noise_after for each in regions]}
    names = [f"{number}: {region.name}" for number, region in enumerate(regions, start=1)]
    columns = [Column(f"noise in region {name.partition(':')[0]}", "levels", "lower") for name in names]
    return Report(
        title=f"Preview of {plan.source.group_url}",
        facts=_facts(preview),
        views={name: compared(region.noisy, region.denoised) for name, region in zip(names, regions, strict=True)},
        columns=columns,
        rows=[
            Row(method, {column.name: value for column, value in zip(columns, values, strict=True)})
            for method, values in noise.items()
        ],
        notes=NOTES,
        folded={"Settings": {name: str(value) for name, value in plan.settings.items()}},
    )


def _method(plan: DenoisePlan) -> str:
    denoiser = plan.denoiser
    if isinstance(denoiser, Weights):
        return f"{denoiser.path}: {denoiser.architecture}"
    return filter_text(denoiser.settings["filter"])


def _noise(sigma: float | None) -> str:
    return "unknown" if sigma is None else f"{sigma:.3g}"
