"""What an output remembers of its run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.planning import DenoisePlan, Weights, plan_denoise
from nrrn_pipeline.slab import peak_memory_bytes
from nrrn_pipeline.statistics import SliceStatistics
from nrrn_pipeline.volume import Volume


@pytest.fixture(params=["local", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "local":
        yield Ledger(str(tmp_path / "out.zarr" / "0"))
        return
    yield Ledger("memory://ledger/out.zarr/0")
    files = fsspec.filesystem("memory")
    if files.exists("/ledger"):
        files.rm("/ledger", recursive=True)


def _plan(ledger: Ledger) -> DenoisePlan:
    source = Volume("/raw.zarr", (20, 64, 64), "uint8", (8, 32, 32), (8, 32, 32))
    return plan_denoise(source, ledger.array_url.removesuffix("/0"), Weights("/w", "cafe", 1, 4))


def _record(key: str = "z0-y0-x0") -> Record:
    return Record(key, voxels=20, seconds=1 / 3, finished=1.7e9 + 0.1, worker="host:1", peak_memory_bytes=2**33)


def test_a_new_output_has_no_settings_and_nothing_done(ledger: Ledger) -> None:
    assert ledger.settings() is None
    assert ledger.done() == set()
    assert ledger.statistics() is None
    assert list(ledger.records()) == []


def test_an_output_remembers_the_settings_it_was_begun_with(ledger: Ledger) -> None:
    ledger.begin(_plan(ledger))
    assert ledger.settings() == _plan(ledger).settings


def test_the_same_plan_changes_nothing(ledger: Ledger) -> None:
    ledger.begin(_plan(ledger))
    assert ledger.changes(_plan(ledger)) == []


def test_every_changed_setting_is_told_with_its_old_and_new_value(ledger: Ledger) -> None:
    plan = _plan(ledger)
    ledger.begin(plan)
    other = replace(plan, tile=64, weights=replace(plan.weights, sha256="beef"))
    assert set(ledger.changes(other)) == {"tile was 256, now 64", "weights sha256 was cafe, now beef"}


def test_a_setting_that_an_older_output_lacks_is_a_change(ledger: Ledger) -> None:
    storage.write_document(f"{ledger.url}/plan.json", {"settings": {"older": 1}})
    changes = ledger.changes(_plan(ledger))
    assert "older was 1, now None" in changes
    assert "tile was None, now 256" in changes


def test_what_is_recorded_is_done(ledger: Ledger) -> None:
    ledger.put(_record("z0-y0-x0"))
    ledger.put(_record("z8-y0-x0"))
    assert ledger.done() == {"z0-y0-x0", "z8-y0-x0"}


def test_records_come_back_as_they_were(ledger: Ledger) -> None:
    records = [_record("z0-y0-x0"), _record("z8-y0-x0")]
    for record in reversed(records):
        ledger.put(record)
    assert list(ledger.records()) == records


def test_a_slab_done_twice_is_recorded_once(ledger: Ledger) -> None:
    ledger.put(_record())
    ledger.put(replace(_record(), seconds=2.0))
    assert list(ledger.records()) == [replace(_record(), seconds=2.0)]


def test_a_record_that_was_not_written_whole_counts_for_nothing(ledger: Ledger) -> None:
    ledger.put(_record("z0-y0-x0"))
    with fsspec.open(f"{ledger.url}/slabs/z8-y0-x0.json.0123.partial", "wb") as file:
        file.write(b'{"key": "z8')
    assert ledger.done() == {"z0-y0-x0"}


def test_a_deleted_record_is_not_done_any_more(ledger: Ledger) -> None:
    ledger.put(_record("z0-y0-x0"))
    assert ledger.done()
    fsspec.core.url_to_fs(ledger.url)[0].rm(f"{ledger.url}/slabs/z0-y0-x0.json")
    assert ledger.done() == set()


def test_statistics_come_back_to_the_last_bit(ledger: Ledger) -> None:
    statistics = SliceStatistics(3, (0.1 + 0.2, 1 / 3, 65535.0), (0.0, 2**-1074, 1e300))
    ledger.put_statistics(statistics)
    assert ledger.statistics() == statistics


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"settings": 5}', '{"settings": "none"}', "\xff"])
def test_a_damaged_plan_says_so(ledger: Ledger, text: str) -> None:
    storage.write_file(f"{ledger.url}/plan.json", text.encode("latin-1"))
    with pytest.raises(InputError, match=r"plan\.json is damaged .*--overwrite"):
        ledger.settings()


def test_a_process_knows_the_most_memory_it_held() -> None:
    before = peak_memory_bytes()
    held = bytearray(before + 2**26)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_bytes() >= before + 2**26
