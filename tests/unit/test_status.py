"""How far a run is, told from its ledger alone."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nrrn_pipeline import presence as presence_module
from nrrn_pipeline import storage
from nrrn_pipeline.api import Status, status
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.lease import Lease
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.places import files_of
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.presence import LEASE_S
from nrrn_pipeline.slabs import Layout
from nrrn_pipeline.volume import Volume

WORK = {"slabs": 2, "voxels": 4000, "seconds": 8.0}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def begun(output: str, done: int = 0) -> tuple[DenoisePlan, Ledger]:
    """A ledger of eight slabs, so many of them done; its source does not exist, nor does a voxel."""
    source = Volume("/nowhere/raw.zarr", (16, 64, 64), "uint8", (8, 32, 32), (8, 32, 32))
    layout = Layout((8, 32, 32), (8, 32, 32), (8, 32, 32))
    plan = plan_denoise(source, output, Weights("/nowhere/w", "cafe", 1, 4), layout)
    ledger = Ledger(plan.target.url)
    ledger.begin(plan)
    for slab in plan.slabs[:done]:
        ledger.put(Record(slab.key, 1, 1.0, 0.0, "host:1", 1, {"c/0/0/0": (1, "00c0ffee")}))
    return plan, ledger


def put_driver(ledger: Ledger, **fields: Any) -> None:
    document = {"owner": "o", "state": "running", "renewed": time.time(), "host": "far", "pid": 7, "machine": "far"}
    storage.write_document(f"{ledger.url}/drivers/0000001.json", document | fields)


@pytest.fixture
def output(place: str) -> str:
    return f"{place}/out.zarr"


def test_a_run_that_has_not_begun_has_no_driver(output: str) -> None:
    begun(output, done=1)
    assert status(output) == Status("stopped", done=1, total=8)


def test_an_output_without_ledger_is_refused(output: str) -> None:
    with pytest.raises(InputError, match=r"out\.zarr has no ledger yet"):
        status(output)
    storage.write_file(f"{output}/zarr.json", b"{}")
    with pytest.raises(InputError, match=r"out\.zarr has no ledger yet"):
        status(output)


def test_a_damaged_ledger_is_refused(output: str) -> None:
    _, ledger = begun(output)
    storage.write_file(f"{ledger.url}/plan.json", b"{")
    with pytest.raises(InputError, match=r"plan\.json is damaged"):
        status(output)


def test_a_run_here_is_running_until_it_is_released(output: str) -> None:
    _, ledger = begun(output, done=3)
    lease = Lease(ledger.url, dict(WORK))
    list(lease.take())
    try:
        now = status(output)
    finally:
        lease.release("interrupted")
    assert now.state.startswith("running: process ")
    assert (now.done, now.total) == (3, 8)
    after = status(output)
    assert after.state.startswith("stopped: process ")
    assert after.state.endswith(" was interrupted")
    assert after.seconds_left is None


def test_rate_and_time_left_are_those_of_this_run(output: str) -> None:
    _, ledger = begun(output, done=3)
    put_driver(ledger, **WORK)
    now = status(output)
    assert now.state == "running: process 7 on far"
    assert now.rate == 4000 / 8.0
    assert now.seconds_left == (8 - 3) * 8.0 / 2


@pytest.mark.parametrize(
    "facts", [{}, {"slabs": 0, "voxels": 0, "seconds": 0.0}, {"slabs": 0, "voxels": 0, "seconds": 2.0}]
)
def test_before_the_first_slab_nothing_is_known_of_the_time_left(output: str, facts: dict[str, Any]) -> None:
    _, ledger = begun(output)
    put_driver(ledger, **facts)
    now = status(output)
    assert now.state == "running: process 7 on far"
    assert now.seconds_left is None
    assert not now.rate


@pytest.mark.parametrize(
    ("state", "said"), [("interrupted", "was interrupted"), ("failed", "failed"), ("complete", "ended")]
)
def test_a_run_that_stopped_says_how(output: str, state: str, said: str) -> None:
    _, ledger = begun(output, done=3)
    put_driver(ledger, state=state, **WORK)
    now = status(output)
    assert now.state == f"stopped: process 7 on far {said}"
    assert now.seconds_left is None


def test_a_run_that_was_killed_here_says_so(output: str) -> None:
    _, ledger = begun(output, done=3)
    put_driver(ledger, machine=presence_module._machine(), pid=1, began=-1, host="here")
    assert status(output).state == "stopped: process 1 on here was killed"


@pytest.mark.parametrize("state", ["running", "complete", "interrupted", "failed"])
def test_a_run_with_all_slabs_is_complete_only_if_its_driver_said_so(output: str, state: str) -> None:
    _, ledger = begun(output, done=8)
    put_driver(ledger, state=state)
    now = status(output)
    assert (now.done, now.total) == (8, 8)
    said = {"running": "running: process 7 on far", "complete": "complete"}
    assert now.state.startswith(said.get(state, "stopped: process 7 on far"))


def test_slabs_that_failed_are_told_with_their_reasons(output: str) -> None:
    plan, ledger = begun(output, done=6)
    for slab in plan.slabs[6:]:
        ledger.put_failure(slab.key, f"no light at {slab.key}")
    put_driver(ledger, state="failed")
    now = status(output)
    assert now.state.endswith("failed")
    assert now.failed == {slab.key: f"no light at {slab.key}" for slab in plan.slabs[6:]}


def test_a_driver_that_has_been_silent_for_a_lease_gives_no_sign_of_life(output: str) -> None:
    _, ledger = begun(output)
    put_driver(ledger, renewed=time.time() - LEASE_S / 2)
    assert status(output).state.startswith("running")
    put_driver(ledger, renewed=time.time() - 10 * LEASE_S)
    assert status(output).state.startswith("no sign of life from process 7 on far for 60")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"state": "running"}'])
def test_a_drivers_file_that_cannot_be_read_hides_no_progress(output: str, content: bytes) -> None:
    _, ledger = begun(output, done=3)
    storage.write_file(f"{ledger.url}/drivers/0000001.json", content)
    now = status(output)
    assert (now.done, now.total, now.state) == (3, 8, "stopped")


def test_status_looks_at_the_ledger_alone(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, ledger = begun(output, done=3)
    ledger.put_failure(plan.slabs[5].key, "no light")
    put_driver(ledger, **WORK)
    asked = []

    def watch(url: str, fresh: bool = False) -> Any:
        asked.append(url)
        return files_of(url, fresh)

    monkeypatch.setattr(storage, "files_of", watch)
    status(output)
    assert len(asked) < 12
    ledgers = (ledger.url, f"{plan.group_url}/1/nrrn")  # is there a level?
    assert [url for url in asked if not url.startswith(ledgers)] == []


@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_drivers_file_does_more_than_refuse(content: bytes) -> None:
    output = "memory://status/a.zarr"
    _, ledger = begun(output, done=3)
    storage.write_file(f"{ledger.url}/drivers/0000001.json", content)
    assert status(output).done == 3


@given(
    fields=st.fixed_dictionaries(
        {"state": st.sampled_from(["running", "failed"]) | JSON},
        optional=dict.fromkeys(["renewed", "host", "pid", "machine", "began", "slabs", "voxels", "seconds"], JSON),
    )
)
@example({"seconds": 10**400, "slabs": 1, "voxels": 1})
@example({"renewed": 10**400})
@example({"seconds": float("nan"), "slabs": float("inf"), "voxels": -1, "renewed": float("nan")})
def test_nothing_that_a_driver_says_hides_progress(fields: dict[str, Any]) -> None:
    output = "memory://status/b.zarr"
    _, ledger = begun(output, done=3)
    put_driver(ledger, **fields)
    now = status(output)
    assert (now.done, now.total) == (3, 8)
    assert isinstance(now.state, str)
