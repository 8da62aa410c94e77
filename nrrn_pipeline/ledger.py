"""Which slabs of an output are done, under which settings: one small file a slab, beside the array's chunks.

    DST/0/nrrn/plan.json                 the settings that all of its voxels were made with
    DST/0/nrrn/statistics.json           each slice's mean and std, measured once
    DST/0/nrrn/own_statistics.json       those of the array itself, where what made it knows them
    DST/0/nrrn/slabs/KEY.*.json          written by the worker after the slab's last voxel
    DST/0/nrrn/failed/KEY.json           a slab that was set aside, and why
    DST/0/nrrn/drivers/                  who is at work (lease.py), alone
    DST/0/nrrn/members/, claims/         or sharing the work (members.py)
    DST/0/nrrn/measured/KEY.json         slices' mean and std in one box, until all are measured

Chunk presence says nothing: only a record says "done". Its name, KEY.STORED.LENGTH.json, holds the bytes that the
slab's voxels take in storage and its own length: one listing of records and one of chunks tell what is done, and
whether any of it was cut short. Every file carries its own checksum.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span, boxes_of
from nrrn_pipeline.places import REQUESTS_AT_ONCE
from nrrn_pipeline.slabs import MAX_SLABS, Plan, Slab, slab_key
from nrrn_pipeline.statistics import MeasuredBox, SliceStatistics, document_of, measured_box

LONGEST = 200  # characters of a setting in a message


@dataclass(frozen=True)
class Record:
    """One finished slab. `peak_memory_bytes` is its worker process's so far; `finished` is seconds since 1970.

    `objects`: each stored object's key below the array -> its bytes and their digest (storage.digest). `spent`: seconds
    by stage. `arithmetic`: the network's precision, for people.
    """

    key: str
    voxels: int
    seconds: float
    finished: float
    worker: str
    peak_memory_bytes: int
    objects: dict[str, tuple[int, str]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    arithmetic: str = ""

    @property
    def stored_bytes(self) -> int:
        """What its voxels take in storage."""
        return sum(size for size, _ in self.objects.values())


@dataclass(frozen=True)
class Ledger:
    """The ledger of one array."""

    array_url: str

    @property
    def url(self) -> str:
        """Its folder."""
        return f"{self.array_url}/nrrn"

    def begin(self, plan: Plan) -> None:
        """Claim the output for a plan, or go on with what a run with the same settings began.

        Raises InputError if another run was faster, with other settings.
        """
        if storage.write_document(f"{self.url}/plan.json", _document_of(plan), new=True):
            return
        if self.grows(plan):
            if (kept := self.statistics_for(plan)) is None:
                storage.remove_file(f"{self.url}/statistics.json")
            else:
                self.put_statistics(kept)
            self.forget_all({slab.key for slab in self.outgrown(plan)})
            self.mend(plan)
        self.refuse_others(plan)

    def mend(self, plan: Plan) -> None:
        """Write settings again that are damaged, or outgrown."""
        storage.write_document(
            f"{self.url}/plan.json", _document_of(plan) | ({"followed": True} if self.followed() else {})
        )

    def refuse_others(self, plan: Plan) -> None:
        """Raises InputError, naming what differs, if the output is gone or was begun with other settings."""
        settings = self.settings()
        if settings is None:
            raise InputError(f"{plan.group_url} was deleted or moved under the run")
        if changes := _changes(settings, plan):
            raise InputError(
                f"{plan.group_url} was begun with other settings: {'; '.join(changes)}. Give the old settings to "
                "resume it, another output, or --overwrite to start again"
            )

    def grows(self, plan: Plan) -> bool:
        """Whether the plan's settings are those that it was begun with but for more slices, as was to be expected."""
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # damaged, or no ledger
            document = self._plan_document() or {}
            old = document["settings"]
            if not (plan.growing or document["growing"]) or not _keys_changed(old, plan) <= {"roi", "source shape"}:
                return False
            new = plan.settings
            then, now = Box.parse(old["roi"]), Box.parse(new["roi"])
            alike = (then.z.start, then.y, then.x, *old["source shape"][1:]) == (
                *(now.z.start, now.y, now.x),
                *new["source shape"][1:],
            )
            return alike and then.z.stop <= now.z.stop and old["source shape"][0] <= new["source shape"][0]
        return False

    def growing(self) -> bool:
        """Whether more slices were to come."""
        return self._says("growing")

    def followed(self) -> bool:
        """Whether it ever grew, so that its slabs were cut when its source was not whole."""
        return self._says("followed", "growing")

    def _says(self, *names: str) -> bool:
        with suppress(ValueError):
            document = self._plan_document() or {}
            return any(document.get(name) for name in names)
        return False

    def outgrown(self, plan: Plan) -> list[Slab]:
        """Slabs that a plan that grows must do again: the last ones, but of a run that knew that more would come."""
        last = Box.parse((self.settings() or {})["roi"]).z.stop
        begin, depth = Box.parse(plan.settings["roi"]).z.start, plan.settings["slab"][0]
        whole = (last - begin) % depth == 0
        ends = [slab for slab in plan.slabs if slab.keep.z.start < last <= slab.keep.z.stop]
        return [] if whole and self.growing() else ends

    def statistics_for(self, plan: Plan) -> SliceStatistics | None:
        """The kept statistics that hold for a plan: of slabs that are outgrown, slices may not have been whole."""
        kept = self.statistics()
        if kept is None or not self.grows(plan) or not (again := self.outgrown(plan)):
            return kept
        start = min(slab.keep.z.start for slab in again)
        return kept.of(Span(kept.z.start, start)) if start > kept.z.start else None

    def surely_there(self) -> int:
        """Slices of the source that a run has denoised, or knew to be there while more were to come; 0 if not begun."""
        settings = self.settings()
        if settings is None:
            return 0
        return int(settings["source shape"][0]) if self.growing() else Box.parse(settings["roi"]).z.stop

    def denoised_up_to(self) -> int:
        """Where the slices end that it was begun for; 0 if it is not begun."""
        settings = self.settings()
        return 0 if settings is None else Box.parse(settings["roi"]).z.stop

    def begun(self) -> bool:
        """Whether a plan has claimed the output."""
        return storage.read_file(f"{self.url}/plan.json") is not None

    def settings(self) -> dict[str, Any] | None:
        """The settings it was begun with; None if there is no ledger."""
        try:
            document = self._plan_document()
            return None if document is None else dict(document["settings"])
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.url}/plan.json is damaged ({error}): start again with --overwrite") from error

    def _plan_document(self) -> dict[str, Any] | None:
        return storage.read_document(f"{self.url}/plan.json")

    def slabs(self) -> dict[str, Box]:
        """The key of every slab of the settings that it was begun with, and the part of the output that it writes.

        Raises InputError if there is no ledger, or it is damaged.
        """
        settings = self.settings()
        try:
            if settings is None:
                raise InputError(f"{self.array_url} was not made by nrrn: it has no ledger")
            whole = Box.parse(settings["roi"])
            z, y, x = (int(size) for size in settings["slab"])
            if min(z, y, x) < 1 or min(whole.shape) < 1:
                raise ValueError(f"slabs of {z},{y},{x} of {whole}")
            if prod(-(-length // size) for length, size in zip(whole.shape, (z, y, x), strict=True)) > MAX_SLABS:
                raise ValueError(f"countless slabs of {z},{y},{x} of {whole}")
            return {slab_key(keep): keep for keep in boxes_of(whole, (z, y, x))}
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{self.url}/plan.json is damaged ({type(error).__name__}: {error})") from error

    def keys_changed(self, plan: Plan) -> set[str]:
        """Names of the settings that differ. Raises InputError if those that it was begun with are damaged."""
        return _keys_changed(self.settings() or {}, plan)

    def changes(self, plan: Plan) -> list[str]:
        """What differs between the settings that it was begun with and the plan's, a line each."""
        return _changes(self.settings() or {}, plan)

    def put(self, record: Record) -> None:
        """Record a finished slab."""
        data = storage.sealed(asdict(record))
        storage.write_file(f"{self.url}/slabs/{record.key}.{record.stored_bytes}.{len(data)}.json", data)

    def done(self) -> dict[str, set[int]]:
        """Keys of all recorded slabs, with the bytes of voxels that they claim (-1: a record cut short); a listing."""
        found: dict[str, set[int]] = {}
        for name, size in storage.list_sizes(f"{self.url}/slabs").items():
            key, *claims = name.removesuffix(".json").split(".")
            numbers = [int(claim) for claim in claims if claim.isdecimal() and len(claim) < 20]
            found.setdefault(key, set()).add(numbers[0] if len(numbers) == 2 and numbers[1] == size else -1)
        return found

    @staticmethod
    def torn(
        done: dict[str, set[int]], units: Iterable[tuple[str, set[Box]]], stored: dict[Box, int]
    ) -> dict[str, str]:
        """Slabs that are recorded but not as storage lists them, each with what is wrong.

        `done`: what done() gave. `units`: each slab's key and write units. `stored`: those that storage lists, with
        their bytes; to be listed after `done`, as others may be at work, and voxels are there before their record.
        """
        wrong = {}
        for key, own in units:
            if (claims := done.get(key)) is None:
                continue
            if missing := [unit for unit in own if unit not in stored]:
                wrong[key] = f"{len(missing)} of its shards are gone"
            elif (found := sum(stored[unit] for unit in own)) not in claims:
                damage = f"its shards have {found} bytes, not the {max(claims)} that were written"
                wrong[key] = "its record is cut short" if max(claims) < 0 else damage
        return wrong

    def forget(self, key: str) -> None:
        """Delete all records of a slab, so that it is denoised again."""
        for name in storage.list_sizes(f"{self.url}/slabs", beginning=f"{key}."):
            storage.remove_file(f"{self.url}/slabs/{name}")

    def forget_all(self, keys: Set[str]) -> None:
        """The same for many slabs, by one listing."""
        for name in storage.list_sizes(f"{self.url}/slabs"):
            if name.partition(".")[0] in keys:
                storage.remove_file(f"{self.url}/slabs/{name}")

    def records(self, key: str) -> list[Record]:
        """A slab's records, more than one if it was denoised twice. Raises ValueError if one is damaged, or none."""
        found = []
        for name in storage.list_sizes(f"{self.url}/slabs", beginning=f"{key}."):
            try:
                document = storage.read_document(f"{self.url}/slabs/{name}") or {}
                objects = {str(name): (int(size), str(crc)) for name, (size, crc) in document.pop("objects").items()}
                found.append(Record(**document, objects=objects))
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise ValueError(f"the record of slab {key} is damaged: {error}") from error
        if not found:
            raise ValueError(f"slab {key} has no record")
        return found

    def is_done(self, key: str) -> bool:
        """Whether one slab is recorded."""
        return bool(storage.list_sizes(f"{self.url}/slabs", beginning=f"{key}."))

    def put_failure(self, key: str, reason: str, by: str = "") -> None:
        """Note that a slab was set aside, and by which process."""
        storage.write_document(f"{self.url}/failed/{key}.json", {"key": key, "reason": reason, "by": by})

    def clear_failure(self, key: str) -> None:
        """It was denoised after all."""
        storage.remove_file(f"{self.url}/failed/{key}.json")

    def failed(self) -> set[str]:
        """Keys of the slabs that were set aside, by listing alone."""
        return {name.removesuffix(".json") for name in storage.list_sizes(f"{self.url}/failed")}

    def failure(self, key: str) -> tuple[str, str]:
        """Why a slab was set aside, and by which process."""
        try:
            document = storage.read_document(f"{self.url}/failed/{key}.json") or {}
        except ValueError as error:
            return str(error), ""
        return str(document.get("reason", "unknown")), str(document.get("by", ""))

    def put_measured(self, part: MeasuredBox) -> None:
        """Keep what was measured in one box, until all are and put_statistics keeps the whole."""
        storage.write_document(f"{self.url}/measured/{box_key(part[0])}.json", document_of(part))

    def measured(self) -> set[str]:
        """Keys (box_key) of the boxes that put_measured kept; a listing."""
        return {name.removesuffix(".json") for name in storage.list_sizes(f"{self.url}/measured")}

    def is_measured(self, key: str) -> bool:
        """Whether put_measured kept one box."""
        return bool(storage.list_sizes(f"{self.url}/measured", beginning=f"{key}."))

    def read_measured(self, keys: Iterable[str]) -> list[MeasuredBox]:
        """What put_measured kept of some boxes.

        Raises ValueError for what is not there, or is damaged, which is deleted: it can be done again.
        """

        def read(key: str) -> MeasuredBox:
            url = f"{self.url}/measured/{key}.json"
            try:
                return measured_box(storage.read_document(url) or {})
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
                storage.remove_file(url)
                raise ValueError(f"{url} is damaged") from error

        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(read, keys))

    def forget_measured(self) -> None:
        """Delete what put_measured kept."""
        storage.remove_tree(f"{self.url}/measured")

    def put_statistics(self, statistics: SliceStatistics) -> None:
        """Keep the source's statistics for every later run."""
        storage.write_document(f"{self.url}/statistics.json", asdict(statistics))

    def statistics(self) -> SliceStatistics | None:
        """What put_statistics kept; None if that is missing or damaged: they can be measured again."""
        return _read_statistics(f"{self.url}/statistics.json")

    def put_own_statistics(self, statistics: SliceStatistics) -> None:
        """Keep the statistics of the array itself, for whoever denoises it."""
        storage.write_document(f"{self.url}/own_statistics.json", asdict(statistics))

    def forget_own_statistics(self) -> None:
        """They hold no more."""
        storage.remove_file(f"{self.url}/own_statistics.json")

    def own_statistics(self) -> SliceStatistics | None:
        """What put_own_statistics kept; None if that is missing or damaged."""
        return _read_statistics(f"{self.url}/own_statistics.json")


def box_key(box: Box) -> str:
    """What the ledger calls a box of measured slices; of a volume that grows, a box may end sooner at first."""
    return f"{slab_key(box)}-to-z{box.z.stop}"


def _read_statistics(url: str) -> SliceStatistics | None:
    with suppress(ValueError, LookupError, TypeError, OverflowError):
        document = storage.read_document(url)
        return None if document is None else SliceStatistics.from_dict(document)
    return None


def _document_of(plan: Plan) -> dict[str, Any]:
    return {"fingerprint": plan.fingerprint, "settings": plan.settings, "growing": plan.growing}


def _changes(old: dict[str, Any], plan: Plan) -> list[str]:
    changed = _keys_changed(old, plan)
    keys = [key for key in {**old, **plan.settings} if key in changed]
    return [f"{key} was {_short(old.get(key))}, now {_short(plan.settings.get(key))}" for key in keys]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _keys_changed(old: dict[str, Any], plan: Plan) -> set[str]:
    new = json.loads(json.dumps(plan.settings))
    return {key for key in {**old, **new} if old.get(key) != new.get(key)}
