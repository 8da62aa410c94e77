"""Processes that share a run: what each is refused, what becomes of slabs that fail, and what they do together."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrrn_pipeline import Layout, Options, denoise, presence, run, sharing, status, storage, verify
from nrrn_pipeline.api import RunWatch, Summary
from nrrn_pipeline.cli import main
from nrrn_pipeline.errors import InputError, RunError, SlabsFailedError
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.members import Share
from nrrn_pipeline.planning import Method
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.runners import ATTEMPTS
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 32, 32), shard=(4, 32, 32))
SLABS = 18


@dataclass(frozen=True)
class Lab:
    """A folder with a volume and weights."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out.zarr"

    @property
    def ledger(self) -> Ledger:
        return Ledger(f"{self.output}/0")

    def denoise(self, share: Share | None, watch: RunWatch | None = None, **options: Any) -> Summary:
        settings = Options(**{"layout": LAYOUT, "device": "cpu", "cluster": "serial", "share": share, **options})
        return denoise(self.folder / "raw.zarr", self.output, self.folder / "w.safetensors", settings, watch)

    def nobody_is_left(self) -> bool:
        return not any(storage.list_sizes(f"{self.ledger.url}/{folder}") for folder in ("members", "claims"))


class Pausing(RunWatch):
    """Stops a run after its first slab, until `go_on`."""

    def __init__(self) -> None:
        self.paused, self.go_on = threading.Event(), threading.Event()

    def progressed(self, progress: Progress) -> None:
        if progress.record is not None and not self.paused.is_set():
            self.paused.set()
            assert self.go_on.wait(60)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    bare_zarr(tmp_path / "raw.zarr", image_like((12, 64, 96)), chunks=(4, 32, 32))
    tiny_weights(tmp_path / "w.safetensors")
    monkeypatch.setattr(presence, "LOOK_S", 0.01)
    monkeypatch.setattr(presence, "RENEW_S", 0.05)
    return Lab(tmp_path)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each slab was tried; the first of the volume fails each time, until it is mended."""
    tried, lock, real = Counter[str](), threading.Lock(), run.denoise_slab
    broken = [True]

    def denoise_slab(plan: Any, device: str, task: Any, keeping: Any) -> Any:
        with lock:
            tried[task.slab.key] += 1
        if task.slab.key.startswith("z0-y0-x0") and broken:
            raise ValueError("cannot be decoded")
        return real(plan, device, task, keeping)

    monkeypatch.setattr(run, "denoise_slab", denoise_slab)
    tried.mend = broken.clear  # type: ignore[attr-defined]
    return tried


@contextmanager
def at_work(lab: Lab, share: Share | None) -> Iterator[Future[Summary]]:
    """A run that is in the middle of its slabs; it goes on, to its end, when the block ends."""
    watch = Pausing()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lab.denoise, share, watch)
        try:
            assert watch.paused.wait(60), run.result(1)
            yield run
        finally:
            watch.go_on.set()


def test_each_slab_is_done_once_and_each_member_counts_its_own(lab: Lab) -> None:
    counted: Counter[str] = Counter()

    class Counting(RunWatch):
        def progressed(self, progress: Progress) -> None:
            if progress.record is not None:
                counted[progress.record.key] += 1

    with at_work(lab, Share(0, 3)), ThreadPoolExecutor(2) as pool:  # the first has done one slab, and pauses
        runs = [pool.submit(lab.denoise, Share(number, 3), Counting()) for number in (1, 2)]
        while sum(counted.values()) < 5:
            assert not any(run.done() for run in runs)
            time.sleep(0.01)
    summaries = [run.result() for run in runs]
    assert set(counted.values()) == {1}
    assert sum(counted.values()) == sum(summary.done for summary in summaries) < SLABS
    keys = lab.ledger.done().keys()
    assert len(keys) == SLABS
    assert [len(lab.ledger.records(key)) for key in keys] == [1] * SLABS
    assert lab.nobody_is_left()


def test_a_member_does_not_measure_again_what_others_have_measured_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is slow with the first of its boxes; meanwhile the second measures its own and the first's other."""
    measured, real, claims = Counter[str](), sharing.measure_box, f"{lab.ledger.url}/claims"

    def measure_box(volume: Any, box: Any) -> Any:
        measured[str(box.z.start)] += 1
        deadline = time.monotonic() + 60
        while box.z.start == 0 and (len(lab.ledger.measured()) < 2 or len(storage.list_sizes(claims)) > 1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return real(volume, box)

    monkeypatch.setattr(sharing, "measure_box", measure_box)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lab.denoise, Share(0, 2), prefetch=False)
        while not measured:
            assert not first.done()
            time.sleep(0.01)
        second = pool.submit(lab.denoise, Share(1, 2), prefetch=False)
    assert first.result().done + second.result().done == SLABS
    assert measured == dict.fromkeys(("0", "4", "8"), 1)


def test_a_member_alone_does_all_and_says_so(lab: Lab) -> None:
    summary = lab.denoise(Share(2, 5))
    assert (summary.slabs, summary.done, summary.resumed) == (SLABS, SLABS, 0)
    assert verify(lab.output, deep=True) == []
    now = status(lab.output)
    assert (now.state, now.done) == ("complete", SLABS)
    again = lab.denoise(Share(0, 5))
    assert (again.done, again.resumed) == (0, SLABS)


def test_status_shows_who_is_at_work(lab: Lab) -> None:
    with at_work(lab, Share(0, 2)):
        assert status(lab.output).state == "running: shared, 1 at work"


def test_what_members_began_a_driver_ends_and_what_a_driver_began_members_end(lab: Lab) -> None:
    class Enough(RunWatch):
        def progressed(self, progress: Progress) -> None:
            if progress.record is not None and progress.done >= 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.denoise(Share(0, 2), Enough())
    assert lab.nobody_is_left()
    kept = len(lab.ledger.done())
    assert 5 <= kept < SLABS
    assert lab.denoise(None).resumed == kept
    whole = stored_chunks(lab.output / "0")
    for file in lab.output.rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(KeyboardInterrupt):
        lab.denoise(None, Enough())
    assert lab.denoise(Share(1, 2)).resumed == 5
    assert stored_chunks(lab.output / "0") == whole


def test_a_driver_is_refused_while_members_are_at_work(lab: Lab) -> None:
    refused = pytest.raises(InputError, match="another nrrn denoise is at work on this output")
    with at_work(lab, Share(0, 2)) as run, refused:
        lab.denoise(None)
    assert run.result().done == SLABS


def test_members_are_refused_while_a_driver_is_at_work(lab: Lab) -> None:
    with at_work(lab, None), pytest.raises(InputError, match="another nrrn denoise is at work on this output"):
        lab.denoise(Share(0, 2))
    assert lab.nobody_is_left()


def test_other_settings_are_refused(lab: Lab) -> None:
    with at_work(lab, Share(0, 2)):
        with pytest.raises(InputError, match="was begun with other settings: images was 3, now 2"):
            lab.denoise(Share(1, 2), method=Method(images=2))
        with pytest.raises(InputError, match="was begun with other settings: slab was"):
            lab.denoise(Share(1, 2), layout=Layout(slab=(4, 64, 96), chunk=LAYOUT.chunk, shard=LAYOUT.shard))
    assert lab.nobody_is_left()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 2, "cluster": "local"}, "shard 0/2 is done by this process alone"),
        ({"cluster": "tcp://127.0.0.1:8786"}, "shard 0/2 is done by this process alone"),
        ({"overwrite": True}, "shard 0/2 cannot overwrite, as others are at work"),
    ],
)
def test_what_does_not_go_with_a_share_is_refused(lab: Lab, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        lab.denoise(Share(0, 2), **options)
    assert not lab.output.exists()


def test_a_slab_that_fails_is_named_by_all_and_tried_by_each_once(lab: Lab, failing: Counter[str]) -> None:
    with pytest.raises(SlabsFailedError) as failed:
        lab.denoise(Share(0, 3))
    (key,) = lab.ledger.failed()
    assert f"slab {key}: ValueError: cannot be decoded" in str(failed.value)
    assert failing[key] == ATTEMPTS
    assert len(lab.ledger.done()) == SLABS - 1
    with pytest.raises(SlabsFailedError, match=f"1 of {SLABS} slabs failed every time"):
        lab.denoise(Share(1, 3))
    assert failing[key] == 2 * ATTEMPTS, "once more, as it may be mended, and no more"
    failing.mend()  # type: ignore[attr-defined]
    assert lab.denoise(Share(2, 3)).done == 1
    assert lab.ledger.failed() == set()
    assert verify(lab.output, deep=True) == []
    assert lab.nobody_is_left()


def test_members_at_work_do_not_try_for_ever_what_fails(lab: Lab, failing: Counter[str]) -> None:
    with at_work(lab, Share(0, 3)) as first, ThreadPoolExecutor(2) as pool:
        others = [pool.submit(lab.denoise, Share(number, 3)) for number in (1, 2)]
    for member in (first, *others):
        assert "ValueError: cannot be decoded" in str(member.exception())
    (key,) = lab.ledger.failed()
    assert ATTEMPTS <= failing[key] <= 3 * ATTEMPTS
    assert len(lab.ledger.done()) == SLABS - 1


def test_nan_in_the_source_is_named(lab: Lab) -> None:
    voxels = image_like((12, 64, 96), "float32")
    voxels[7, 10, 10] = np.nan
    for file in (lab.folder / "raw.zarr").rglob("*"):
        if file.is_file():
            file.unlink()
    bare_zarr(lab.folder / "raw.zarr", voxels, overwrite=True)
    for number in (0, 1):
        with pytest.raises(RunError, match="holds NaN or infinite voxels in slice z=7: replace them"):
            lab.denoise(Share(number, 2))
    assert not (lab.output / "0/c").exists()
    assert lab.nobody_is_left()


def test_statistics_of_the_volume_are_those_of_one_alone(lab: Lab) -> None:
    lab.denoise(None, method=Method(statistics="volume"))
    alone = stored_chunks(lab.output / "0")
    lab.output.rename(lab.folder / "alone.zarr")
    lab.denoise(Share(1, 3), method=Method(statistics="volume"))
    assert stored_chunks(lab.output / "0") == alone


def test_the_command_line_says_what_this_process_did(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nrrn(*words: str) -> int:
        paths = [str(lab.folder / name) for name in ("raw.zarr", "out.zarr", "w.safetensors")]
        layout = ("--chunk", "4,32,32", "--shard", "4,32,32", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["nrrn", "denoise", *paths[:2], "--weights", paths[2], *layout, *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert nrrn("--shard-of", "3/3") == 2
    assert capsys.readouterr().err == "nrrn: shard 3 of 3 is not possible: numbers are 0 to 2, of 100000 at most\n"
    assert nrrn("--shard-of", "x") == 2
    assert "shard 'x' is not understood: expected I/N such as 3/64" in capsys.readouterr().err
    assert nrrn("--shard-of", "0/3") == 0
    said = capsys.readouterr()
    assert f"out.zarr: complete, {SLABS} slabs, {SLABS} by this process\n" in said.out
    assert f"{SLABS} slabs on this process, share 0/3" in said.err
