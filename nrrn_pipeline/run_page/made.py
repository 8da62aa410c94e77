"""What an output tells of the run that made it, and the voxels before and after, in the source's coordinates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline.checking import WHOLE, Status, status
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, hull_of, joined
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.places import REQUESTS_AT_ONCE, absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.volume import Volume, count_levels, get_provenance, open_volume, read_box

MOST_RECORDS = 4096  # that are read, evenly out of all of them
METHODS = ("weights sha256", "filter")  # one of these settings makes a run one of denoising


@dataclass(frozen=True)
class Made:
    """A denoised output. `box`: the part of the source that it holds; `part`: what of that is done, and is shown.

    records: of finished slabs, `share` of all of them, without `damaged` ones. statistics: of the source's slices in
    `box`; None if they are lost.
    """

    output: Volume
    source: Volume
    provenance: dict[str, Any]
    settings: dict[str, Any]
    state: Status
    box: Box
    part: Box
    records: tuple[Record, ...]
    share: float
    damaged: int
    statistics: SliceStatistics | None

    @property
    def whole(self) -> bool:
        """Whether all slabs are done."""
        return self.state.state in WHOLE and self.state.done >= self.state.total

    def pair(self, part: Box) -> tuple[NDArray[Any], NDArray[Any]]:
        """(z, y, x) voxels before and after."""
        return read_box(self.source, part), read_box(self.output, part.shifted(self.box))

    def is_blank(self, z: int) -> bool:
        """Whether a slice of the source is constant, as far as is known."""
        known = self.statistics
        return known is not None and known.std[z - known.first_z] == 0


def open_made(output: Location, source: Location | None = None) -> Made:
    """What is at `output`; `source`: where the volume lies now that it was made of, if it was moved.

    Reads metadata, listings, and up to MOST_RECORDS records; no voxels. Raises InputError if there is no denoised
    output, nothing of it is done, or its source is not there.
    """
    volume = open_volume(output)
    provenance = get_provenance(absolute(output))
    if provenance is None or volume.level_path != "0":
        raise InputError(f"{output} was not made by nrrn: give an output of nrrn denoise")
    ledger = Ledger(volume.url)
    slabs, settings = ledger.slabs(), ledger.settings() or {}
    if not any(name in settings for name in METHODS):
        raise InputError(f"{output} was not denoised: a report is of an output of nrrn denoise")
    box = Box.parse(settings["roi"])
    done = [key for key, claims in ledger.done().items() if key in slabs and claims != {-1}]
    part = done_part(slabs, set(done))
    opened = _source_of(provenance, settings, ledger.followed(), output, source)
    read = done[:: -(-len(done) // MOST_RECORDS)]
    records = _records(ledger, read)
    return Made(
        output=volume,
        source=opened,
        provenance=provenance,
        settings=settings,
        state=status(absolute(output)),
        box=box,
        part=part,
        records=records,
        share=len(read) / len(done),
        damaged=len(read) - len(records),
        statistics=_statistics(ledger, box.z),
    )


def done_part(slabs: dict[str, Box], done: set[str]) -> Box:
    """The longest stretch of whole slices that is done, or else one slab. Raises InputError if none is done."""
    layers: dict[Span, bool] = {}
    for key, keep in slabs.items():
        layers[keep.z] = layers.get(keep.z, True) and key in done
    if stretches := joined(z for z, whole in layers.items() if whole):
        whole = hull_of(slabs.values())
        return Box(max(stretches, key=len), whole.y, whole.x)
    if not done:
        raise InputError("no slab is done yet, and there is nothing to report: wait for the first, see nrrn status")
    return max((slabs[key] for key in done), key=lambda keep: keep.size)


def _source_of(
    provenance: dict[str, Any], settings: dict[str, Any], followed: bool, output: Location, source: Location | None
) -> Volume:
    """The volume that the output was made of: a level, if it was one. Raises InputError if it is not there."""
    try:
        where = str(provenance.get("source group", settings["source"])) if source is None else source
        shape, dtype = [int(length) for length in settings["source shape"]], str(settings["dtype"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{output} does not tell what it was made of ({error!r}): its ledger is damaged") from error
    try:
        levels = [open_volume(where, level) for level in range(count_levels(where))]
    except InputError as error:
        hint = "" if source is not None else f"; if it was moved, say where to: nrrn report {output} --source SRC"
        raise InputError(f"the report shows what {output} was made of, but {error}{hint}") from error
    for level in levels:
        grown = followed and level.shape[0] >= shape[0]
        if level.dtype == dtype and list(level.shape[1:]) == shape[1:] and (grown or level.shape[0] == shape[0]):
            return level
    raise InputError(
        f"{levels[0].url} is {levels[0].dtype} of shape {levels[0].shape}, but {output} was made of {dtype} of "
        f"{tuple(shape)}: give that with --source"
    )


def _records(ledger: Ledger, keys: list[str]) -> tuple[Record, ...]:
    """The last record of each slab, but of those whose record is damaged."""

    def read(key: str) -> Record | None:
        with suppress(ValueError):
            return max(ledger.records(key), key=lambda record: record.finished)
        return None

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return tuple(record for record in pool.map(read, keys) if record is not None)


def _statistics(ledger: Ledger, z: Span) -> SliceStatistics | None:
    known = ledger.statistics()
    with suppress(ValueError):  # of fewer slices: they are damaged, or a run broke off
        found = None if known is None else known.of(z)
        if found is not None and np.isfinite([found.mean, found.std]).all():
            return found
    return None
