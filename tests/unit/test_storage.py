from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nrrn_pipeline import storage
from nrrn_pipeline.errors import StorageError
from nrrn_pipeline.places import files_of
from nrrn_pipeline.retrying import ATTEMPTS
from tests.servers import ObjectStore
from tests.unit.conftest import Meddle


def failing(error: BaseException, times: int = 1000) -> Callable[[Callable[[], Any], int], Any]:
    def method(real: Callable[[], Any], call: int) -> Any:
        if call <= times:
            raise error
        return real()

    return method


def test_what_is_written_is_read(place: str) -> None:
    storage.write_file(f"{place}/deep/file", b"voxels")
    assert storage.read_file(f"{place}/deep/file") == b"voxels"


def test_a_file_written_again_is_replaced_whole(place: str) -> None:
    storage.write_file(f"{place}/file", b"the first and longer text")
    storage.write_file(f"{place}/file", b"second")
    assert storage.read_file(f"{place}/file") == b"second"
    assert storage.list_sizes(place) == {"file": 6}


def test_an_empty_file_is_there_and_empty(place: str) -> None:
    storage.write_file(f"{place}/file", b"")
    assert storage.read_file(f"{place}/file") == b""
    assert storage.read_file(f"{place}/file", -4) == b""
    assert storage.read_file(f"{place}/file", 0, 4) == b""


@pytest.mark.parametrize("path", ["absent", "deep/absent", "file/absent", "folder"])
@pytest.mark.parametrize("part", [(), (-3,), (1, 3)], ids=["whole", "end", "part"])
def test_an_absent_file_reads_as_none(place: str, path: str, part: tuple[int, ...]) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    storage.write_file(f"{place}/folder/file", b"voxels")
    assert storage.read_file(f"{place}/{path}", *part) is None


@pytest.mark.parametrize("part", [(0, 6), (0, 1000), (2,), (2, 4), (5, 9), (6, 9), (9, 12), (-1,), (-6,), (-1000,)])
def test_a_part_of_a_file_is_read_as_a_slice_of_its_bytes(place: str, part: tuple[int, ...]) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    start, stop = (*part, None)[:2]
    assert storage.read_file(f"{place}/file", *part) == b"voxels"[start:stop]


@pytest.mark.parametrize("error", [PermissionError("refused"), TimeoutError("refused"), OSError("refused")], ids=repr)
def test_a_file_that_cannot_be_read_is_never_taken_for_absent(place: str, meddle: Meddle, error: OSError) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    meddle(place, "cat_file", failing(error))
    with pytest.raises(StorageError, match=r"file.*refused"):
        storage.read_file(f"{place}/file")


def test_a_file_that_is_listed_but_not_found_is_never_taken_for_absent(place: str, meddle: Meddle) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    files = meddle(place, "cat_file", failing(FileNotFoundError("file")))
    with pytest.raises(StorageError, match="lists it but does not find it"):
        storage.read_file(f"{place}/file")
    assert files.calls == ATTEMPTS


def test_a_listing_that_fails_while_a_file_is_looked_for_is_not_retried_by_the_square(meddle: Meddle) -> None:
    files = meddle("memory://", "ls", failing(ConnectionResetError("reset")))
    with pytest.raises(StorageError, match="reset"):
        storage.read_file("memory://square/file")
    assert files.calls <= 2 * ATTEMPTS


def test_a_file_that_is_found_only_later_is_read(place: str, meddle: Meddle) -> None:
    storage.write_file(f"{place}/file", b"voxels")
    meddle(place, "cat_file", failing(FileNotFoundError("file"), times=ATTEMPTS - 1))
    assert storage.read_file(f"{place}/file") == b"voxels"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("cat_file", storage.read_file),
        ("pipe_file", lambda url: storage.write_file(url, b"new")),
        ("rm", storage.remove_tree),
        ("rm_file", storage.remove_file),
        ("info", storage.exists),
        ("find", lambda url: storage.list_tree(url.rpartition("/")[0])),
        ("ls", lambda url: storage.list_sizes(url.rpartition("/")[0])),
        ("ls", lambda url: storage.list_folders(url.rpartition("/")[0])),
    ],
)
def test_a_broken_connection_is_tried_again(meddle: Meddle, method: str, request_: Callable[[str], Any]) -> None:
    url = "memory://broken/file"
    storage.write_file(url, b"voxels")
    files = meddle(url, method, failing(ConnectionResetError("reset"), times=3))
    request_(url)
    assert files.calls == 4


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_file(str(tmp_path / "file"), b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left") as refused:
        storage.write_file(str(tmp_path / "file"), b"new")
    assert refused.value.errno == 28
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert storage.read_file(str(tmp_path / "file")) == b"old"


def test_a_file_takes_its_name_only_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    replace = os.replace

    def watch(source: str, target: str) -> None:
        assert not os.path.exists(target)
        sizes.append(os.path.getsize(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    storage.write_file(str(tmp_path / "file"), b"voxels")
    assert sizes == [6]


def test_only_whole_files_right_there_are_listed_with_their_bytes(place: str) -> None:
    for name in ("a", "b.json", "b.json.0123.partial", "deep/c"):
        storage.write_file(f"{place}/{name}", name.encode())
    assert storage.list_sizes(place) == {"a": 1, "b.json": 6}


def test_a_listing_of_names_that_begin_so_holds_no_others(place: str) -> None:
    for name in ("ab", "abc", "b", "ab.json.0123.partial", "abd/file"):
        storage.write_file(f"{place}/{name}", b"x")
    assert storage.list_sizes(place, beginning="ab") == {"ab": 1, "abc": 1}
    assert storage.list_sizes(place, beginning="c") == {}
    assert storage.list_sizes(f"{place}/none", beginning="a") == {}


def test_the_folders_right_there_are_listed(place: str) -> None:
    for name in ("a/file", "b/deep/file", "file"):
        storage.write_file(f"{place}/{name}", b"x")
    assert sorted(storage.list_folders(place)) == ["a", "b"]


def test_a_tree_is_all_whole_files_below_with_their_bytes(place: str) -> None:
    for name in ("tree/c/0/0", "tree/c/0/1", "tree/zarr.json", "tree/c/0/1.0a.partial", "trees/file"):
        storage.write_file(f"{place}/{name}", name.encode())
    assert storage.list_tree(f"{place}/tree") == {"c/0/0": 10, "c/0/1": 10, "zarr.json": 14}


def test_more_files_than_one_answer_holds_are_all_listed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")
    for name in "abcdefghi":
        storage.write_file(f"{place}/x{name}", b"")
    names = {f"x{name}": 0 for name in "abcdefghi"}
    assert storage.list_sizes(place) == storage.list_tree(place) == storage.list_sizes(place, "x") == names


def test_a_folder_that_does_not_exist_lists_nothing(place: str) -> None:
    assert storage.list_sizes(place) == storage.list_tree(place) == {}
    assert storage.list_folders(place) == []


def test_what_was_written_or_removed_since_a_listing_is_in_the_next_one(place: str) -> None:
    storage.write_file(f"{place}/a", b"x")
    assert storage.list_sizes(place) == storage.list_tree(place) == {"a": 1}
    storage.write_file(f"{place}/b", b"xx")
    storage.remove_file(f"{place}/a")
    assert storage.list_sizes(place) == storage.list_tree(place) == {"b": 2}


def test_a_file_is_listed_by_its_whole_name(place: str) -> None:
    storage.write_file(f"{place}/deep/file.json", b"x")
    assert storage.listed(f"{place}/deep/file.json")
    for other in ("deep/file", "deep/file.json2", "deep", "none/file.json"):
        assert not storage.listed(f"{place}/{other}")


def test_files_and_filled_folders_exist(place: str) -> None:
    assert not storage.exists(place)
    storage.write_file(f"{place}/deep/file", b"x")
    assert storage.exists(place)
    assert storage.exists(f"{place}/deep/file")
    assert not storage.exists(f"{place}/other")
    assert not storage.exists(f"{place}/dee")


def test_an_empty_folder_does_not_count_as_existing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not storage.exists(str(tmp_path / "empty"))


def test_an_object_that_marks_an_empty_folder_is_no_file(moto_s3: ObjectStore) -> None:
    moto_s3.make_bucket("marks")
    moto_s3.put("marks", "folder/", b"")
    with moto_s3.in_use():
        assert storage.list_sizes("s3://marks/folder") == storage.list_tree("s3://marks/folder") == {}
        assert not storage.exists("s3://marks/folder")


def test_a_removed_tree_is_gone_and_its_neighbours_are_not(place: str) -> None:
    for name in ("tree/deep/file", "tree/file", "trees/file"):
        storage.write_file(f"{place}/{name}", b"x")
    storage.remove_tree(f"{place}/tree")
    assert not storage.exists(f"{place}/tree")
    assert storage.list_tree(place) == {"trees/file": 1}


def test_a_removed_file_is_gone_and_its_neighbours_are_not(place: str) -> None:
    for name in ("file", "file2", "folder/file"):
        storage.write_file(f"{place}/{name}", b"x")
    storage.remove_file(f"{place}/file")
    assert storage.list_tree(place) == {"file2": 1, "folder/file": 1}


@pytest.mark.parametrize("remove", [storage.remove_file, storage.remove_tree])
def test_removing_what_is_not_there_does_nothing(place: str, remove: Callable[[str], None]) -> None:
    remove(place)
    storage.write_file(f"{place}/file", b"x")
    remove(f"{place}/none")
    assert storage.list_tree(place) == {"file": 1}


def test_a_folder_is_writable_and_checking_leaves_nothing(place: str) -> None:
    storage.check_writable(f"{place}/new/folders")
    assert not storage.exists(place)
    if "://" not in place:
        assert not os.path.exists(place)


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.check_writable(str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="ermi"):
        storage.check_writable("/sys/folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def web_server() -> Iterator[str]:
    """A plain web server: it answers every request with 501, or 404."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Silent(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "request_",
    [
        lambda url: storage.check_writable(url),
        lambda url: storage.write_file(f"{url}/file", b"x"),
        lambda url: storage.write_new_file(f"{url}/file", b"x"),
    ],
)
def test_a_server_that_takes_no_files_refuses_for_good(web_server: str, request_: Callable[[str], Any]) -> None:
    with pytest.raises(StorageError, match="501") as refused:
        request_(f"{web_server}/folder")
    assert refused.value.permanent


def test_a_web_server_lists_nothing_and_reads_as_none_what_it_lacks(web_server: str) -> None:
    assert storage.read_file(f"{web_server}/folder/file") is None
    assert not storage.listed(f"{web_server}/folder/file")


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("c/0/1", "c/0/1.0a.partial", "zarr.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    storage.remove_partials(str(tmp_path))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["c/0/1", "zarr.json"]


def test_of_two_writers_of_a_new_file_the_first_succeeds(place: str) -> None:
    assert storage.write_new_file(f"{place}/plan.json", b"first")
    assert not storage.write_new_file(f"{place}/plan.json", b"second")
    assert storage.read_file(f"{place}/plan.json") == b"first"
    assert storage.list_tree(place) == {"plan.json": 5}


def test_of_many_writers_of_a_new_file_at_a_time_one_succeeds(tmp_path: Path) -> None:
    url, ready = str(tmp_path / "file"), threading.Barrier(16)

    def write(name: bytes) -> bool:
        ready.wait()
        return storage.write_new_file(url, name)

    names = [f"{i}".encode() for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        (winner,) = [name for name, written in zip(names, pool.map(write, names), strict=True) if written]
    assert storage.read_file(url) == winner
    assert os.listdir(tmp_path) == ["file"]


def test_storage_of_a_kind_is_opened_once_for_all_files(place: str) -> None:
    assert files_of(f"{place}/a")[0] is files_of(f"{place}/b")[0]
    assert isinstance(files_of(place)[0], fsspec.AbstractFileSystem)
