"""What reading and writing voxels asks of storage, and that no bad answer of storage becomes a voxel."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline import retrying, storage
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.geometry import Box, Span, box_of, boxes_of
from nrrn_pipeline.places import REQUESTS_AT_ONCE
from nrrn_pipeline.volume import Volume, create_volume, open_volume, read_box, stores, voxels, write_box
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, ome_image

SHAPE = (8, 32, 32)
IMAGE = image_like((16, 64, 32), "uint16")
PART = Box(Span(3, 7), Span(10, 16), Span(0, 32))  # four chunks of (4, 16, 16) in the first shard


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(voxels, "FIRST_PAUSE_S", 0.0)


@dataclass
class Requests:
    """All readings: object, first byte asked for, bytes that came."""

    made: list[tuple[str, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0
    most: int = 0
    takes_s: float = 0.0

    @property
    def keys(self) -> Counter[str]:
        return Counter(key for key, _, _ in self.made)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    noted, read_file = Requests(), storage.read_file

    def read(url: str, start: int = 0, stop: int | None = None) -> bytes | None:
        with noted.lock:
            noted.running += 1
            noted.most = max(noted.most, noted.running)
        time.sleep(noted.takes_s)
        data = read_file(url, start, stop)
        with noted.lock:
            noted.running -= 1
            noted.made.append((key_of(url), start, len(data or b"")))
        return data

    monkeypatch.setattr(storage, "read_file", read)
    return noted


def key_of(url: str) -> str:
    return url.rpartition(".zarr/")[2]


def answering(monkeypatch: pytest.MonkeyPatch, key: str, answer: Callable[[bytes], bytes], times: float) -> list[int]:
    """The first `times` readings of an object give another answer; the list gets an entry a reading."""
    readings: list[int] = []
    read_file = storage.read_file

    def read(url: str, start: int = 0, stop: int | None = None) -> bytes | None:
        data = read_file(url, start, stop)
        if key_of(url) != key or data is None:
            return data
        readings.append(len(data))
        return answer(data) if len(readings) <= times else data

    monkeypatch.setattr(storage, "read_file", read)
    return readings


def sharded(folder: Path, **options: Any) -> Volume:
    """Four shards of eight chunks."""
    return open_volume(bare_zarr(folder / "a.zarr", IMAGE, (4, 16, 16), shards=SHAPE, **options))


def unsharded(folder: Path, **options: Any) -> Volume:
    return open_volume(bare_zarr(folder / "a.zarr", IMAGE, (4, 16, 16), **options))


def index_of(shard: bytes, chunks: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(shard[-16 * chunks - 4 : -4], "<u8").reshape(-1, 2).copy()


def test_a_whole_shard_is_one_request(tmp_path: Path, requests: Requests) -> None:
    volume = sharded(tmp_path)
    requests.made.clear()
    np.testing.assert_array_equal(read_box(volume, box_of(SHAPE)), IMAGE[:8, :32])
    assert requests.made == [("c/0/0/0", 0, (Path(volume.url) / "c/0/0/0").stat().st_size)]


def test_a_whole_sharded_volume_is_one_request_a_shard(tmp_path: Path, requests: Requests) -> None:
    volume = sharded(tmp_path)
    requests.made.clear()
    read_box(volume, volume.box)
    assert requests.keys == {f"c/{z}/{y}/0": 1 for z in (0, 1) for y in (0, 1)}


def test_an_unsharded_volume_is_one_request_a_chunk_that_the_box_touches(tmp_path: Path, requests: Requests) -> None:
    volume = unsharded(tmp_path)
    requests.made.clear()
    read_box(volume, Box(Span(3, 5), Span(16, 33), Span(31, 32)))
    assert requests.keys == {f"c/{z}/{y}/1": 1 for z in (0, 1) for y in (1, 2)}


def test_a_part_of_a_shard_is_its_index_and_one_request_for_neighbouring_chunks(
    tmp_path: Path, requests: Requests
) -> None:
    volume = sharded(tmp_path)
    requests.made.clear()
    np.testing.assert_array_equal(read_box(volume, PART), IMAGE[PART.within(volume.box)])
    shard = (Path(volume.url) / "c/0/0/0").stat().st_size
    assert [(key, start) for key, start, _ in requests.made[:1]] == [("c/0/0/0", -(16 * 8 + 4))]
    assert requests.keys == {"c/0/0/0": 2}
    assert sum(length for _, _, length in requests.made) <= shard


@pytest.mark.parametrize("gap", [0, 100, 1000])
@pytest.mark.parametrize(
    "box", [PART, Box(Span(0, 8), Span(0, 1), Span(0, 1)), Box(Span(5, 6), Span(31, 32), Span(3, 30))], ids=str
)
def test_chunks_of_a_shard_come_in_the_fewest_requests_that_the_gap_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: Requests, box: Box, gap: int
) -> None:
    monkeypatch.setattr(stores, "GAP_BYTES", gap)
    volume = sharded(tmp_path)
    shard = (Path(volume.url) / "c/0/0/0").read_bytes()
    wanted = np.zeros(len(shard), bool)
    for place, chunk in enumerate(boxes_of(box_of(SHAPE), (4, 16, 16))):
        if all(a.start < b.stop and b.start < a.stop for a, b in zip(box.spans, chunk.spans, strict=True)):
            offset, length = index_of(shard, 8)[place]
            wanted[offset : offset + length] = True
    taken = np.flatnonzero(wanted)
    runs = 1 + int((np.diff(taken) > gap + 1).sum())
    requests.made.clear()
    np.testing.assert_array_equal(read_box(volume, box), IMAGE[box.within(volume.box)])
    assert len(requests.made) == 1 + runs
    assert sum(length for _, _, length in requests.made) <= len(shard)
    if gap == 0:
        assert sum(length for _, _, length in requests.made[1:]) == len(taken)


@pytest.mark.parametrize("write_unit", [SHAPE, (4, 16, 16)], ids=["sharded", "unsharded"])
def test_writing_reads_nothing_and_writes_each_object_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: Requests, write_unit: tuple[int, int, int]
) -> None:
    volume = Volume(f"{tmp_path}/a.zarr/0", IMAGE.shape, "uint16", (4, 16, 16), write_unit, level_path="0")
    create_volume(volume, {})
    requests.made.clear()
    written: list[str] = []
    write_file = storage.write_file

    def write(url: str, data: bytes) -> None:
        written.append(url.removeprefix(f"{volume.url}/"))
        write_file(url, data)

    monkeypatch.setattr(storage, "write_file", write)
    told = write_box(volume, volume.box, IMAGE)
    assert requests.made == []
    assert sorted(written) == sorted(told)
    assert len(told) == len(list(boxes_of(volume.box, write_unit)))


def test_no_more_requests_run_at_once_than_allowed_whoever_reads(tmp_path: Path, requests: Requests) -> None:
    volume = unsharded(tmp_path)
    requests.takes_s = 0.02
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(read_box, [volume] * 4, [volume.box] * 4))
    assert all((voxels_of == IMAGE).all() for voxels_of in found)
    assert 1 < requests.most <= REQUESTS_AT_ONCE


CUT = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but the last": lambda data: data[:-1],
    "the end alone": lambda data: data[1:],
    "zeros": lambda data: bytes(len(data)),
}
READINGS = {
    "whole shard": (sharded, box_of(SHAPE), {}),
    "part of a shard": (sharded, PART, {}),
    "two shards": (sharded, Box(Span(0, 8), Span(0, 64), Span(0, 32)), {}),
    "chunk": (unsharded, box_of((4, 16, 16)), {}),
    "raw chunk": (unsharded, box_of((4, 16, 16)), {"compressors": None}),
}
NOTICED = [(cut, reading) for cut in CUT for reading in READINGS if (cut, reading) != ("zeros", "raw chunk")]


@pytest.mark.parametrize(("cut", "reading"), NOTICED)
def test_an_answer_cut_short_once_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, reading: str
) -> None:
    make, box, options = READINGS[reading]
    volume = make(tmp_path, **options)
    answering(monkeypatch, "c/0/0/0", CUT[cut], times=1)
    np.testing.assert_array_equal(read_box(volume, box), IMAGE[box.within(volume.box)])


@pytest.mark.parametrize(("cut", "reading"), NOTICED)
def test_an_answer_that_is_always_cut_short_is_an_error_that_names_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, reading: str
) -> None:
    make, box, options = READINGS[reading]
    volume = make(tmp_path, fill_value=7, **options)
    answering(monkeypatch, "c/0/0/0", CUT[cut], times=float("inf"))
    with pytest.raises(StorageError, match=f"^{volume.url}/c/0/0/0: "):
        read_box(volume, box)


@pytest.mark.parametrize("make", [sharded, unsharded])
def test_an_object_that_decodes_at_the_third_reading_is_read_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: Requests, make: Callable[[Path], Volume]
) -> None:
    volume = make(tmp_path)
    requests.made.clear()
    readings = answering(monkeypatch, "c/1/0/0", lambda data: data[:-9], times=2)
    np.testing.assert_array_equal(read_box(volume, volume.box), IMAGE)
    assert len(readings) == 3
    assert max(requests.keys.values()) == 3


@dataclass(frozen=True)
class Place:
    """Somewhere to store volumes, and how to delete an object there for real."""

    url: str
    delete: Callable[[str], None]

    def stored(self, folder: Path) -> Volume:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                storage.write_file(f"{self.url}/{folder.name}/{file.relative_to(folder)}", file.read_bytes())
        return open_volume(f"{self.url}/{folder.name}")


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        yield Place(str(tmp_path / "stored"), lambda url: Path(url).unlink())
    elif request.param == "memory":
        yield Place("memory://test_stores", storage.remove_tree)
        fsspec.filesystem("memory").rm("/test_stores", recursive=True)
    else:
        store: ObjectStore = request.getfixturevalue("moto_s3")
        store.make_bucket("stores")
        with store.in_use():
            place = f"s3://stores/{tmp_path.name}"
            yield Place(place, lambda url: store.delete("stores", url.removeprefix("s3://stores/")))


@pytest.mark.parametrize("make", [sharded, unsharded])
def test_an_object_that_is_not_there_gives_the_fill_value_wherever_it_is(
    tmp_path: Path, place: Place, make: Callable[..., Volume]
) -> None:
    volume = place.stored(Path(make(tmp_path, fill_value=7).url))
    np.testing.assert_array_equal(read_box(volume, volume.box), IMAGE)
    place.delete(f"{volume.url}/c/1/1/0")
    expected = IMAGE.copy()
    lost = tuple(slice(span, 2 * span) for span in volume.write_unit[:2])
    expected[(*lost, slice(0, volume.write_unit[2]))] = 7
    np.testing.assert_array_equal(read_box(volume, volume.box), expected)
    inner = Box(Span(volume.write_unit[0], volume.write_unit[0] + 1), volume.box.y, Span(0, 1))
    np.testing.assert_array_equal(read_box(volume, inner), expected[inner.within(volume.box)])


class Blind:
    """Files of which one is listed, but never found."""

    def __init__(self, files: Any, key: str) -> None:
        self.files, self.key = files, key

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    def cat_file(self, path: str, **options: Any) -> bytes:
        if path.endswith(self.key):
            raise FileNotFoundError(path)
        return bytes(self.files.cat_file(path, **options))


@pytest.mark.parametrize("box", [Box(Span(0, 16), Span(0, 64), Span(0, 32)), PART], ids=["whole", "part"])
@pytest.mark.parametrize("make", [sharded, unsharded])
def test_an_object_that_storage_lists_but_does_not_find_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, make: Callable[..., Volume], box: Box
) -> None:
    volume = place.stored(Path(make(tmp_path, fill_value=7).url))
    files_of = storage.files_of

    def blind(url: str, fresh: bool = False) -> tuple[Any, str]:
        files, path = files_of(url, fresh)
        return Blind(files, "a.zarr/c/0/0/0"), path

    monkeypatch.setattr(storage, "files_of", blind)
    with pytest.raises(StorageError, match=r"a\.zarr/c/0/0/0: storage lists it but does not find it"):
        read_box(volume, box)


@pytest.mark.parametrize("linked", ["0/c/0/0/0", "0/c/0", "0/c", "0"])
@pytest.mark.parametrize("then", ["read", "write"])
def test_a_link_out_of_the_volume_is_neither_read_nor_written_through(tmp_path: Path, linked: str, then: str) -> None:
    volume = open_volume(ome_image(tmp_path / "a.zarr", IMAGE))
    inside, outside = tmp_path / "a.zarr" / linked, tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    before = {path: path.read_bytes() for path in sorted(outside.rglob("*")) if path.is_file()}
    with pytest.raises(InputError, match="is a link out of the volume"):
        _ = read_box(volume, volume.box) if then == "read" else write_box(volume, volume.box, 0 * IMAGE)
    assert {path: path.read_bytes() for path in sorted(outside.rglob("*")) if path.is_file()} == before


def test_a_level_that_is_a_link_out_of_its_image_does_not_open(tmp_path: Path) -> None:
    path = ome_image(tmp_path / "a.zarr", IMAGE)
    shutil.move(path / "0", tmp_path / "outside")
    (path / "0").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link out of it: give the volume that it leads to"):
        open_volume(path)
    (tmp_path / "link.zarr").symlink_to(tmp_path / "outside")
    volume = open_volume(tmp_path / "link.zarr")
    np.testing.assert_array_equal(read_box(volume, volume.box), IMAGE)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, Box]:
    shape = tuple(draw(st.integers(1, 20)) for _ in range(3))
    chunk = tuple(draw(st.integers(1, 7)) for _ in range(3))
    chunk = tuple(min(n, m) for n, m in zip(chunk, shape, strict=True))
    shard = tuple(n * draw(st.integers(1, 4)) for n in chunk) if draw(st.booleans()) else None
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    ends = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    return shape, chunk, shard, Box(*map(Span, starts, ends))


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), gap=st.sampled_from([0, 10, 10**9]))
def test_any_box_of_any_layout_is_numpy_slicing(
    layout: tuple[tuple[int, int, int], tuple[int, ...], tuple[int, ...] | None, Box], gap: int
) -> None:
    shape, chunk, shard, box = layout
    image = image_like(shape, "uint16")
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "GAP_BYTES", gap)
        volume = open_volume(bare_zarr(Path(folder) / "a.zarr", image, chunk, shards=shard))
        np.testing.assert_array_equal(read_box(volume, box), image[box.within(volume.box)])
