"""What a report tells in numbers: noise and its spectrum, flat parts, slices that look wrong, speed over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.evaluation.flat import flat_deviations, flat_windows
from nrrn_pipeline.evaluation.odd_slices import BLANK, CONTRAST, odd_slices
from nrrn_pipeline.evaluation.signal import interquartile_range
from nrrn_pipeline.evaluation.without_reference import (
    autocorrelation,
    low_frequency_share,
    radial_spectrum,
    whiteness,
)
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.noise_details import LEAST_SIDE, slice_sigma
from nrrn_pipeline.run_page.looks import Looks
from nrrn_pipeline.run_page.made import Made
from nrrn_pipeline.volume_noise import outliers

NOISE = "noise"  # what is wrong with slices of those sampled
MOMENTS = 60  # at which speed is told

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What was found; each pair is before and after.

    sigma: of the sampled slices' noise, grey levels. flat: (n,) deviations in flat windows. iqr: of these, None if
    there are none. spectrum: frequencies and power of what was removed. odd: what is wrong -> slices (z).
    """

    sigma: tuple[Floats, Floats]
    flat: tuple[Floats, Floats]
    iqr: tuple[float | None, float | None]
    correlation: Floats
    whiteness: float
    structure: float
    spectrum: tuple[Floats, Floats]
    odd: dict[str, list[int]]


def measure(made: Made, looks: Looks) -> Measured:
    """Raises InputError for slices that are too small to be measured."""
    if min(looks.window.shape[1:]) < LEAST_SIDE:
        raise InputError(
            f"what {made.output.group_url} has is of {made.part.shape[1:]} voxels in y and x: a report needs "
            f"{LEAST_SIDE} x {LEAST_SIDE}"
        )
    before, after = looks.slices
    residual = np.subtract(before, after, dtype=np.float64)
    correlation = autocorrelation(residual)
    windows = [flat_windows(plane) for plane in before]
    flat = flat_deviations(before, windows), flat_deviations(after, windows)
    first, second = looks.samples
    sigma = _sigmas(first), _sigmas(second)
    iqr = tuple(interquartile_range(each) if each.size else None for each in flat)
    return Measured(
        sigma=sigma,
        flat=flat,
        iqr=(iqr[0], iqr[1]),
        correlation=correlation,
        whiteness=whiteness(correlation),
        structure=low_frequency_share(residual),
        spectrum=radial_spectrum(residual),
        odd=_odd(made, looks, sigma[0]),
    )


def speeds(records: Sequence[Record], share: float) -> tuple[Floats, Floats]:
    """(n,) seconds since the first slab began, and voxels a second around then, of all slabs at work together.

    A slab's voxels are spread evenly over its time. `share`: of all slabs, that the records are of.
    """
    stops = np.array([record.finished for record in records])
    took = np.array([max(record.seconds, 1e-3) for record in records])
    voxels = np.array([record.voxels for record in records], float)
    starts = stops - took
    edges = np.linspace(starts.min(), stops.max(), MOMENTS + 1)
    done = [float((np.clip((edge - starts) / took, 0, 1) * voxels).sum()) / share for edge in edges]
    return (edges[:-1] + edges[1:]) / 2 - edges[0], np.diff(done) / np.diff(edges)


def _sigmas(planes: NDArray[np.generic]) -> Floats:
    """(z,) standard deviation of each slice's noise; NaN where nothing can be measured."""
    found = np.array([slice_sigma(plane) for plane in planes])
    return np.where(found > 0, found, np.nan)


def _odd(made: Made, looks: Looks, sigma: Floats) -> dict[str, list[int]]:
    """By the statistics of every slice, if they are known, and the noise of those sampled."""
    found: dict[str, list[int]] = {}
    if made.statistics is not None:
        named = odd_slices(made.statistics.mean, made.statistics.std)
        found = {reason: [made.box.z.start + z for z in slices] for reason, slices in named.items()}
    else:
        first, _ = looks.samples
        blank = [z for z, plane in zip(looks.sampled, first, strict=True) if np.ptp(plane) == 0]
        found = {BLANK: blank} if blank else {}
    noisy = [looks.sampled[at] for at in outliers(np.nan_to_num(sigma).tolist())]
    noisy = [z for z in noisy if z not in found.get(CONTRAST, ())]  # of which noise is the cause
    return found | ({NOISE: noisy} if noisy else {})
