"""Which slabs of an output are done, under which settings: one small file a slab, beside the array's chunks.

    DST/0/nrrn/plan.json           the settings that all of its voxels were made with
    DST/0/nrrn/statistics.json     each slice's mean and std, measured once
    DST/0/nrrn/slabs/KEY.json      written by the worker after the slab's last voxel

Chunk presence says nothing: only a record says "done".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.statistics import SliceStatistics


@dataclass(frozen=True)
class Record:
    """One finished slab. `peak_memory_bytes` is its worker process's so far; `finished` is seconds since 1970."""

    key: str
    voxels: int
    seconds: float
    finished: float
    worker: str
    peak_memory_bytes: int


@dataclass(frozen=True)
class Ledger:
    """The ledger of one array."""

    array_url: str

    @property
    def url(self) -> str:
        """Its folder."""
        return f"{self.array_url}/nrrn"

    def begin(self, plan: DenoisePlan) -> None:
        """Claim the output for a plan, or go on with what a run with the same settings began.

        Raises InputError if another run was faster, with other settings.
        """
        text = json.dumps({"fingerprint": plan.fingerprint, "settings": plan.settings}, indent=1)
        if not storage.write_new_file(f"{self.url}/plan.json", text.encode()):
            self.refuse_others(plan)

    def refuse_others(self, plan: DenoisePlan) -> None:
        """Raises InputError, naming what differs, if the output is gone or was begun with other settings."""
        if self.settings() is None:
            raise InputError(f"{plan.group_url} was deleted or moved under the run")
        if changes := self.changes(plan):
            raise InputError(
                f"{plan.group_url} was begun with other settings: {'; '.join(changes)}. Give the old settings to "
                "resume it, another output, or --overwrite to start again"
            )

    def begun(self) -> bool:
        """Whether a plan has claimed the output."""
        return storage.exists(f"{self.url}/plan.json")

    def settings(self) -> dict[str, Any] | None:
        """The settings it was begun with; None if there is no ledger."""
        data = storage.read_file(f"{self.url}/plan.json")
        if data is None:
            return None
        try:
            return dict(json.loads(data)["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.url}/plan.json is damaged ({error}): start again with --overwrite") from error

    def changes(self, plan: DenoisePlan) -> list[str]:
        """What differs between the settings that it was begun with and the plan's, a line each."""
        old, new = self.settings() or {}, plan.settings
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return [f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys]

    def put(self, record: Record) -> None:
        """Record a finished slab."""
        storage.write_file(f"{self.url}/slabs/{record.key}.json", json.dumps(asdict(record)).encode())

    def done(self) -> set[str]:
        """Keys of all finished slabs, by listing alone."""
        return {name.removesuffix(".json") for name in storage.list_files(f"{self.url}/slabs")}

    def records(self) -> Iterator[Record]:
        """All records that can be read, one by one; one that a power failure emptied is none."""
        for key in sorted(self.done()):
            data = storage.read_file(f"{self.url}/slabs/{key}.json")
            with suppress(ValueError, TypeError):
                yield Record(**json.loads(data or b""))

    def put_statistics(self, statistics: SliceStatistics) -> None:
        """Keep the measured statistics for every later run."""
        storage.write_file(f"{self.url}/statistics.json", statistics.to_json())

    def statistics(self) -> SliceStatistics | None:
        """What put_statistics kept."""
        data = storage.read_file(f"{self.url}/statistics.json")
        if data is None:
            return None
        try:
            return SliceStatistics.from_json(data)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.url}/statistics.json is damaged ({error}): start again with --overwrite"
            ) from error
