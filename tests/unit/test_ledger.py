"""What an output remembers of its run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nrrn_pipeline import storage
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.volume import Volume

UNIT = Box(Span(0, 8), Span(0, 32), Span(0, 32))
OTHER_UNIT = Box(Span(0, 8), Span(0, 32), Span(32, 64))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, "0:8,0:8,0:8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def fields(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Tables that hold some of these names, with anything under each."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, JSON))


@pytest.fixture
def ledger(place: str) -> Ledger:
    return Ledger(f"{place}/out.zarr/0")


def _plan(ledger: Ledger) -> DenoisePlan:
    source = Volume("/raw.zarr", (20, 64, 64), "uint8", (8, 32, 32), (8, 32, 32))
    return plan_denoise(source, ledger.array_url.removesuffix("/0"), Weights("/w", "cafe", 1, 4))


def _record(key: str = "z0-y0-x0") -> Record:
    objects = {"c/0/0/0": (100, "00c0ffee"), "c/0/0/1": (23, "0000beef")}
    return Record(
        key, voxels=20, seconds=1 / 3, finished=1.7e9 + 0.1, worker="host:1", peak_memory_bytes=2**33, objects=objects
    )


def test_a_new_output_has_no_settings_and_nothing_done(ledger: Ledger) -> None:
    assert not ledger.begun()
    assert ledger.settings() is None
    assert ledger.done() == {}
    assert ledger.failed() == set()
    assert ledger.statistics() is None


def test_an_output_remembers_the_settings_it_was_begun_with(ledger: Ledger) -> None:
    ledger.begin(_plan(ledger))
    assert ledger.begun()
    assert ledger.settings() == _plan(ledger).settings


def test_beginning_again_with_the_same_plan_changes_nothing(ledger: Ledger) -> None:
    ledger.begin(_plan(ledger))
    ledger.begin(_plan(ledger))
    assert ledger.changes(_plan(ledger)) == []


def test_an_output_is_not_begun_again_with_another_plan(ledger: Ledger) -> None:
    plan = _plan(ledger)
    ledger.begin(plan)
    with pytest.raises(InputError, match=r"other settings: tile was 72, now 64\. Give the old"):
        ledger.begin(replace(plan, tile=64))
    assert ledger.settings() == plan.settings


def test_every_changed_setting_is_told_with_its_old_and_new_value(ledger: Ledger) -> None:
    plan = _plan(ledger)
    ledger.begin(plan)
    other = replace(plan, tile=64, denoiser=replace(plan.denoiser, sha256="beef"))
    assert set(ledger.changes(other)) == {"tile was 72, now 64", "weights sha256 was cafe, now beef"}


def test_a_setting_that_an_older_output_lacks_is_a_change(ledger: Ledger) -> None:
    storage.write_document(f"{ledger.url}/plan.json", {"settings": {"older": 1}})
    changes = ledger.changes(_plan(ledger))
    assert "older was 1, now None" in changes
    assert "tile was None, now 72" in changes


def test_an_output_that_was_deleted_meanwhile_is_told(ledger: Ledger) -> None:
    with pytest.raises(InputError, match=r"out\.zarr was deleted or moved under the run"):
        ledger.refuse_others(_plan(ledger))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"settings": 5}', '{"settings": "none"}', "\xff"])
def test_a_damaged_plan_says_so_until_it_is_mended(ledger: Ledger, text: str) -> None:
    storage.write_file(f"{ledger.url}/plan.json", text.encode("latin-1"))
    for read in (ledger.settings, ledger.slabs):
        with pytest.raises(InputError, match=r"plan\.json is damaged .*--overwrite"):
            read()
    ledger.mend(_plan(ledger))
    assert ledger.settings() == _plan(ledger).settings


def test_the_slabs_are_those_of_the_plan(ledger: Ledger) -> None:
    plan = _plan(ledger)
    ledger.begin(plan)
    assert ledger.slabs() == {slab.key: slab.keep for slab in plan.slabs}


def test_without_a_ledger_there_are_no_slabs(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="was not made by nrrn: it has no ledger"):
        ledger.slabs()


def test_a_record_comes_back_as_it_was(ledger: Ledger) -> None:
    records = [_record("z0-y0-x0"), _record("z0-y0-x01"), _record("z8-y0-x0")]
    for record in records:
        ledger.put(record)
    assert [ledger.records(record.key) for record in records] == [[record] for record in records]


def test_a_records_name_holds_its_claim_and_its_own_length(ledger: Ledger) -> None:
    ledger.put(_record())
    ((name, size),) = storage.list_sizes(f"{ledger.url}/slabs").items()
    assert name == f"z0-y0-x0.123.{size}.json"


def test_what_is_recorded_is_done_with_the_bytes_it_claims(ledger: Ledger) -> None:
    ledger.put(_record("z0-y0-x0"))
    ledger.put(replace(_record("z8-y0-x0"), objects={}))
    assert ledger.done() == {"z0-y0-x0": {123}, "z8-y0-x0": {0}}


def test_a_slab_done_twice_alike_is_recorded_once(ledger: Ledger) -> None:
    ledger.put(_record())
    ledger.put(replace(_record(), seconds=1 / 7))
    assert ledger.done() == {"z0-y0-x0": {123}}


def test_a_record_that_was_not_written_whole_counts_for_nothing(ledger: Ledger) -> None:
    ledger.put(_record("z0-y0-x0"))
    storage.write_file(f"{ledger.url}/slabs/z8-y0-x0.1.9.json.0123.partial", b'{"key": "z8')
    assert ledger.done().keys() == {"z0-y0-x0"}


def test_a_forgotten_slab_is_not_done_and_its_neighbours_are(ledger: Ledger) -> None:
    for key, stored in (("z0-y0-x0", 100), ("z0-y0-x0", 200), ("z0-y0-x01", 100)):
        ledger.put(replace(_record(key), objects={"c/0/0/0": (stored, "00c0ffee")}))
    ledger.forget("z0-y0-x0")
    assert ledger.done() == {"z0-y0-x01": {100}}
    with pytest.raises(ValueError, match="slab z0-y0-x0 has no record"):
        ledger.records("z0-y0-x0")


def _cut_short(ledger: Ledger) -> None:
    (name,) = storage.list_sizes(f"{ledger.url}/slabs")
    data = storage.read_file(f"{ledger.url}/slabs/{name}")
    assert data
    storage.write_file(f"{ledger.url}/slabs/{name}", data[:-1])


def _rename(name: str) -> Callable[[Ledger], None]:
    def rename(ledger: Ledger) -> None:
        ledger.forget("z0-y0-x0")
        storage.write_file(f"{ledger.url}/slabs/{name}", b"x" * 123)

    return rename


@pytest.mark.parametrize(
    "damage",
    [
        _cut_short,
        *map(_rename, ["z0-y0-x0.json", "z0-y0-x0.123.json", "z0-y0-x0.123.9.json", "z0-y0-x0.123.123.1.json"]),
        *map(_rename, ["z0-y0-x0.-1.123.json", "z0-y0-x0.a.123.json", f"z0-y0-x0.{'9' * 90}.123.json"]),
    ],
)
def test_a_record_cut_short_or_misnamed_is_torn(ledger: Ledger, damage: Callable[[Ledger], None]) -> None:
    ledger.put(_record())
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT}}.items(), {UNIT: 123}) == {}
    damage(ledger)
    assert ledger.done() == {"z0-y0-x0": {-1}}
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT}}.items(), {UNIT: 123}) == {
        "z0-y0-x0": "its record is cut short"
    }


@pytest.mark.parametrize(
    ("stored", "wrong"),
    [
        ({UNIT: 100, OTHER_UNIT: 23}, None),
        ({UNIT: 99, OTHER_UNIT: 23}, "its shards have 122 bytes, not the 123 that were written"),
        ({UNIT: 100}, "1 of its shards are gone"),
        ({}, "2 of its shards are gone"),
    ],
)
def test_a_slab_is_torn_unless_storage_lists_all_that_it_claims(
    ledger: Ledger, stored: dict[Box, int], wrong: str | None
) -> None:
    ledger.put(_record())
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT, OTHER_UNIT}}.items(), stored).get("z0-y0-x0") == wrong


def test_of_two_records_of_a_slab_one_that_fits_is_enough(ledger: Ledger) -> None:
    for stored in (100, 123):
        ledger.put(replace(_record(), objects={"c/0/0/0": (stored, "00c0ffee")}))
    assert ledger.done() == {"z0-y0-x0": {100, 123}}
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT}}.items(), {UNIT: 100}) == {}
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT}}.items(), {UNIT: 101}).keys() == {"z0-y0-x0"}


def test_records_of_slabs_that_the_plan_lacks_are_not_torn(ledger: Ledger) -> None:
    ledger.put(_record("z999-y0-x0"))
    assert ledger.torn(ledger.done(), {"z0-y0-x0": {UNIT}}.items(), {UNIT: 1}) == {}


def test_a_record_whose_bytes_changed_is_damaged(ledger: Ledger) -> None:
    ledger.put(_record())
    (name,) = storage.list_sizes(f"{ledger.url}/slabs")
    data = storage.read_file(f"{ledger.url}/slabs/{name}") or b""
    storage.write_file(f"{ledger.url}/slabs/{name}", data.replace(b"20", b"21"))
    with pytest.raises(ValueError, match="the record of slab z0-y0-x0 is damaged"):
        ledger.records("z0-y0-x0")


def test_failures_are_kept_with_their_reasons_until_they_are_cleared(ledger: Ledger) -> None:
    ledger.put_failure("z0-y0-x0", "no memory")
    ledger.put_failure("z8-y0-x0", "no light")
    assert ledger.failed() == {"z0-y0-x0", "z8-y0-x0"}
    assert ledger.failure("z8-y0-x0")[0] == "no light"
    ledger.clear_failure("z0-y0-x0")
    ledger.clear_failure("z0-y0-x0")
    assert ledger.failed() == {"z8-y0-x0"}
    assert ledger.failure("z0-y0-x0")[0] == "unknown"


def test_a_reason_that_is_damaged_says_so(ledger: Ledger) -> None:
    storage.write_file(f"{ledger.url}/failed/z0-y0-x0.json", b"{")
    assert ledger.failed() == {"z0-y0-x0"}
    assert "damaged" in ledger.failure("z0-y0-x0")[0]


def test_statistics_come_back_to_the_last_bit(ledger: Ledger) -> None:
    statistics = SliceStatistics(3, (0.1 + 0.2, 1 / 3, 65535.0), (0.0, 2**-1074, 1e300))
    ledger.put_statistics(statistics)
    assert ledger.statistics() == statistics


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b"3", b"4")])
def test_damaged_statistics_are_none_so_that_they_are_measured_again(
    ledger: Ledger, damage: Callable[[bytes], bytes]
) -> None:
    ledger.put_statistics(SliceStatistics(3, (1.0,), (2.0,)))
    data = storage.read_file(f"{ledger.url}/statistics.json") or b""
    storage.write_file(f"{ledger.url}/statistics.json", damage(data))
    assert ledger.statistics() is None


HOSTILE = Ledger("memory://hostile/out.zarr/0")
DAMAGED = st.binary() | JSON.map(lambda value: json.dumps(value).encode())


def sealed(settings: Any) -> bytes:
    return storage.sealed({"settings": settings})


@given(stored=DAMAGED | fields("roi", "slab").map(sealed))
@example(sealed({"roi": "0:8,0:8,0:8", "slab": [float("inf"), 1, 1]}))
@example(sealed({"roi": f"0:{2**70},0:8,0:8", "slab": [8, 8, 8]}))
@example(sealed({"roi": "8:0,0:8,0:8", "slab": [8, 8, 8]}))
@example(sealed({"roi": "0:8,0:8,0:8", "slab": [0, 8, 8]}))
@example(b"[" * 100_000)
def test_no_plan_file_does_more_than_refuse(stored: bytes) -> None:
    storage.write_file(f"{HOSTILE.url}/plan.json", stored)
    for read in (HOSTILE.settings, HOSTILE.slabs, lambda: HOSTILE.changes(_plan(HOSTILE))):
        try:
            read()
        except InputError as error:
            assert "plan.json is damaged" in str(error)  # noqa: PT017


@pytest.mark.timeout(10)
def test_a_plan_file_of_countless_slabs_is_refused_at_once() -> None:
    storage.write_file(f"{HOSTILE.url}/plan.json", sealed({"roi": "0:99999,0:99999,0:99999", "slab": [1, 1, 1]}))
    with pytest.raises(InputError, match=r"plan\.json is damaged"):
        HOSTILE.slabs()


@given(stored=DAMAGED | fields("first_z", "mean", "std").map(storage.sealed))
@example(storage.sealed({"first_z": float("inf"), "mean": [], "std": []}))
@example(storage.sealed({"first_z": 0, "mean": [10**400], "std": [1]}))
@example(storage.sealed({"first_z": 0, "mean": [1, 2], "std": [1]}))
def test_no_statistics_file_does_more_than_count_for_nothing(stored: bytes) -> None:
    storage.write_file(f"{HOSTILE.url}/statistics.json", stored)
    statistics = HOSTILE.statistics()
    assert statistics is None or len(statistics.mean) == len(statistics.std)


@given(stored=DAMAGED | fields(*asdict(_record())).map(storage.sealed))
@example(storage.sealed(asdict(_record()) | {"objects": {"c/0": [float("inf"), "crc"]}}))
@example(storage.sealed(asdict(_record()) | {"objects": []}))
@example(storage.sealed(asdict(_record()) | {"more": 1}))
def test_no_record_file_does_more_than_refuse(stored: bytes) -> None:
    storage.remove_tree(f"{HOSTILE.url}/slabs")
    storage.write_file(f"{HOSTILE.url}/slabs/z0.0.{len(stored)}.json", stored)
    assert HOSTILE.done() == {"z0": {0}}
    try:
        assert all(isinstance(record, Record) for record in HOSTILE.records("z0"))
    except ValueError as error:
        assert "the record of slab z0 is damaged" in str(error)  # noqa: PT017


@given(stored=DAMAGED | fields("key", "reason").map(storage.sealed))
def test_no_failure_file_does_more_than_give_an_odd_reason(stored: bytes) -> None:
    storage.write_file(f"{HOSTILE.url}/failed/z0.json", stored)
    assert isinstance(HOSTILE.failure("z0")[0], str)


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1))
def test_no_name_among_the_records_does_harm(name: str) -> None:
    folder = f"{HOSTILE.url}/slabs"
    storage.remove_tree(folder)
    HOSTILE.put(_record())
    storage.write_file(f"{folder}/{name}", b"x")
    assert HOSTILE.done()["z0-y0-x0"] >= {123}
