"""A batch that keeps looking for volumes, and takes each when nobody writes to it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nrrn_pipeline import storage
from nrrn_pipeline.batch.manifest import Job
from nrrn_pipeline.batch.runs import BatchWatch, Result, planned_or_ended, results_of
from nrrn_pipeline.errors import GO_ON, InputError
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import can_list
from nrrn_pipeline.retrying import reason_of

LONGEST_S = 86400.0
PAUSE = 9  # times what looking took, at least: listing large volumes takes a tenth of the time at most


def watch_batch(
    look: Callable[[], Sequence[Job]],
    options: Options | None = None,
    every: float = 60.0,
    watch: BatchWatch | None = None,
) -> list[Result]:
    """What became of all volumes that were seen, once it is interrupted (KeyboardInterrupt); until then it looks for
    more, every so many seconds.

    `look` tells the volumes, as read_manifest does. One is taken when two looks find the same files in it; one that
    failed is tried again when its files are others. Workers are there while there is something to denoise.

    Raises InputError if the first look does, or `every` is no pause; RunError if the cluster broke.
    """
    if not 0 < every <= LONGEST_S:
        raise InputError(f"every {every:g} s is not possible: use more than 0, and {LONGEST_S:g} at most")
    seen = _Seen(look, options or Options(), watch or BatchWatch())
    try:
        while True:
            started = time.monotonic()
            ready = seen.ready()
            looked = time.monotonic() - started
            seen.take(ready)
            time.sleep(max(every, PAUSE * looked))
    except KeyboardInterrupt:
        seen.end()
    return list(seen.results.values())


@dataclass
class _Seen:
    """What is known of the volumes. `files`: a digest of each one's, at the last look; empty if there were none."""

    look: Callable[[], Sequence[Job]]
    options: Options
    watch: BatchWatch
    jobs: Sequence[Job] | None = None
    files: dict[Job, str] = field(default_factory=dict)
    results: dict[Job, Result] = field(default_factory=dict)
    tried: dict[Job, str] = field(default_factory=dict)  # the files of those that may be tried again, as they were
    notes: set[str] = field(default_factory=set)

    def ready(self) -> list[Job]:
        """Those to denoise now."""
        try:
            self.jobs = self.look()
        except (InputError, OSError) as error:
            if self.jobs is None:
                raise
            self._note(f"{reason_of(error)}; looking again")  # somebody may be writing it just now
        return [job for job in self.jobs or () if self._is_ready(job)]

    def _is_ready(self, job: Job) -> bool:
        if job in self.results and job not in self.tried:
            return False
        if job not in self.files:
            first = planned_or_ended(job, self.options)
            if isinstance(first, Result) and first.state == "done before":
                self._end(first)
                return False
        before, now = self.files.get(job), self._files_of(job)
        self.files[job] = now
        return now not in ("", self.tried.get(job)) and now == before

    def take(self, jobs: Sequence[Job]) -> None:
        """Denoise them."""
        for result in results_of(jobs, self.options, self.watch) if jobs else ():
            job = result.job
            if result.state in ("failed", "slabs failed"):
                self.tried[job] = self.files[job]
            else:
                self.tried.pop(job, None)
            if result.state == "done" and self._files_of(job) not in ("", self.files[job]):
                reason = (
                    f"{job.source} was written to while it was denoised: delete {job.output}, and watch it with a "
                    "longer --every"
                )
                result = replace(result, state="failed", reason=reason)
            self._end(result)

    def end(self) -> None:
        """Those whose turn has not come, or not ended, are waiting."""
        for job in self.jobs or ():
            if job not in self.results:
                there = (
                    f"its turn had not come or not ended; {GO_ON}" if self.files.get(job) else "nothing is there yet"
                )
                self._end(Result(job, "waiting", reason=there))

    def _files_of(self, job: Job) -> str:
        """A digest of names and sizes; empty if there are none, or storage does not tell."""
        if not can_list(job.source):
            self._note(f"{job.source} cannot be watched, as web servers list nothing: denoise it without --watch")
            return ""
        try:
            found = storage.list_tree(job.source)
        except OSError as error:
            self._note(f"{job.source} cannot be listed: {reason_of(error)}; looking again")
            return ""
        return storage.digest(repr(sorted(found.items())).encode()) if found else ""

    def _end(self, result: Result) -> None:
        self.results[result.job] = result
        self.watch.ended(result)

    def _note(self, text: str) -> None:
        """Once each."""
        if text not in self.notes:
            self.notes.add(text)
            self.watch.noted(text)
