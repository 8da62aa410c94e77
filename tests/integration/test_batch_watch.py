"""A batch that watches: what comes is taken once it is written, and nothing is done twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from nrrn_pipeline import read_manifest, run_batch, storage
from nrrn_pipeline.batch import Job, Result, exit_status, watch_batch
from nrrn_pipeline.progress import Progress
from tests.batches import (
    SERIAL,
    WORDS,
    Told,
    assert_exact,
    four_volumes,
    jobs_in,
    name_of,
    nrrn_process,
    rows,
    single_runs,
    states,
    voxels_of,
    wait_for,
)
from tests.support import bare_zarr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single_runs(tmp_path_factory.mktemp("whole"), 8)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return four_volumes(tmp_path)


@dataclass
class Looks:
    """What happens between the looks of a watch, in order; when nothing more does, Ctrl-C."""

    jobs: Callable[[], Sequence[Job]]
    events: Iterator[Callable[[], object]]

    def __call__(self) -> Sequence[Job]:
        event = next(self.events, None)
        if event is None:
            raise KeyboardInterrupt
        event()
        return self.jobs()


def nothing() -> None:
    pass


def watched(lab: Path, *events: Callable[[], object]) -> tuple[list[Result], Told]:
    """What a watch of the folder `raw` says in the end, and said meanwhile."""
    told = Told()
    into = partial(read_manifest, f"{lab}/raw/*.zarr", lab / "w.safetensors", lab / "clean", empty=True)
    return watch_batch(Looks(into, iter(events)), SERIAL, 0.001, told), told


def grow(lab: Path, number: int, part: int) -> None:
    """Write the first files of a volume, in order, as a copy does that comes from far."""
    whole = lab / "far" / name_of(number)
    if not whole.exists():
        bare_zarr(whole, voxels_of(number))
    for file in sorted(file for file in whole.rglob("*") if file.is_file())[::-1][:part]:
        target = lab / "raw" / name_of(number) / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


def test_a_watch_takes_a_volume_that_appears_but_none_that_is_being_written(lab: Path, whole: Path) -> None:
    told_at: dict[str, list[str]] = {}
    steps = [partial(grow, lab, 7, part) for part in (1, 2, 5, 99)]
    told = Told()

    def note(name: str) -> None:
        told_at[name] = list(told.taken_up)

    into = partial(read_manifest, f"{lab}/raw/*.zarr", lab / "w.safetensors", lab / "clean", empty=True)
    events = [*steps, partial(note, "grown"), partial(note, "second look"), nothing]
    results = watch_batch(Looks(into, iter(events)), SERIAL, 0.001, told)
    assert name_of(7) not in told_at["grown"]  # taken by the look after, which found nothing new
    assert set(told_at["second look"]) == {name_of(number) for number in (0, 1, 2, 3, 7)}
    assert states(results) == ["done"] * 5
    assert_exact(lab, whole, 0, 1, 2, 3, 7)


def test_a_watch_begins_with_nothing_and_leaves_alone_what_is_done(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batch(jobs_in(lab), SERIAL)
    listed = []
    monkeypatch.setattr(storage, "list_tree", lambda url, **_: listed.append(url))
    results, told = watched(lab, nothing, nothing, nothing)
    assert states(results) == ["done before"] * 4
    assert (told.taken_up, listed) == ([], [])
    assert watch_batch(Looks(list, iter([nothing] * 3)), SERIAL, 0.001) == []


def test_a_watch_tries_what_failed_again_only_when_it_changed(lab: Path, whole: Path) -> None:
    metadata = lab / "raw" / name_of(1) / "zarr.json"
    good = metadata.read_bytes()
    metadata.write_bytes(b"damaged")
    tries: list[int] = []
    told = Told()

    def note() -> None:
        tries.append(sum(result.job.source.endswith(name_of(1)) for result in told.results))

    into = partial(read_manifest, f"{lab}/raw/*.zarr", lab / "w.safetensors", lab / "clean", empty=True)
    events = [nothing, note, note, note, partial(metadata.write_bytes, good), note, note, note]
    results = watch_batch(Looks(into, iter(events)), SERIAL, 0.001, told)
    assert tries == [0, 1, 1, 1, 2, 2]
    assert states(told.results).count("failed") == 1
    assert states(results) == ["done"] * 4
    assert_exact(lab, whole, 0, 1, 2, 3)


def test_a_volume_that_is_written_to_while_it_is_denoised_is_told(lab: Path) -> None:
    class Writing(Told):
        def taken(self, job: Job, number: int, total: int) -> None:
            super().taken(job, number, total)
            if job.source.endswith(name_of(2)):
                Path(job.source, "c/9").mkdir()
                Path(job.source, "c/9/late").write_bytes(b"late")

    told = Writing()
    results = watch_batch(Looks(partial(jobs_in, lab), iter([nothing] * 5)), SERIAL, 0.001, told)
    by_name = {result.job.source.rpartition("/")[2]: result for result in results}
    assert by_name[name_of(2)].state == "failed"
    assert "was written to while it was denoised: delete" in by_name[name_of(2)].reason
    assert told.taken_up.count(name_of(2)) == 1
    assert exit_status(results) == 1


def test_a_watch_lists_what_it_waits_for_and_reads_its_manifest_again(lab: Path) -> None:
    (lab / "raw" / name_of(3)).rename(lab / "far.zarr")
    told = Told()
    manifest = (lab / "jobs.csv").read_text()
    events = [
        nothing,
        partial((lab / "jobs.csv").write_text, manifest[: len(manifest) // 2] + ',"'),
        partial((lab / "jobs.csv").write_text, manifest.replace("clean/", "other/")),
        nothing,
        nothing,
    ]
    results = watch_batch(Looks(partial(jobs_in, lab), iter(events)), SERIAL, 0.001, told)
    assert "jobs.csv cannot be used: line" in told.notes[0]
    by_output = {result.job.output.removeprefix(f"{lab}/"): result for result in results}
    assert by_output[f"other/{name_of(0)}"].state == "done"
    waiting = by_output[f"other/{name_of(3)}"]
    assert (waiting.state, waiting.reason) == ("waiting", "nothing is there yet")
    assert exit_status(results) == 1


def test_ctrl_c_amid_a_volume_ends_a_watch_with_what_was_done(lab: Path, whole: Path) -> None:
    class Interrupting(Told):
        def progressed(self, progress: Progress) -> None:
            if len(self.taken_up) == 2 and progress.record is not None:
                raise KeyboardInterrupt

    results = watch_batch(Looks(partial(jobs_in, lab), iter([nothing] * 5)), SERIAL, 0.001, Interrupting())
    assert states(results) == ["done", "waiting", "waiting", "waiting"]
    assert "run the same command again" in results[1].reason
    assert states(run_batch(jobs_in(lab), SERIAL)) == ["done before", "done", "done", "done"]
    assert_exact(lab, whole, 0, 1, 2, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_ends_with_a_table_and_a_status_of_its_own(lab: Path, whole: Path, number: signal.Signals) -> None:
    words = ("batch", f"{lab}/raw/*.zarr", "--into", "clean", "--weights", "w.safetensors", "--watch", "--every", "0.1")
    with nrrn_process(lab, *words, *WORDS) as process:
        grow(lab, 5, 99)
        done = Path(lab, "clean", name_of(5), "zarr.json")
        wait_for(lambda: done.exists() and '"complete"' in done.read_text(), process)
        time.sleep(0.5)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert {name: row[0] for name, row in rows(out).items()} == dict.fromkeys(map(name_of, (0, 1, 2, 3, 5)), "done")
    assert_exact(lab, whole, 0, 1, 2, 3, 5)
