"""Many volumes in one go: what is whole is exact, what is broken is named, and a second go does only what is left."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrrn_pipeline import InputError, Options, RunError, cost, run_batch, storage
from nrrn_pipeline.batch import Result, exit_status, runs, table_of, watch_batch
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.runners import Outcome, Runner
from nrrn_pipeline.slab import SlabTask
from tests.batches import (
    SERIAL,
    SLABS,
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
from tests.commands import Nrrn
from tests.servers import ObjectStore
from tests.support import array, bare_zarr, image_like, other_folder, stored_chunks

COUNT, BROKEN = 20, {3: "is not a Zarr volume", 8: "NaN", 13: "cannot be read at voxels"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single_runs(tmp_path_factory.mktemp("whole"), COUNT)


def put_tree(store: ObjectStore, folder: Path, key: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            store.put("batch", f"{key}/{file.relative_to(folder)}", file.read_bytes())


def spoil(store: ObjectStore) -> None:
    """Three volumes, each broken in another way."""
    for name in store.listing("batch", f"raw/{name_of(3)}"):
        store.delete("batch", f"raw/{name_of(3)}/{name}")
    store.put("batch", f"raw/{name_of(3)}/notes.txt", b"copying did not end")
    chunk = next(name for name in store.listing("batch", f"raw/{name_of(13)}") if name.startswith("c/"))
    store.put("batch", f"raw/{name_of(13)}/{chunk}", b"damaged")


def test_of_twenty_volumes_three_broken_ones_are_named_and_mended_alone(
    seaweed: ObjectStore, whole: Path, tmp_path: Path, nrrn: Nrrn
) -> None:
    seaweed.make_bucket("batch")
    put_tree(seaweed, whole / "raw", "raw")
    spoil(seaweed)
    nan = voxels_of(8)
    nan[3, 4, 5] = np.nan
    put_tree(seaweed, bare_zarr(tmp_path / "nan.zarr", nan), f"raw/{name_of(8)}")
    seaweed.put("batch", "w.safetensors", (whole / "w.safetensors").read_bytes())
    lines = [f"raw/{name_of(number)},clean/{name_of(number)}" for number in range(COUNT)]
    seaweed.put("batch", "jobs.csv", "\n".join(["source,output", *lines]).encode())
    words = ("batch", "s3://batch/jobs.csv", "--weights", "s3://batch/w.safetensors", *WORDS)

    def assert_exact(numbers: set[int]) -> None:
        for number in numbers:
            chunks = seaweed.listing("batch", f"clean/{name_of(number)}/0/c")
            expected = stored_chunks(whole / "clean" / name_of(number) / "0")
            assert {f"c/{name}": data for name, data in chunks.items()} == expected

    with seaweed.in_use():
        status, out, err = nrrn(*words)
        assert status == 1
        table = rows(out)
        assert list(table) == [name_of(number) for number in range(COUNT)]
        assert {name for name, row in table.items() if row[0] == "failed"} == {name_of(number) for number in BROKEN}
        for number, said in BROKEN.items():
            assert said in table[name_of(number)][3]
            assert f"s3://batch/raw/{name_of(number)}" in err
        assert "20 volumes: 17 done, 3 failed" in err
        assert_exact(set(range(COUNT)) - set(BROKEN))
        before = seaweed.listing("batch", "clean")
        assert {name.partition("/")[0] for name in before} == {name_of(n) for n in range(COUNT) if n not in BROKEN}

        put_tree(seaweed, whole / "raw", "raw")
        status, out, err = nrrn(*words)
        assert status == 0, err
        table = rows(out)
        done = {name for name, row in table.items() if row[0] == "done"}
        assert done == {name_of(number) for number in BROKEN}
        assert {row[0] for name, row in table.items() if name not in done} == {"done before"}
        assert {row[1] for row in table.values()} == {str(SLABS)}
        assert_exact(set(range(COUNT)))
        # not one object of the others was written: drivers' files and records, with their times, are the same
        after = seaweed.listing("batch", "clean")
        assert {name: data for name, data in after.items() if name.partition("/")[0] not in done} == before


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return four_volumes(tmp_path)


def test_nothing_left_starts_no_workers(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(run_batch(jobs_in(lab), SERIAL)) == ["done"] * 4
    monkeypatch.setattr(runs, "open_runner", lambda *_: pytest.fail("workers were started"))
    told = Told()
    results = run_batch(jobs_in(lab), replace(SERIAL, cluster="local"), told)
    assert states(results) == ["done before"] * 4
    assert (told.taken_up, exit_status(results)) == ([], 0)


def test_other_settings_are_not_done_before_and_the_output_is_kept(lab: Path, whole: Path) -> None:
    run_batch(jobs_in(lab), SERIAL)
    text = (lab / "jobs.csv").read_text().replace("source,output", "images,source,output").replace("raw/", ",raw/")
    (lab / "jobs.csv").write_text(text.replace(f",raw/{name_of(2)}", f"2,raw/{name_of(2)}"))
    results = run_batch(jobs_in(lab), SERIAL)
    assert states(results) == ["done before", "done before", "failed", "done before"]
    assert "was begun with other settings: images was 3, now 2" in results[2].reason
    assert_exact(lab, whole, 2)


def test_what_cannot_be_planned_stops_nothing_else(lab: Path, whole: Path) -> None:
    (lab / "raw" / name_of(0)).rename(lab / "moved")
    (lab / "raw" / name_of(1)).rename(lab / "moved.too")
    array((8, 48, 64), "float64")(lab / "raw" / name_of(1))
    other_folder(lab / "clean")  # in the way of nothing
    other_folder(lab / "clean" / name_of(2))
    told = Told()
    results = run_batch(jobs_in(lab), SERIAL, told)
    assert states(results) == ["failed"] * 3 + ["done"]
    for result, said in zip(results, ("there is nothing there", "float64", "was not made by nrrn"), strict=False):
        assert said in result.reason
        assert (result.slabs, exit_status([result])) == (0, 1)
    assert told.taken_up == [name_of(3)]
    assert_exact(lab, whole, 3)


def test_a_volume_too_large_for_memory_fails_alone(lab: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cost.worker_bytes

    def large(plan: DenoisePlan, *how: int) -> int:
        return 2**60 if plan.source.url.endswith(name_of(1)) else real(plan, *how)

    monkeypatch.setattr(cost, "worker_bytes", large)
    results = run_batch(jobs_in(lab), SERIAL)
    assert states(results) == ["done", "failed", "done", "done"]
    assert "cannot fit" in results[1].reason
    assert_exact(lab, whole, 0, 2, 3)


def test_one_local_cluster_serves_all_volumes_though_one_fails(
    lab: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    @contextmanager
    def counted(plans: Sequence[DenoisePlan], options: Options) -> Iterator[tuple[Runner, str]]:
        opened.append(len(plans))
        with real(plans, options) as there:
            yield there

    real = runs.open_runner
    monkeypatch.setattr(runs, "open_runner", counted)
    nan = image_like((8, 48, 64), "float32")
    nan[0, 0, 0] = np.nan
    shutil.rmtree(lab / "raw" / name_of(1))
    bare_zarr(lab / "raw" / name_of(1), nan)
    results = run_batch(jobs_in(lab), replace(SERIAL, cluster="local", workers=2))
    assert states(results) == ["done", "failed", "done", "done"]
    assert "NaN" in results[1].reason
    assert opened == [4]
    assert_exact(lab, whole, 0, 2, 3)


def test_a_cluster_that_is_gone_ends_the_batch_and_not_each_volume(
    lab: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, gone = Told(), False

    def breaking(task: Callable[[Any], Any], items: Any) -> Iterator[Outcome]:
        nonlocal gone
        if gone:
            raise KeyError("workers")  # as Dask's client does
        for number, item in enumerate(items):
            if gone := len(told.taken_up) == 2 and number == 2:
                raise RunError("the Dask scheduler is gone or was restarted; run the same command again")
            yield Outcome(item, task(item))

    monkeypatch.setattr(runs, "open_runner", lambda *_: nullcontext((breaking, "here")))
    with pytest.raises(RunError, match=r"cannot do even an empty task; .*v01\.zarr: the Dask scheduler is gone"):
        run_batch(jobs_in(lab), SERIAL, told)
    assert told.taken_up == [name_of(0), name_of(1)]
    assert states(told.results) == ["done", "failed"]
    monkeypatch.undo()
    assert states(run_batch(jobs_in(lab), SERIAL)) == ["done before", "done", "done", "done"]
    assert_exact(lab, whole, 0, 1, 2, 3)


def test_a_cluster_that_can_do_nothing_is_no_fault_of_the_volumes(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeless(task: Callable[[Any], Any], items: Any) -> Iterator[Outcome]:
        return (Outcome(item, error=MemoryError("no worker starts")) for item in items)

    monkeypatch.setattr(runs, "open_runner", lambda *_: nullcontext((hopeless, "nowhere")))
    told = Told()
    with pytest.raises(RunError, match=r"cannot do even an empty task; .*v00\.zarr: .*no worker starts"):
        run_batch(jobs_in(lab), SERIAL, told)
    assert states(told.results) == ["failed"]


def test_slabs_that_fail_are_listed_and_have_a_status_of_their_own(
    lab: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Any] = []

    def failing(task: Callable[[Any], Any], items: Any) -> Iterator[Outcome]:
        for item in items:
            if not failed and isinstance(item, SlabTask) and item.slab.key == "z4-y0-x0":
                failed.append(item)
                yield Outcome(item, error=MemoryError("too much"))
            else:
                yield Outcome(item, task(item))

    monkeypatch.setattr(runs, "open_runner", lambda *_: nullcontext((failing, "here")))
    status, out, err = nrrn("batch", lab / "jobs.csv", "--weights", lab / "w.safetensors", *WORDS)
    assert status == 3
    assert [row[0] for row in rows(out).values()] == ["slabs failed", "done", "done", "done"]
    assert "1 of 4 slabs failed every time" in rows(out)[name_of(0)][3]
    assert "slab z4-y0-x0: MemoryError: too much" in err.splitlines()
    assert exit_status([Result(jobs_in(lab)[0], "slabs failed"), Result(jobs_in(lab)[1], "failed")]) == 1


def test_options_that_cannot_be_are_refused_before_anything_starts(lab: Path) -> None:
    with pytest.raises(InputError, match="a batch overwrites nothing"):
        run_batch(jobs_in(lab), replace(SERIAL, overwrite=True))
    for every in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"every .* s is not possible"):
            watch_batch(list, SERIAL, every)
    assert not (lab / "clean").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("jobs.csv",), "line 2: it has no weights"),
        (("jobs.csv", "--weights", "no.safetensors"), "no.safetensors"),
        (("no.csv", "--weights", "w.safetensors"), "there is no manifest at"),
        (("raw", "--weights", "w.safetensors"), "'raw' is no manifest"),
        (("raw/", "--weights", "w.safetensors"), "give --into"),
        (("jobs.csv", "--weights", "w.safetensors", "--slab", "8"), "--slab '8' is not understood"),
        (("jobs.csv", "--weights", "w.safetensors", "--device", "tpu"), "tpu"),
        (("jobs.csv", "--weights", "w.safetensors", "--watch", "--every", "0"), "every 0 s is not possible"),
        (("no.csv", "--weights", "w.safetensors", "--watch"), "there is no manifest at"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    lab: Path,
    nrrn: Nrrn,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(lab)
    status, out, err = nrrn("batch", *words)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("nrrn: ")
    assert said in line
    assert not (lab / "clean").exists()


def test_a_folder_is_denoised_into_another_and_the_table_is_for_scripts(
    lab: Path, whole: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)
    status, out, err = nrrn("batch", "raw/", "--into", "clean", "--weights", "w.safetensors", *WORDS)
    assert status == 0, err
    assert {name: row[:2] for name, row in rows(out).items()} == {name_of(n): ["done", "4"] for n in range(4)}
    assert_exact(lab, whole, 0, 1, 2, 3)


def test_no_cell_of_a_table_holds_a_tab_or_a_line_end(lab: Path) -> None:
    job = replace(jobs_in(lab)[0], source="a\tb")
    _, line = table_of([Result(job, "failed", reason="one\ntwo\tthree\x1b[31m")])
    assert line == ("a\\tb", "failed", "0", "0.0", "one; two\\tthree\\x1b[31m")


def test_a_batch_that_is_killed_goes_on_where_it_was(lab: Path, whole: Path) -> None:
    words = ("batch", "jobs.csv", "--weights", "w.safetensors", *WORDS)
    records = {number: f"{lab}/clean/{name_of(number)}/0/nrrn/slabs" for number in range(4)}
    process = nrrn_process(lab, *words)
    with process:
        wait_for(lambda: bool(storage.list_sizes(records[1])), process)
        process.send_signal(signal.SIGKILL)
    before = {n: {name: Path(url, name).read_bytes() for name in storage.list_sizes(url)} for n, url in records.items()}
    assert len(before[0]) == SLABS
    assert before[3] == {}
    results = run_batch(jobs_in(lab), SERIAL)
    assert states(results)[0] == "done before"
    assert states(results)[3] == "done"
    assert_exact(lab, whole, 0, 1, 2, 3)
    for number, slabs in before.items():
        assert {name: Path(records[number], name).read_bytes() for name in slabs} == slabs  # done once


def test_a_filter_denoises_a_batch_as_it_does_a_single_volume(lab: Path, nrrn: Nrrn, tmp_path: Path) -> None:
    words = (*WORDS, "--method", "gaussian-avg", "--stitch", "blend")
    said = nrrn("batch", f"{lab}/raw/*.zarr", "--into", f"{lab}/filtered", *words)
    assert said.status == 0, said.err
    assert nrrn("denoise", f"{lab}/raw/{name_of(2)}", f"{tmp_path}/once.zarr", *words).status == 0
    assert stored_chunks(lab / "filtered" / name_of(2) / "0") == stored_chunks(tmp_path / "once.zarr/0")
