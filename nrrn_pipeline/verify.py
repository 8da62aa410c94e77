"""Is an output whole? Every slab recorded, every chunk present and decodable."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, boxes_of
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.volume import Volume, missing_chunks, open_volume, read_box


def verify(output: str | os.PathLike[str]) -> Iterator[tuple[int, int, str | None]]:
    """Check one write unit after the other: how many are checked, of how many, and what is wrong, if anything.

    Raises InputError if there is no output of nrrn denoise there.
    """
    url = storage.absolute(output)
    volume = open_volume(url)
    settings = Ledger(volume.url).settings()
    if settings is None:
        raise InputError(f"{url} was not made by nrrn denoise: there is no ledger to verify it against")
    units = tuple(boxes_of(volume.box, volume.write_unit))
    recorded = Ledger(volume.url).done()
    for key in _expected_keys(volume, settings):
        if key not in recorded:
            yield 0, len(units), f"slab {key} has no record: it was not denoised"
    for done, unit in enumerate(units, start=1):
        problems = list(_problems(volume, unit))
        yield done, len(units), "; ".join(problems) or None


def _expected_keys(volume: Volume, settings: dict[str, object]) -> Iterator[str]:
    """The keys of all slabs, which name places in the source."""
    starts = [int(span.split(":")[0]) for span in str(settings["roi"]).split(",")]
    z, y, x = (int(length) for length in settings["slab"])  # type: ignore[attr-defined]
    for keep in boxes_of(volume.box, (z, y, x)):
        origin = [start + span.start for start, span in zip(starts, keep.spans, strict=True)]
        yield f"z{origin[0]}-y{origin[1]}-x{origin[2]}"


def _problems(volume: Volume, unit: Box) -> Iterator[str]:
    try:
        if missing := missing_chunks(volume, unit):
            yield f"voxels {unit}: {len(missing)} chunks were never written, the first at {missing[0]}"
        else:
            read_box(volume, unit)
    except Exception as error:  # a damaged chunk can raise whatever its codec raises
        yield f"voxels {unit}: cannot be decoded ({type(error).__name__}: {str(error).splitlines()[0]})"
