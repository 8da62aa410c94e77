"""How far a run is, and when it has failed often enough to be stopped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from nrrn_pipeline.errors import GO_ON, RunError, SlabsFailedError
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.presence import LEASE_S
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.runners import Outcome

BREAKER = 5  # slabs that fail one after the other for one reason before a run is stopped


@dataclass(frozen=True)
class Progress:
    """How far a run is: slices' boxes measured, or slabs done; `voxels` are those done by this run.

    `note`: something that the user should know, and that the run has dealt with.
    """

    stage: str
    done: int
    total: int
    voxels: int = 0
    record: Record | None = None
    note: str = ""


@dataclass
class Tally:
    """How many slabs are done, and which failed and why."""

    stage: str
    total: int
    before: int  # done before this run
    voxels: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    in_a_row: list[str] = field(default_factory=list)  # failed slabs since the last that was done
    started: float = field(default_factory=monotonic)
    finished: int = 0  # by this run

    def add(self, key: str, outcome: Outcome) -> None:
        """Count one slab. Raises RunError if BREAKER of them, one after the other, failed for one reason."""
        if outcome.error is None:
            self.finished, self.voxels, self.in_a_row = self.finished + 1, self.voxels + outcome.result.voxels, []
            return
        self.failed[key] = reason_of(outcome.error)
        alike = self.in_a_row and _kind(self.failed[self.in_a_row[-1]]) == _kind(self.failed[key])
        self.in_a_row = [*self.in_a_row, key] if alike else [key]
        if len(self.in_a_row) >= BREAKER:
            raise RunError(
                f"stopped: {len(self.in_a_row)} slabs one after the other failed for one reason, "
                f"{self.failed[key]} ({', '.join(self.in_a_row)}). Mend this; {GO_ON}"
            )

    def progress(self, record: Record | None = None, done: int | None = None) -> Progress:
        """`done`: by others too, if they are at work."""
        done = self.before + self.finished if done is None else done
        return Progress(self.stage, done, self.total, self.voxels, record)

    def facts(self) -> dict[str, Any]:
        """What nrrn status shows."""
        return {"slabs": self.finished, "voxels": self.voxels, "seconds": monotonic() - self.started}

    def refuse_failures(self) -> None:
        """Raises SlabsFailedError if any failed."""
        if self.failed:
            raise SlabsFailedError.of(self.failed, self.total)


def _kind(reason: str) -> str:
    """A reason without the words that hold numbers or paths: the same for all slabs that fail alike."""
    return re.sub(r"\S*[/\d]\S*", "", reason)


def waiting(waited: float) -> Progress:
    """For another driver that may be alive, so many seconds by now."""
    return Progress("waiting for another driver's lease", int(waited), int(LEASE_S))
