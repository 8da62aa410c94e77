from __future__ import annotations

import json
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline import storage
from nrrn_pipeline.errors import StorageError
from tests.unit.conftest import Meddle

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_a_document_is_read_as_it_was_written(place: str) -> None:
    document = {"z": [1, 2.5, None], "a": {"text": "\u00b5m \ud800"}}
    assert storage.write_document(f"{place}/a.json", document)
    assert storage.read_document(f"{place}/a.json") == document
    assert storage.read_document(f"{place}/b.json") is None


def test_a_new_document_is_written_once(place: str) -> None:
    assert storage.write_document(f"{place}/a.json", {"a": 1}, new=True)
    assert not storage.write_document(f"{place}/a.json", {"a": 2}, new=True)
    assert storage.read_document(f"{place}/a.json") == {"a": 1}


@given(document=st.dictionaries(st.text().filter(lambda name: name != "digest"), JSON))
def test_any_document_survives_storage(document: dict[str, Any]) -> None:
    storage.write_document("memory://documents/a.json", document)
    assert storage.read_document("memory://documents/a.json") == document


@given(data=st.data())
def test_a_document_with_any_byte_changed_or_cut_off_is_damaged(data: st.DataObject) -> None:
    document = {"key": "z0-y0-x0", "voxels": 20, "seconds": 0.25, "finished": None}
    stored = bytearray(storage.sealed(document))
    at = data.draw(st.integers(0, len(stored) - 1))
    if data.draw(st.booleans()):
        del stored[at:]
    else:
        stored[at] ^= data.draw(st.integers(1, 255))
    storage.write_file("memory://documents/b.json", bytes(stored))
    try:
        assert storage.read_document("memory://documents/b.json") == document  # a space became a tab
    except ValueError as error:
        assert "does not fit its checksum" in str(error)  # noqa: PT017


@given(stored=st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
def test_what_is_no_sealed_document_is_damaged_whatever_it_is(stored: bytes) -> None:
    storage.write_file("memory://documents/c.json", stored)
    with pytest.raises(ValueError, match="does not fit its checksum"):
        storage.read_document("memory://documents/c.json")


def test_a_document_that_came_damaged_is_read_again(meddle: Meddle) -> None:
    storage.write_document("memory://documents/d.json", {"a": 1})
    meddle("memory://", "cat_file", lambda real, call: real()[:-1] if call < 4 else real())
    assert storage.read_document("memory://documents/d.json") == {"a": 1}


def test_bytes_are_believed_only_when_two_readings_agree(meddle: Meddle) -> None:
    storage.write_file("memory://agreed/file", b"voxels")
    meddle("memory://", "cat_file", lambda real, call: b"vowels" if call == 1 else real())
    assert storage.read_agreed("memory://agreed/file", 100) == b"voxels"


def test_bytes_that_never_agree_are_an_error(meddle: Meddle) -> None:
    storage.write_file("memory://agreed/file", b"voxels")
    meddle("memory://", "cat_file", lambda real, call: real() + f"{call}".encode())
    with pytest.raises(StorageError, match=r"memory://agreed/file: each of \d readings gave other bytes"):
        storage.read_agreed("memory://agreed/file", 100)


def test_no_more_bytes_are_read_than_the_limit(place: str) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    assert storage.read_agreed(f"{place}/file", 3) == b"vox"
    assert storage.read_agreed(f"{place}/none", 3) is None


def test_a_digest_tells_data_that_end_with_their_own_checksum_apart() -> None:
    def sealed(data: bytes) -> bytes:
        return data + google_crc32c.value(data).to_bytes(4, "little")

    one, other = sealed(b"one"), sealed(b"two")
    assert google_crc32c.value(one) == google_crc32c.value(other)
    assert storage.digest(one) != storage.digest(other)
    assert len(storage.digest(b"")) == 16
