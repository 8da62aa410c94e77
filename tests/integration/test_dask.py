"""The Dask runner does what the serial one does, on processes that may die."""

from __future__ import annotations

import errno
import os
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, KilledWorker, LocalCluster, get_worker

from nrrn_pipeline import api
from nrrn_pipeline.cluster import local_client
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import ATTEMPTS, DaskRunner, Outcome, Runner, run_serially
from nrrn_pipeline.slab import SlabTask, denoise_slab
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.volume import open_volume
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

WORKERS = 2
LAYOUT = Layout(chunk=(4, 16, 32), shard=(4, 32, 64), tile=40)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(WORKERS) as client:
        yield client


@pytest.fixture(params=["serial", "dask"])
def runner(request: pytest.FixtureRequest) -> Runner:
    return run_serially if request.param == "serial" else DaskRunner(request.getfixturevalue("client"))


def attempt(folder: Path, table: dict[int, list[str]], item: int) -> int:
    """Ten times the item, or what the table says of this attempt; the last entry holds for all attempts after it."""
    tried = len(list(folder.glob(f"{item}-*")))
    (folder / f"{item}-{tried}-{time.time_ns()}").touch()
    what = table.get(item, ["ok"])[min(tried, len(table.get(item, ["ok"])) - 1)]
    if what == "die":
        time.sleep(0.5)  # so that the results this worker still holds are fetched: else they are computed again
        os._exit(1)
    errors: dict[str, Exception] = {
        "fail": ValueError(f"item {item} failed"),
        "input": InputError(f"item {item} is bad input"),
        "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"),
        "denied": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/denied"),
        "interrupted": OSError(errno.EIO, os.strerror(errno.EIO)),
    }
    if what in errors:
        raise errors[what]
    return 10 * item


def tries(folder: Path) -> dict[int, int]:
    """How often each item was tried."""
    return dict(Counter(int(file.name.split("-")[0]) for file in folder.iterdir()))


def by_item(outcomes: Iterator[Outcome]) -> dict[int, Outcome]:
    """Every outcome, once."""
    found = list(outcomes)
    assert len({outcome.item for outcome in found}) == len(found)
    return {outcome.item: outcome for outcome in found}


TABLES: dict[str, dict[int, list[str]]] = {
    "nothing fails": {},
    "one fails once": {3: ["fail", "ok"]},
    "some fail": {0: ["fail", "fail", "ok"], 3: ["fail", "ok"], 9: ["interrupted", "ok"]},
    "all fail once": {item: ["fail", "ok"] for item in range(10)},
}


@pytest.mark.parametrize("name", TABLES)
def test_a_failure_is_tried_again_and_nothing_else_is(runner: Runner, name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    outcomes = by_item(runner(partial(attempt, tmp_path, table), range(10)))
    assert {item: outcome.result for item, outcome in outcomes.items()} == {item: 10 * item for item in range(10)}
    assert not any(outcome.error for outcome in outcomes.values())
    assert tries(tmp_path) == {item: len(table.get(item, ["ok"])) for item in range(10)}


def test_an_item_that_always_fails_is_set_aside_and_the_others_finish(runner: Runner, tmp_path: Path) -> None:
    table = {2: ["fail"], 5: ["fail", "ok"]}
    outcomes = by_item(runner(partial(attempt, tmp_path, table), range(8)))
    assert isinstance(outcomes[2].error, ValueError)
    assert outcomes[2].result is None
    assert all(outcomes[item].result == 10 * item for item in range(8) if item != 2)
    assert tries(tmp_path) == {item: {2: ATTEMPTS, 5: 2}.get(item, 1) for item in range(8)}


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("input", InputError, "item 0 is bad input"),
        ("full", RunError, "No space left on device .*/full/disk"),
        ("denied", RunError, "Permission denied .*/denied"),
    ],
)
def test_what_no_retry_can_mend_ends_the_run_at_once(
    runner: Runner, kind: str, expected: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(expected, match=message):
        list(runner(partial(attempt, tmp_path, {0: [kind]}), range(1000)))
    assert tries(tmp_path)[0] == 1
    assert len(tries(tmp_path)) <= 5 + WORKERS


def test_nothing_to_do_is_done_at_once(runner: Runner, tmp_path: Path) -> None:
    assert list(runner(partial(attempt, tmp_path, {}), [])) == []


def test_items_are_taken_only_as_they_are_needed(runner: Runner, tmp_path: Path) -> None:
    taken = []
    items = (taken.append(item) or item for item in range(1000))
    outcomes = runner(partial(attempt, tmp_path, {}), items)
    for done in range(1, 6):
        next(outcomes)
        assert len(taken) < done + WORKERS
    outcomes.close()
    assert len(tries(tmp_path)) <= len(taken)


def test_no_more_than_the_window_is_in_flight(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_flight: list[int] = []
    seen = _spied(client, monkeypatch, lambda **_: in_flight.append(sum(not future.done() for _, future in seen)))
    table = {item: ["fail", "ok"] for item in range(0, 30, 4)}
    assert len(list(DaskRunner(client)(partial(attempt, tmp_path, table), range(30)))) == 30
    assert len(seen) == 30 + len(table)
    assert max(in_flight) == WORKERS


def who(item: int) -> str:
    time.sleep(random.uniform(0.01, 0.03))
    return str(get_worker().address)


def test_workers_get_neighbours_and_none_waits_for_another_and_who_comes_later_too() -> None:
    """Two at a time each, and as fast as the scheduler is: it would soon mix them."""
    with (
        LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as few,
    ):
        outcomes = []
        for outcome in DaskRunner(few)(who, range(200)):
            outcomes.append(outcome)
            if len(outcomes) == 10:
                cluster.scale(3)
    by = [outcome.result for outcome in sorted(outcomes, key=lambda outcome: outcome.item)]
    assert len(set(by)) == 3
    assert sum(one != other for one, other in pairwise(by)) < 20, "hardly ever is a neighbour another worker's"
    assert min(Counter(by).values()) > 30


def test_a_lone_worker_that_dies_and_comes_back_goes_on(tmp_path: Path) -> None:
    with local_client(1) as fresh:
        outcomes = by_item(DaskRunner(fresh)(partial(attempt, tmp_path, {1: ["die", "ok"]}), range(4)))
    assert {item: outcome.result for item, outcome in outcomes.items()} == {item: 10 * item for item in range(4)}


def test_what_is_in_flight_is_cancelled_when_the_caller_stops(client: Client) -> None:
    outcomes = DaskRunner(client)(_slowly, range(100))
    next(outcomes)
    outcomes.close()
    deadline = time.monotonic() + 10
    while client.run_on_scheduler(_tasks_held) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.run_on_scheduler(_tasks_held) == 0


def test_a_worker_that_dies_costs_one_more_attempt(client: Client, tmp_path: Path) -> None:
    table = {3: ["fail", "ok"], 7: ["die", "ok"]}
    outcomes = by_item(DaskRunner(client)(partial(attempt, tmp_path, table), range(12)))
    assert {item: outcome.result for item, outcome in outcomes.items()} == {item: 10 * item for item in range(12)}
    assert tries(tmp_path) == {item: len(table.get(item, ["ok"])) for item in range(12)}
    client.wait_for_workers(WORKERS, timeout=60)


def die_at_2(item: int) -> int:
    if item == 2:
        os._exit(1)
    return item


def test_an_item_that_always_kills_its_worker_is_reported_and_the_others_finish() -> None:
    with local_client(2) as fresh:
        outcomes = by_item(DaskRunner(fresh)(die_at_2, range(6)))
    assert isinstance(outcomes.pop(2).error, KilledWorker)
    assert {item: outcome.result for item, outcome in outcomes.items()} == {item: item for item in (0, 1, 3, 4, 5)}


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, Path]:
    return bare_zarr(tmp_path / "raw.zarr", image_like((10, 70, 90))), tiny_weights(tmp_path / "w.safetensors")


def _plan(prepared: tuple[Path, Path], output: Path) -> DenoisePlan:
    return plan_denoise(open_volume(prepared[0]), str(output), describe_weights(prepared[1]), LAYOUT)


def test_dask_writes_the_same_bytes_as_the_serial_runner(
    client: Client, prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, runner in {"serial": run_serially, "dask": DaskRunner(client)}.items():
        list(run_plan(_plan(prepared, tmp_path / name), runner, "cpu"))
    assert len(stored_chunks(tmp_path / "serial" / "0")) == 3 * 3 * 2
    assert stored_chunks(tmp_path / "dask" / "0") == stored_chunks(tmp_path / "serial" / "0")


def test_denoise_runs_on_a_cluster_that_is_there_already(
    client: Client, prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    options = api.Options(layout=LAYOUT, device="cpu", cluster=client.scheduler.address)
    summary = api.denoise(prepared[0], tmp_path / "out.zarr", prepared[1], options)
    assert (summary.slabs, summary.resumed, summary.voxels) == (18, 0, 10 * 70 * 90)
    assert summary.peak_memory_bytes > 2**26
    assert len(client.nthreads()) == WORKERS
    again = api.denoise(prepared[0], tmp_path / "out.zarr", prepared[1], options)
    assert (again.resumed, again.voxels) == (18, 0)


def test_bad_input_found_by_a_worker_leaves_nothing(client: Client, tmp_path: Path) -> None:
    voxels = image_like((10, 70, 90), "float32")
    voxels[3, 50, 60] = np.nan
    source, weights = bare_zarr(tmp_path / "raw.zarr", voxels), tiny_weights(tmp_path / "w.safetensors")
    options = api.Options(layout=LAYOUT, device="cpu", cluster=client.scheduler.address)
    with pytest.raises(InputError, match="slice z=3"):
        api.denoise(source, tmp_path / "out.zarr", weights, options)
    assert not (tmp_path / "out.zarr").exists()


def test_weights_that_change_on_the_way_are_refused(
    client: Client, prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = _plan(prepared, tmp_path / "out.zarr")
    tiny_weights(prepared[1], seed=5)
    with pytest.raises(RunError, match="the run was planned with"):
        list(run_plan(plan, DaskRunner(client), "cpu"))


def test_a_task_is_small(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    plan = _plan(prepared, tmp_path / "out.zarr")
    for depth in (8, 64):
        slab = plan.slabs[0]
        statistics = SliceStatistics(0, tuple(np.random.default_rng(0).random(depth)), (1 / 3,) * depth)
        assert len(pickle.dumps((partial(denoise_slab, plan, "cpu"), SlabTask(slab, statistics)))) < 20_000


def test_no_voxels_pass_the_scheduler(
    client: Client, prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _spied(client, monkeypatch)
    plan = _plan(prepared, tmp_path / "out.zarr")
    results = []

    def runner(task: Any, items: Iterable[Any]) -> Iterator[Outcome]:
        for outcome in DaskRunner(client)(task, items):
            results.append(outcome.result)
            yield outcome

    list(run_plan(plan, runner, "cpu"))
    slab_bytes = plan.slabs[0].read.size
    assert len(results) == len(seen)
    assert len(seen) > len(plan.slabs)
    assert max(len(pickle.dumps(sent)) for sent, _ in seen) < slab_bytes / 2
    assert max(len(pickle.dumps(result)) for result in results) < slab_bytes / 2


def test_tasks_ask_for_a_gpu_where_workers_declare_some(tmp_path: Path) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=4, processes=False, resources={"GPU": 1}, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        list(DaskRunner(client)(partial(_note_when, tmp_path), range(4)))
    spans = sorted(tuple(map(int, file.read_text().split())) for file in tmp_path.iterdir())
    assert len(spans) == 4
    at_once = [sum(begin <= start < end for begin, end in spans) for start, _ in spans]
    assert max(at_once) == 2  # one computes, one is read or written


def test_tasks_ask_for_nothing_where_workers_declare_nothing(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    _spied(client, monkeypatch, lambda **options: asked.append(options["resources"]))
    list(DaskRunner(client)(partial(attempt, tmp_path, {}), range(3)))
    assert asked == [None] * 3


def _spied(
    client: Client, monkeypatch: pytest.MonkeyPatch, told: Callable[..., None] = lambda **_: None
) -> list[tuple[Any, Any]]:
    """What is submitted from now on, each with its future; `told` of the options after each."""
    seen: list[tuple[Any, Any]] = []
    submit: Callable[..., Any] = client.submit

    def spy(task: Any, item: Any, **options: Any) -> Any:
        future = submit(task, item, **options)
        seen.append(((task, item), future))
        told(**options)
        return future

    monkeypatch.setattr(client, "submit", spy)
    return seen


def _note_when(folder: Path, item: int) -> None:
    started = time.monotonic_ns()
    time.sleep(0.1)
    (folder / str(item)).write_text(f"{started} {time.monotonic_ns()}")


def _slowly(item: int) -> int:
    time.sleep(0.2)
    return item


def _tasks_held(dask_scheduler: Any) -> int:
    return sum(str(key).startswith("_slowly") for key in dask_scheduler.tasks)
