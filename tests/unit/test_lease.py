"""One driver at a time, whatever clocks and machines do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from nrrn_pipeline import presence as presence_module
from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.lease import Lease, last_driver, wait_for_end
from nrrn_pipeline.presence import process_is_gone
from tests.servers import ObjectStore

LEASE_S = 1.0
SOON_S = 30.0
ELSEWHERE = {"owner": "other", "state": "running", "renewed": 0.0, "host": "far", "pid": 7, "machine": "far"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "RENEW_S", 0.05)
    monkeypatch.setattr(presence_module, "LEASE_S", LEASE_S)
    monkeypatch.setattr(presence_module, "LOOK_S", 0.02)


@contextmanager
def held(url: str, **facts: Any) -> Iterator[Lease]:
    lease = Lease(url, facts)
    list(lease.take())
    try:
        yield lease
    finally:
        lease.release("interrupted")


def drivers(url: str) -> list[str]:
    return sorted(storage.list_sizes(f"{url}/drivers"))


def put_driver(url: str, number: int = 1, **fields: Any) -> None:
    storage.write_document(f"{url}/drivers/{number:07}.json", ELSEWHERE | fields)


def wait_until_lost(lease: Lease) -> str:
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        try:
            lease.check()
        except RunError as error:
            return str(error)
        time.sleep(0.01)
    pytest.fail("it never noticed")


def seconds_to_take(url: str) -> float:
    started = time.monotonic()
    with held(url) as lease:
        taken = time.monotonic() - started
        lease.check()
    return taken


def test_the_first_takes_it_at_once(place: str) -> None:
    lease = Lease(place)
    assert list(lease.take()) == []
    lease.check()
    assert drivers(place) == ["0000001.json"]
    lease.release("complete")


def test_what_a_driver_says_of_itself_is_read(place: str) -> None:
    assert last_driver(place) is None
    with held(place, slabs=3) as lease:
        document = last_driver(place) or {}
        assert (document["owner"], document["state"], document["slabs"]) == (lease.owner, "running", 3)
        assert document["pid"] == os.getpid()


def test_facts_go_out_with_the_renewals(place: str) -> None:
    with held(place) as lease:
        lease.facts["slabs"] = 5
        deadline = time.monotonic() + SOON_S
        while (last_driver(place) or {}).get("slabs") != 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_second_is_refused_as_soon_as_the_first_renews(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with held(place) as lease, pytest.raises(InputError, match=f"another nrrn denoise is at work.*{os.getpid()}"):
        list(Lease(place).take())
    lease.check()
    assert drivers(place) == ["0000001.json"]


def test_looking_alone_refuses_too(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    assert list(wait_for_end(place)) == []
    with held(place), pytest.raises(InputError, match="another nrrn denoise is at work"):
        list(wait_for_end(place))


def test_a_silent_driver_elsewhere_is_replaced_after_the_lease_and_no_sooner(place: str) -> None:
    put_driver(place)
    lease, started = Lease(place), time.monotonic()
    waits = list(lease.take())
    assert time.monotonic() - started >= LEASE_S
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] < LEASE_S
    lease.release("complete")
    assert drivers(place) == ["0000002.json"]


@pytest.mark.parametrize("state", ["complete", "interrupted", "failed"])
def test_a_released_lease_is_taken_at_once_and_its_state_stays(place: str, state: str) -> None:
    lease = Lease(place)
    list(lease.take())
    lease.release(state)
    assert (last_driver(place) or {})["state"] == state
    with held(place):
        assert drivers(place) == ["0000002.json"]


def test_a_lease_that_was_refused_releases_nothing(place: str) -> None:
    with held(place) as first:
        second = Lease(place)
        with pytest.raises(InputError):
            list(second.take())
        second.release("failed")
        first.check()
        assert (last_driver(place) or {})["state"] == "running"


def test_a_driver_whose_process_was_killed_here_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    code = (
        "import sys, time; from nrrn_pipeline.lease import Lease; "
        "list(Lease(sys.argv[1]).take()); print(1, flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    with driver.stdout:
        assert driver.stdout.readline() == b"1\n"
        holder = last_driver(str(tmp_path)) or {}
        assert not process_is_gone(holder)
        driver.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + SOON_S
        while not process_is_gone(holder):  # a zombie already is: nobody has waited for it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert seconds_to_take(str(tmp_path)) < SOON_S
        driver.wait()
    assert process_is_gone(holder)


def test_a_number_that_went_to_another_process_does_not_keep_a_dead_driver_alive(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with held(place):
        living = last_driver(place) or {}
    put_driver(place, 2, **living | {"state": "running", "began": living["began"] - 1})
    assert seconds_to_take(place) < SOON_S


@pytest.mark.parametrize(
    "change", [{"machine": "other"}, {"machine": ""}, {"machine": None}, {"pid": None}, {"pid": "1"}]
)
def test_a_process_that_cannot_be_seen_is_not_gone(tmp_path: Path, change: dict[str, Any]) -> None:
    with held(str(tmp_path)):
        gone = (last_driver(str(tmp_path)) or {}) | {"began": -1}
    assert process_is_gone(gone)
    assert not process_is_gone(gone | change)


def test_a_driver_that_was_overtaken_notices(place: str) -> None:
    lease = Lease(place)
    list(lease.take())
    put_driver(place, 2)
    assert "another driver has taken over; what is done is kept" in wait_until_lost(lease)
    before = last_driver(place)
    lease.release("complete")
    assert last_driver(place) == before


def test_a_driver_whose_output_is_deleted_notices_and_writes_nothing_more(place: str) -> None:
    lease = Lease(place)
    list(lease.take())
    storage.remove_tree(place)
    assert "the output was deleted under the run" in wait_until_lost(lease)
    lease.release("complete")
    assert not storage.exists(place)


def test_storage_that_is_away_for_a_while_costs_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, asked = storage.write_document, threading.Event()

    def away(*_: object, **__: object) -> bool:
        asked.set()
        raise storage.StorageError("away")

    with held(str(tmp_path)) as lease:
        monkeypatch.setattr(storage, "write_document", away)
        assert asked.wait(SOON_S)
        monkeypatch.setattr(storage, "write_document", write)
        before = last_driver(str(tmp_path))
        deadline = time.monotonic() + SOON_S
        while last_driver(str(tmp_path)) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lease.check()


def of_many_takers_those_who_won(url: str) -> list[str]:
    ready = threading.Barrier(8)

    def take(lease: Lease) -> bool:
        ready.wait()
        try:
            list(lease.take())
        except InputError:
            return False
        return True

    leases = [Lease(url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        winners = [lease for lease, won in zip(leases, pool.map(take, leases), strict=True) if won]
    time.sleep(4 * presence_module.RENEW_S)  # whoever was overtaken notices
    for lease in winners:
        lease.release("complete")
    assert [lease.presence.lost for lease in winners] == [""]
    return [lease.owner for lease in winners]


@pytest.mark.parametrize("before", [None, "complete", "running"])
def test_of_several_takers_at_a_time_one_wins(place: str, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 3 * LEASE_S)  # however late a renewal comes on a busy machine
    if before:
        put_driver(place, state=before)
    (winner,) = of_many_takers_those_who_won(place)
    assert (last_driver(place) or {})["owner"] == winner
    assert len(drivers(place)) == 1


def test_of_several_takers_one_wins_on_a_real_object_store(seaweed: ObjectStore) -> None:
    seaweed.make_bucket("lease")
    with seaweed.in_use():
        (winner,) = of_many_takers_those_who_won("s3://lease/0/nrrn")
        assert (last_driver("s3://lease/0/nrrn") or {})["owner"] == winner


def test_a_taker_that_others_have_passed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read that 1 has ended; before it writes 2, another took 2 and ended, and a third took 3 and removed 2."""
    url, write = str(tmp_path), storage.write_document
    put_driver(url, 1, state="complete")
    third = Lease(url)

    def late(*arguments: Any, **options: Any) -> bool:
        monkeypatch.setattr(storage, "write_document", write)
        storage.remove_file(f"{url}/drivers/0000001.json")
        put_driver(url, 2, state="failed")
        list(third.take())
        return write(*arguments, **options)

    monkeypatch.setattr(storage, "write_document", late)
    first = Lease(url)
    try:
        with pytest.raises(InputError, match="another nrrn denoise is at work"):
            list(first.take())
        third.check()
    finally:
        first.release("failed")
        third.release("complete")


@pytest.mark.parametrize("shift", [-1e9, -3600.0, 3600.0, 1e9])
def test_clocks_set_back_or_forward_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    now, url = time.time, str(tmp_path)
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with held(url) as lease:
        monkeypatch.setattr(time, "time", lambda: now() + shift)
        with pytest.raises(InputError, match="another nrrn denoise is at work"):
            list(Lease(url).take())
        lease.check()
    monkeypatch.setattr(presence_module, "LEASE_S", LEASE_S)
    put_driver(url, 5, renewed=now())
    assert seconds_to_take(url) >= LEASE_S


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"state": "complete"}', storage.sealed(ELSEWHERE)[:-2]])
def test_a_drivers_file_that_cannot_be_read_is_waited_for(place: str, content: bytes) -> None:
    storage.write_file(f"{place}/drivers/0000001.json", content)
    assert last_driver(place) is None
    assert seconds_to_take(place) >= LEASE_S
    assert drivers(place) == ["0000002.json"]


def test_old_numbers_are_removed_and_other_files_let_be(place: str) -> None:
    for number in (1, 2, 11):
        put_driver(place, number, state="complete")
    storage.write_file(f"{place}/drivers/notes.txt", b"x")
    with held(place):
        assert drivers(place) == ["0000012.json", "notes.txt"]


def test_waiting_ends_when_the_driver_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    put_driver(str(tmp_path))
    for waited in wait_for_end(str(tmp_path)):
        assert waited < SOON_S
        put_driver(str(tmp_path), state="complete")


@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_drivers_file_does_more_than_refuse(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 0.0)
    url = f"memory://drivers/{uuid.uuid4().hex}"
    storage.write_file(f"{url}/drivers/0000001.json", content)
    assert last_driver(url) is None
    assert list(wait_for_end(url)) == []


@given(
    document=st.dictionaries(st.sampled_from(["owner", "state", "renewed", "host", "pid", "machine", "began"]), JSON),
    here=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_a_driver_says_does_more_than_refuse(
    monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], here: bool
) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 0.0)
    url = f"memory://drivers/{uuid.uuid4().hex}"
    if here:
        document["machine"] = presence_module._machine()
    storage.write_document(f"{url}/drivers/0000001.json", document)
    assert isinstance(last_driver(url), dict)
    assert list(wait_for_end(url)) == []


@given(
    name=st.text(st.sampled_from("0123456789\u0663\u00b2"), min_size=1).map(lambda digits: f"{digits}.json")
    | st.text(st.sampled_from("0189\u0663"), min_size=1)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@example("9")
@example("12345678.json")
@example("9" * 200)
@example("0000012.json")
@example("\u0663\u0663\u0663\u0663\u0663\u0663\u0663.json")
def test_no_number_among_the_drivers_holds_a_run_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 0.0)
    url = f"memory://drivers/{uuid.uuid4().hex}"
    storage.write_file(f"{url}/drivers/{name}", b"x")
    assume(name != "9999999.json")  # after which there is no other
    with held(url) as lease:
        assert f"{lease.number:07}.json" in drivers(url)


def test_after_the_last_number_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 0.0)
    put_driver(str(tmp_path), 9_999_999, state="complete")
    with pytest.raises(InputError, match=r"drivers holds 9999999\.json: no run has had so many; delete it"):
        list(Lease(str(tmp_path)).take())


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_no_name_among_the_drivers_does_harm(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 0.0)
    url = f"memory://drivers/{uuid.uuid4().hex}"
    storage.write_file(f"{url}/drivers/{name}", b"x")
    with held(url) as lease:
        assert f"{lease.number:07}.json" in drivers(url)
