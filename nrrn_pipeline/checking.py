"""Is an output whole? Every slab recorded, every chunk present and decodable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import slab_key
from nrrn_pipeline.volume import Volume, missing_chunks, open_volume, read_box


@dataclass(frozen=True)
class Checked:
    """How many write units are checked, of how many, and what is wrong with the last one, if anything."""

    done: int
    total: int
    problem: str | None = None


def check(output: str | os.PathLike[str]) -> Iterator[Checked]:
    """Check the ledger, then one write unit after the other.

    Raises InputError if there is no output of nrrn denoise there.
    """
    url = storage.absolute(output)
    volume = open_volume(url)
    ledger = Ledger(volume.url)
    settings = ledger.settings()
    if settings is None:
        raise InputError(f"{url} was not made by nrrn denoise: there is no ledger to verify it against")
    units = tuple(boxes_of(volume.box, volume.write_unit))
    recorded = ledger.done()
    for key in _slab_keys(volume, settings):
        if key not in recorded:
            yield Checked(0, len(units), f"slab {key} has no record: it was not denoised")
    for done, unit in enumerate(units, start=1):
        yield Checked(done, len(units), _problem(volume, unit))


def _slab_keys(volume: Volume, settings: dict[str, Any]) -> Iterator[str]:
    """The keys of all slabs; they name places in the source."""
    roi = Box.parse(settings["roi"])
    z, y, x = settings["slab"]
    for keep in boxes_of(volume.box, (z, y, x)):
        spans = zip(roi.spans, keep.spans, strict=True)
        yield slab_key(Box(*(Span(outer.start + own.start, outer.start + own.stop) for outer, own in spans)))


def _problem(volume: Volume, unit: Box) -> str | None:
    try:
        if missing := missing_chunks(volume, unit):
            return f"voxels {unit}: {len(missing)} chunks were never written, the first at {missing[0]}"
        read_box(volume, unit)
    except Exception as error:  # a damaged chunk can raise whatever its codec raises
        return f"voxels {unit}: cannot be decoded ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None
