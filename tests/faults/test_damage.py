"""What is damaged is found, named and mended, and nothing else is touched; failing slabs take no other with them."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from nrrn_pipeline import InputError, Layout, Options, RunError, api, repair, slab, storage, verify
from nrrn_pipeline.cluster import local_client
from nrrn_pipeline.errors import SlabsFailedError
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.progress import BREAKER
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import ATTEMPTS, DaskRunner, Outcome, run_serially
from nrrn_pipeline.slab import SlabTask
from nrrn_pipeline.volume import open_volume
from tests.support import Passing, bare_zarr, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(2, 16, 16), shard=(2, 32, 32), tile=40)
OPTIONS = Options(layout=LAYOUT, cluster="serial", device="cpu")
SLABS = 24
Damage = Callable[[Path, Path], None]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DenoisePlan:
    """Of noise and a network that leaves it as it is: whole shards are of one size, as nothing compresses."""
    monkeypatch.setattr(slab, "load_network", lambda *_: (Passing(), ""))
    monkeypatch.setattr("nrrn_pipeline.presence.LEASE_S", 0.2)
    monkeypatch.setattr("nrrn_pipeline.presence.LOOK_S", 0.05)
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 60), dtype=np.uint8)
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    source = open_volume(bare_zarr(tmp_path / "in.zarr", noise))
    made = plan_denoise(source, str(tmp_path / "out.zarr"), weights, LAYOUT)
    assert len(made.slabs) == SLABS
    return made


@pytest.fixture
def whole(plan: DenoisePlan) -> dict[str, bytes]:
    """The chunks of the plan's output, which is done."""
    assert run(plan) == (SLABS, [])
    return chunks(plan)


def run(plan: DenoisePlan) -> tuple[int, list[str]]:
    """How many slabs that took, and what was noted."""
    told = list(run_plan(plan, run_serially, "cpu"))
    return sum(progress.record is not None for progress in told), [progress.note for progress in told if progress.note]


def chunks(plan: DenoisePlan) -> dict[str, bytes]:
    return stored_chunks(Path(plan.target.url))


def ledger_file(plan: DenoisePlan, pattern: str) -> Path:
    (found,) = Path(Ledger(plan.target.url).url).glob(pattern)
    return found


def record_texts(plan: DenoisePlan) -> dict[str, str]:
    return {file.name.split(".")[0]: file.read_text() for file in Path(plan.target.url).glob("nrrn/slabs/*")}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Faults:
    """What the network raises, by slab, on every try of it; counts tries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, Exception] = {}
        self.tries: Counter[str] = Counter()
        self.real = slab.denoise_voxels
        monkeypatch.setattr(slab, "denoise_voxels", self)

    def __call__(self, noisy: Any, task: SlabTask, network: Any, *rest: Any) -> Any:
        key, faults = task.slab.key, self.of
        self.tries[key] += 1

        class Failing(Passing):
            def __call__(self, stack: Any) -> Any:
                raise faults[key]

        return self.real(noisy, task, Failing() if key in faults else network, *rest)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def test_a_slab_that_memory_never_suffices_for_is_set_aside_and_mended_later(plan: DenoisePlan, faults: Faults) -> None:
    key = plan.slabs[7].key
    faults.of[key] = MemoryError("Unable to allocate 9 GiB")
    with pytest.raises(SlabsFailedError) as error:
        run(plan)
    assert error.value.exit_status == 3
    assert f"1 of {SLABS} slabs failed every time" in str(error.value)
    assert f"slab {key}: MemoryError: Unable to allocate 9 GiB" in str(error.value).splitlines()
    assert faults.tries == {s.key: ATTEMPTS if s.key == key else 1 for s in plan.slabs}
    assert Ledger(plan.target.url).failed() == {key}
    assert api.status(plan.group_url).failed == {key: "MemoryError: Unable to allocate 9 GiB"}
    assert verify(plan.group_url) == [f"slab {key} has no record: it is not done"]
    faults.of.clear()
    assert run(plan) == (1, [])
    assert not Ledger(plan.target.url).failed()
    assert verify(plan.group_url, deep=True) == []


def test_a_failure_that_a_killed_driver_did_not_clear_is_cleared_by_the_next(plan: DenoisePlan) -> None:
    run(plan)
    ledger = Ledger(plan.target.url)
    ledger.put_failure(plan.slabs[3].key, "of old")
    assert run(plan) == (0, [])
    assert ledger.failed() == set()


def meet(ends: dict[str, str], task: Callable[[Any], Any], item: Any) -> Any:
    """What becomes of an item on a worker that some kill, and some find without memory."""
    end = ends.get(item.slab.key) if isinstance(item, SlabTask) else None
    if end == "killed":
        time.sleep(0.2)  # so that a neighbour is in flight
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "memory":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, limits[1]))
        try:
            np.ones(2**28)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return task(item)


def test_a_slab_that_always_kills_its_worker_takes_no_neighbour_along(
    plan: DenoisePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nrrn_pipeline.runners.ATTEMPTS", 2)  # each takes two workers' lives
    killed, starved = plan.slabs[9].key, plan.slabs[2].key
    ends = {killed: "killed", starved: "memory"}

    def with_ends(client: Any, task: Callable[[Any], Any], items: Any) -> Iterator[Outcome]:
        return DaskRunner(client)(partial(meet, ends, task), items)

    with (
        local_client(1, slabs_each=2) as client,
        pytest.raises(SlabsFailedError, match=rf"2 of {SLABS} slabs failed") as error,
    ):
        list(run_plan(plan, partial(with_ends, client), "cpu"))
    lines = dict(line.removeprefix("slab ").split(": ", 1) for line in str(error.value).splitlines()[1:])
    assert lines.keys() == ends.keys()
    assert lines[starved].startswith("MemoryError: Unable to allocate 2.00 GiB")
    assert lines[killed].startswith("KilledWorker")
    assert Ledger(plan.target.url).done().keys() == {s.key for s in plan.slabs} - ends.keys()
    assert run(plan) == (2, [])
    assert verify(plan.group_url, deep=True) == []


@pytest.mark.parametrize("hours", [(0, -1), (1, 0), (-1, 1)])
def test_clocks_that_jump_change_nothing(
    plan: DenoisePlan, whole: dict[str, bytes], tmp_path: Path, hours: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, wrong = time.time, [0]
    for name in ("time.time", "nrrn_pipeline.writing.time"):
        monkeypatch.setattr(name, lambda: real() + 3600 * wrong[0])
    jumping = plan_denoise(plan.source, str(tmp_path / "jumping.zarr"), plan.denoiser, LAYOUT)
    wrong[0] = hours[0]
    started = run_plan(jumping, run_serially, "cpu")
    for _ in range(8):
        next(started)
    wrong[0] = hours[1]
    for _ in range(4):
        next(started)
    started.close()
    done = len(Ledger(jumping.target.url).done())
    assert run(jumping) == (SLABS - done, [])
    assert chunks(jumping) == whole
    assert verify(jumping.group_url, deep=True) == []


def test_a_lease_from_the_future_runs_out_like_any_other(plan: DenoisePlan) -> None:
    run(plan)
    ledger = Ledger(plan.target.url)
    left = {"owner": "x", "state": "running", "renewed": time.time() + 3600, "host": "elsewhere", "machine": "other"}
    storage.write_document(f"{ledger.url}/drivers/0000099.json", left)
    began = time.monotonic()
    told = list(run_plan(plan, run_serially, "cpu"))
    assert any("waiting" in progress.stage for progress in told)
    assert time.monotonic() - began < 60  # and not an hour


def test_a_record_cut_short_is_named_by_verify_and_by_the_run_that_mends_it(
    plan: DenoisePlan, whole: dict[str, bytes]
) -> None:
    key = plan.slabs[5].key
    cut(ledger_file(plan, f"slabs/{key}.*"))
    assert verify(plan.group_url) == [f"slab {key}: its record is cut short"]
    assert run(plan) == (1, [f"slab {key}: its record is cut short; it is done again"])
    assert chunks(plan) == whole
    assert verify(plan.group_url, deep=True) == []


@pytest.mark.parametrize("name", ["plan.json", "statistics.json", "drivers/*"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_ledger_cut_short_is_mended_by_the_same_command(
    plan: DenoisePlan, whole: dict[str, bytes], name: str, finished: bool, tmp_path: Path
) -> None:
    if not finished:
        plan = plan_denoise(plan.source, str(tmp_path / "part.zarr"), plan.denoiser, LAYOUT)
        part = run_plan(plan, run_serially, "cpu")
        while next(part).done < 5 or not Ledger(plan.target.url).done():
            pass
        part.close()
    done = len(Ledger(plan.target.url).done())
    file = ledger_file(plan, name)
    before = file.read_bytes()
    cut(file)
    if name == "plan.json":
        with pytest.raises(InputError, match=r"plan\.json is damaged"):
            verify(plan.group_url)
    assert run(plan) == (SLABS - done, [])
    if name != "drivers/*":
        assert file.read_bytes() == before
    assert chunks(plan) == whole
    assert verify(plan.group_url, deep=True) == []


def test_a_failure_cut_short_is_said_to_be_damaged_and_cleared_once_the_slab_is_done(
    plan: DenoisePlan, faults: Faults
) -> None:
    key = plan.slabs[7].key
    faults.of[key] = ValueError("no")
    with pytest.raises(SlabsFailedError):
        run(plan)
    cut(ledger_file(plan, "failed/*"))
    assert f"{key}.json is damaged" in api.status(plan.group_url).failed[key]
    faults.of.clear()
    assert run(plan) == (1, [])
    assert not Ledger(plan.target.url).failed()


def remove(shard: Path, _: Path) -> None:
    shard.unlink()


def cut_shard(shard: Path, _: Path) -> None:
    cut(shard)


def copy_over(shard: Path, other: Path) -> None:
    assert shard.stat().st_size == other.stat().st_size
    shard.write_bytes(other.read_bytes())


def copy_over_another_size(shard: Path, other: Path) -> None:
    other = other.parent / "1"
    assert shard.stat().st_size != other.stat().st_size
    shard.write_bytes(other.read_bytes())


def flip(shard: Path, _: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 8
    shard.write_bytes(data)


LISTED: list[Damage] = [remove, cut_shard, copy_over_another_size]  # found by listing alone
READ: list[Damage] = [copy_over, flip]  # only by reading


def damage_one(plan: DenoisePlan, damage: Damage) -> str:
    """The key of the slab that is damaged."""
    shard, other = (Path(plan.target.url) / name for name in ("c/2/1/0", "c/4/0/0"))
    damage(shard, other)
    return "z4-y32-x0"


@pytest.mark.parametrize("damage", LISTED)
def test_a_shard_of_another_size_is_found_by_listing_and_mended_by_the_same_command(
    plan: DenoisePlan, whole: dict[str, bytes], damage: Damage
) -> None:
    key, before = damage_one(plan, damage), record_texts(plan)
    (problem,) = verify(plan.group_url)
    assert problem.startswith(f"slab {key}: ")
    done, (note,) = run(plan)
    assert done == 1
    assert note == f"{problem}; it is done again"
    assert chunks(plan) == whole
    after = record_texts(plan)
    assert {k for k in after if after[k] != before[k]} == {key}
    assert verify(plan.group_url, deep=True) == []


@pytest.mark.parametrize("damage", READ)
def test_a_shard_of_its_own_size_is_found_by_reading_alone(
    plan: DenoisePlan, whole: dict[str, bytes], damage: Damage
) -> None:
    key = damage_one(plan, damage)
    assert verify(plan.group_url) == []
    (problem,) = verify(plan.group_url, deep=True)
    assert problem.startswith(f"slab {key}: c/2/1/0, voxels ")
    assert problem.endswith("is not what was written")


@pytest.mark.parametrize("damage", LISTED + READ)
def test_repair_denoises_the_damaged_slab_and_nothing_else(
    plan: DenoisePlan, whole: dict[str, bytes], damage: Damage, faults: Faults
) -> None:
    key, before = damage_one(plan, damage), record_texts(plan)
    expected = verify(plan.group_url, deep=True)
    problems, summary = repair(plan.group_url, options=OPTIONS)
    assert problems == expected
    assert summary is not None
    assert summary.resumed == SLABS - 1
    assert faults.tries == {key: 1}
    after = record_texts(plan)
    assert {k for k in after if after[k] != before[k]} == {key}
    assert chunks(plan) == whole
    assert verify(plan.group_url, deep=True) == []


def test_repair_of_what_is_whole_does_nothing(plan: DenoisePlan, whole: dict[str, bytes], faults: Faults) -> None:
    before = {file: file.stat().st_mtime_ns for file in Path(plan.group_url).rglob("*")}
    assert repair(plan.group_url, options=OPTIONS) == ([], None)
    assert {file: file.stat().st_mtime_ns for file in Path(plan.group_url).rglob("*")} == before
    assert not faults.tries


def test_repair_takes_weights_that_were_moved_and_no_others(
    plan: DenoisePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    damage_one(plan, flip)
    damaged = verify(plan.group_url, deep=True)
    moved = Path(plan.denoiser.path).rename(tmp_path / "moved.safetensors")
    for wrong in (None, tiny_weights(tmp_path / "other.safetensors", seed=3)):
        with pytest.raises(InputError):
            repair(plan.group_url, wrong, OPTIONS)
        assert verify(plan.group_url, deep=True) == damaged
    problems, _ = repair(plan.group_url, moved, OPTIONS)
    assert problems == damaged
    assert chunks(plan) == whole


def test_repair_refuses_a_source_that_changed(plan: DenoisePlan, whole: dict[str, bytes]) -> None:
    damage_one(plan, flip)
    damaged, before = chunks(plan), record_texts(plan)
    zarr.open_array(plan.source.url, mode="r+")[6] = 7
    with pytest.raises(InputError, match="has changed since"):
        repair(plan.group_url, options=OPTIONS)
    assert chunks(plan) == damaged
    after = record_texts(plan)
    assert after.items() <= before.items()
    assert len(after) >= SLABS - 1


def test_slabs_in_a_row_that_fail_for_one_reason_stop_the_run(plan: DenoisePlan, faults: Faults) -> None:
    keys = [s.key for s in plan.slabs]
    for i, key in enumerate(keys[3:], start=3):
        faults.of[key] = ValueError(f"no driver for device {i} at /dev/nvidia{i}")
    with pytest.raises(RunError, match=f"stopped: {BREAKER} slabs one after the other failed for one reason") as error:
        run(plan)
    assert not isinstance(error.value, SlabsFailedError)
    assert all(key in str(error.value) for key in keys[3 : 3 + BREAKER])
    assert faults.tries == {key: 1 if i < 3 else ATTEMPTS for i, key in enumerate(keys[: 3 + BREAKER])}


def test_slabs_that_fail_for_different_reasons_are_all_tried(plan: DenoisePlan, faults: Faults) -> None:
    for i, s in enumerate(plan.slabs):
        faults.of[s.key] = ValueError("red") if i % BREAKER == 0 else KeyError("blue")
    with pytest.raises(SlabsFailedError, match=f"{SLABS} of {SLABS} slabs failed"):
        run(plan)
    assert faults.tries == {s.key: ATTEMPTS for s in plan.slabs}


def test_one_slab_that_is_done_lets_a_run_go_on(plan: DenoisePlan, faults: Faults) -> None:
    failing = [s.key for i, s in enumerate(plan.slabs) if i % BREAKER]
    faults.of = dict.fromkeys(failing, ValueError("no"))
    with pytest.raises(SlabsFailedError, match=f"{len(failing)} of {SLABS} slabs failed"):
        run(plan)
    assert Ledger(plan.target.url).failed() == set(failing)
    assert faults.tries == {s.key: ATTEMPTS if s.key in failing else 1 for s in plan.slabs}
