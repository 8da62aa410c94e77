"""Is an output whole? Every slab recorded, every chunk present and decodable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, boxes_of
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
    try:
        problems = [*_differences(volume, settings), *_without_record(settings, {r.key for r in ledger.records()})]
    except (LookupError, ValueError, TypeError) as error:
        raise InputError(f"{ledger.url}/plan.json is damaged ({type(error).__name__}: {error})") from error
    units = tuple(boxes_of(volume.box, volume.write_unit))
    for problem in problems:
        yield Checked(0, len(units), problem)
    for done, unit in enumerate(units, start=1):
        yield Checked(done, len(units), _problem(volume, unit))


def _differences(volume: Volume, settings: dict[str, Any]) -> Iterator[str]:
    """What the array's metadata say otherwise than the settings that it was begun with."""
    facts = {
        "shape": (list(volume.shape), list(Box.parse(settings["roi"]).shape)),
        "dtype": (volume.dtype, settings["dtype"]),
        "chunk": (list(volume.chunk), settings["chunk"]),
        "shard": (list(volume.write_unit), settings["shard"]),
    }
    for name, (found, begun) in facts.items():
        if found != begun:
            yield f"{name} of the array is {found}, but it was begun with {begun}: its metadata were changed"


def _without_record(settings: dict[str, Any], recorded: set[str]) -> Iterator[str]:
    z, y, x = settings["slab"]
    for keep in boxes_of(Box.parse(settings["roi"]), (z, y, x)):
        if slab_key(keep) not in recorded:
            yield f"slab {slab_key(keep)} has no record: it was not denoised"


def _problem(volume: Volume, unit: Box) -> str | None:
    try:
        if missing := missing_chunks(volume, unit):
            return f"voxels {unit}: {len(missing)} chunks were never written, the first at {missing[0]}"
        read_box(volume, unit)
    except Exception as error:  # a damaged chunk can raise whatever its codec raises
        return f"voxels {unit}: cannot be decoded ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None
