"""Where the time of a run went, and what held it up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nrrn_pipeline.cost import counted
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.progress import Progress

STAGES = {  # of a slab, in their order
    "load": "reading weights, choosing a precision",
    "fetch": "waiting for storage to give voxels",
    "decode": "decoding chunks",
    "wait": "while another slab of the worker was computed",
    "network": "in the network",
    "prepare": "normalising, tiling, rounding",
    "encode": "encoding chunks",
    "store": "waiting for storage to take them",
}
COMPUTING = ("network", "prepare")
BUSY = 0.85  # of the time: from there on computing is what takes it


@dataclass
class Profile:
    """Seconds by stage, of all slabs of a run together; of the whole run and its statistics; the workers seen."""

    stage: str = "denoising"  # a word for what is done with slabs
    spent: dict[str, float] = field(default_factory=dict)
    statistics_s: float = 0.0
    slabs_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    arithmetic: set[str] = field(default_factory=set)
    _last: float | None = None

    def add(self, progress: Progress, now: float) -> None:
        """What a run has told, `now` seconds after it began."""
        passed = now - (0.0 if self._last is None else self._last)
        self._last = now
        if progress.stage == self.stage and (self.slabs_s or progress.record):
            self.slabs_s += passed
        else:
            self.statistics_s += passed
        if progress.record is not None:
            self._add_record(progress.record)

    def _add_record(self, record: Record) -> None:
        self.workers.add(record.worker)
        if record.arithmetic:
            self.arithmetic.add(record.arithmetic)
        for stage, seconds in record.spent.items():
            self.spent[stage] = self.spent.get(stage, 0.0) + seconds

    @property
    def computing(self) -> float:
        """The share of the workers' time, while slabs were done, in which they computed."""
        whole = len(self.workers) * self.slabs_s
        return sum(self.spent.get(stage, 0.0) for stage in COMPUTING) / whole if whole else 0.0

    def rows(self) -> dict[str, str]:
        """For people: each stage's seconds and its share of the workers' time; the bottleneck."""
        whole = len(self.workers) * self.slabs_s
        rows = {"statistics and start": f"{self.statistics_s:.1f} s"}
        workers = counted(len(self.workers), "worker")
        rows[self.stage] = f"{self.slabs_s:.1f} s of {workers}, together {whole:.1f} s; of these, in part side by side"
        for stage, words in STAGES.items():
            if seconds := self.spent.get(stage, 0.0):
                rows[f"  {stage}"] = f"{seconds:8.1f} s  {seconds / whole:6.1%}  {words}"
        return rows | {"bottleneck": self.bottleneck()}

    def bottleneck(self) -> str:
        """What to make faster first, in a sentence."""
        beside = {stage: seconds for stage, seconds in self.spent.items() if stage not in (*COMPUTING, "wait")}
        if not self.spent:
            return "none: no slab was done"
        if self.computing >= BUSY:
            stage = max(COMPUTING, key=lambda each: self.spent.get(each, 0.0))
            return f"{stage}: workers compute {self.computing:.0%} of the time; more, or faster, ones would help"
        stage = max(beside, key=lambda each: beside[each], default="")
        if not stage or beside[stage] < (1 - BUSY) * sum(self.spent.get(each, 0.0) for each in COMPUTING):
            return f"none in a slab: workers compute {self.computing:.0%} of the time, and have too few slabs, or start"
        return f"{stage}: {STAGES.get(stage, '')}; workers compute only {self.computing:.0%} of the time"

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "statistics_s": self.statistics_s,
            "slabs_s": self.slabs_s,
            "workers": len(self.workers),
            "spent_s": self.spent,
            "computing": self.computing,
            "arithmetic": sorted(self.arithmetic),
            "bottleneck": self.bottleneck(),
        }
