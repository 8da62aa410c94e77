"""Is an output whole? By listing alone, or by reading every byte; and how far is a run, from its ledger alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.geometry import Box, boxes_of
from nrrn_pipeline.lease import last_driver, members
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.places import absolute
from nrrn_pipeline.presence import LEASE_S, has_ended
from nrrn_pipeline.volume import Volume, count_levels, get_provenance, object_key, open_volume, stored_units

GROWTH_BROKE_OFF = "its run was interrupted as it began to grow: run the same nrrn denoise again"
WHOLE = ("complete", "growing")  # states of an output all of whose slabs are done


@dataclass(frozen=True)
class Checked:
    """How many slabs are checked, of how many, and what is wrong with the last one, if anything.

    A problem without a `slab` is of the output as a whole, and cannot be mended by denoising a slab again. `level`: of
    the output, that the slab is part of.
    """

    done: int
    total: int
    problem: str | None = None
    slab: str | None = None
    level: int = 0


@dataclass(frozen=True)
class Status:
    """How far a run is. `state` in words; rate in voxels a second; `seconds_left` is None where nothing is known.

    levels: of lower resolution, their slabs that are done, and all, by their numbers.
    """

    state: str
    done: int
    total: int
    failed: dict[str, str] = field(default_factory=dict)
    rate: float | None = None
    seconds_left: float | None = None
    levels: dict[int, tuple[int, int]] = field(default_factory=dict)


def check(output: str | os.PathLike[str], deep: bool = False) -> Iterator[Checked]:
    """Check every slab of every level: recorded, its objects there in the sizes recorded; `deep`: as it was written.

    Raises InputError if there is no output of ours there.
    """
    yield from _check(open_volume(output), deep)
    for level in range(1, count_levels(output)):
        try:
            volume = open_volume(output, level)
            if Ledger(volume.url).begun():  # else another program made it
                for checked in _check(volume, deep):
                    problem = f"level {level}: {checked.problem}" if checked.problem else None
                    yield replace(checked, problem=problem, level=level)
        except InputError as error:
            yield Checked(0, 0, f"level {level}: {error}", level=level)


def _check(volume: Volume, deep: bool) -> Iterator[Checked]:
    ledger = Ledger(volume.url)
    slabs, settings = ledger.slabs(), ledger.settings() or {}
    for problem in _differences(volume, settings, ledger.followed()):
        yield Checked(0, len(slabs), problem)
    recorded = ledger.done()
    origin = Box.parse(settings["roi"])
    units = {key: set(boxes_of(keep.shifted(origin), volume.write_unit)) for key, keep in slabs.items()}
    torn = ledger.torn(recorded, units.items(), stored_units(volume))
    for done, key in enumerate(slabs, start=1):
        if key not in recorded:
            problems = [f"slab {key} has no record: it is not done"]
        elif key in torn:
            problems = [f"slab {key}: {torn[key]}"]
        else:
            problems = list(_damage(volume, ledger, key, units[key])) if deep else []
        for problem in problems:
            yield Checked(done, len(slabs), problem, key)
        if not problems:
            yield Checked(done, len(slabs))


def status(output: str | os.PathLike[str]) -> Status:
    """How far the run on an output is, wherever it is driven from; reads the ledger and the group's attributes.

    Raises InputError if there is no ledger.
    """
    url = absolute(output)
    ledger = Ledger(f"{url}/0")
    if not ledger.begun():
        raise InputError(f"{url} has no ledger yet: a run writes it once the slices' statistics are measured")
    done, total = _done_of(ledger)
    sharing = [one for one in members(ledger.url).values() if not has_ended(one) and _silent_s(one) < LEASE_S]
    driver = last_driver(ledger.url) or {}
    slabs_rate, voxels_rate = (sum(_rate(one, name) for one in sharing or [driver]) for name in ("slabs", "voxels"))
    running = bool(sharing) or not has_ended(driver)
    if sharing:
        state = f"running: shared, {len(sharing)} at work"
    else:
        state = (_whole(driver, url) if done >= total and not running else "") or _state(driver, running)
    return Status(
        state=state,
        done=done,
        total=total,
        failed={key: ledger.failure(key)[0] for key in sorted(ledger.failed())},
        rate=voxels_rate or None,
        seconds_left=(total - done) / slabs_rate if running and slabs_rate else None,
        levels={number: _done_of(level) for number, level in _levels(url)},
    )


def _done_of(ledger: Ledger) -> tuple[int, int]:
    """Slabs that are done, and all."""
    slabs = ledger.slabs()
    return sum(key in slabs and claims != {-1} for key, claims in ledger.done().items()), len(slabs)


def _levels(url: str) -> Iterator[tuple[int, Ledger]]:
    """Those of ours that are begun."""
    for number in count(1):
        level = Ledger(f"{url}/{number}")
        if not level.begun():
            return
        yield number, level


def _whole(driver: dict[str, Any], url: str) -> str:
    """What the output itself, or its last driver, says of it: complete, growing or nothing."""
    said = ""
    with suppress(InputError):  # no Zarr yet
        said = str((get_provenance(url) or {}).get("state"))
    said = said if said in WHOLE else str(driver.get("state"))
    return said if said in WHOLE else ""


def _rate(process: dict[str, Any], name: str) -> float:
    """Of a process's facts, a second."""
    seconds = _number(process.get("seconds"))
    return _number(process.get(name)) / seconds if seconds else 0.0


def _silent_s(process: dict[str, Any]) -> float:
    return time.time() - _number(process.get("renewed"))


def _state(driver: dict[str, Any], running: bool) -> str:
    who = f"process {driver.get('pid')} on {driver.get('host')}"
    if not running:
        ended = {"running": "was killed", "failed": "failed", "complete": "ended"}.get(str(driver.get("state")))
        return f"stopped: {who} {ended or 'was interrupted'}" if driver else "stopped"
    silent_s = _silent_s(driver)
    if silent_s > LEASE_S:  # or the two machines' clocks differ
        return f"no sign of life from {who} for {silent_s:.0f} s"
    return f"running: {who}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 2**60 else 0.0


def _differences(volume: Volume, settings: dict[str, Any], followed: bool) -> Iterator[str]:
    """What the array's metadata say otherwise than the settings that it was begun with."""
    begun_shape = Box.parse(settings["roi"]).shape
    if followed and volume.shape[0] < begun_shape[0] and volume.shape[1:] == begun_shape[1:]:
        yield GROWTH_BROKE_OFF
        return
    facts = {
        "shape": (list(volume.shape), list(begun_shape)),
        "dtype": (volume.dtype, settings.get("dtype")),
        "chunk": (list(volume.chunk), settings.get("chunk")),
        "shard": (list(volume.write_unit), settings.get("shard")),
    }
    for name, (found, begun) in facts.items():
        if found != begun:
            yield f"{name} of the array is {found}, but it was begun with {begun}: its metadata were changed"


def _damage(volume: Volume, ledger: Ledger, key: str, units: set[Box]) -> Iterator[str]:
    """What of a slab does not read as it was written."""
    try:
        records = ledger.records(key)
        for unit in sorted(units):
            name = object_key(volume, unit)
            written = {record.objects[name][1] for record in records if name in record.objects}
            if not any(_read_digest(f"{volume.url}/{name}") in written for _ in range(2)):  # damaged on its way, maybe
                yield f"slab {key}: {name}, voxels {unit}, is not what was written"
    except ValueError as error:
        yield str(error)
    except StorageError as error:
        if error.permanent:
            raise
        yield f"slab {key}: cannot be read ({error})"


def _read_digest(url: str) -> str | None:
    data = storage.read_file(url)
    return None if data is None else storage.digest(data)
