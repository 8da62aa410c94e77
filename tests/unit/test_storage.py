from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from nrrn_pipeline import storage


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for files that does not exist yet."""
    if request.param == "local":
        yield str(tmp_path / "folder")
        return
    yield "memory://test_storage/folder"
    files = fsspec.filesystem("memory")
    if files.exists("/test_storage"):
        files.rm("/test_storage", recursive=True)


def test_what_is_written_is_read(folder: str) -> None:
    storage.write_file(f"{folder}/deep/file", b"voxels")
    assert storage.read_file(f"{folder}/deep/file") == b"voxels"


def test_a_file_written_again_is_replaced_whole(folder: str) -> None:
    storage.write_file(f"{folder}/file", b"the first and longer text")
    storage.write_file(f"{folder}/file", b"second")
    assert storage.read_file(f"{folder}/file") == b"second"
    assert list(storage.list_files(folder)) == ["file"]


def test_an_empty_file_is_there_and_empty(folder: str) -> None:
    storage.write_file(f"{folder}/file", b"")
    assert storage.read_file(f"{folder}/file") == b""


@pytest.mark.parametrize("path", ["absent", "deep/absent", "file/absent"])
def test_an_absent_file_reads_as_none(folder: str, path: str) -> None:
    storage.write_file(f"{folder}/file", b"voxels")
    assert storage.read_file(f"{folder}/{path}") is None
    assert storage.read_file(f"{folder}/{path}", last=3) is None


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, OSError])
def test_a_file_that_cannot_be_read_is_never_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    storage.write_file(str(tmp_path / "file"), b"voxels")

    def refuse(*_: object, **__: object) -> None:
        raise error("refused")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", refuse)
    with pytest.raises(error, match="refused"):
        storage.read_file(str(tmp_path / "file"))


@pytest.mark.parametrize("last", [0, 1, 5, 6, 7, 1000])
def test_last_reads_no_more_than_the_end(folder: str, last: int) -> None:
    storage.write_file(f"{folder}/file", b"voxels")
    assert storage.read_file(f"{folder}/file", last=last) == b"voxels"[max(0, 6 - last) :]


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_file(str(tmp_path / "file"), b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        storage.write_file(str(tmp_path / "file"), b"new")
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


def test_only_whole_files_are_listed(folder: str) -> None:
    for name in ("a", "b.json", "b.json.0123.partial"):
        storage.write_file(f"{folder}/{name}", b"x")
    assert sorted(storage.list_files(folder)) == ["a", "b.json"]


def test_a_folder_that_does_not_exist_lists_nothing(folder: str) -> None:
    assert list(storage.list_files(folder)) == []


def test_a_file_written_after_a_listing_is_in_the_next_one(folder: str) -> None:
    storage.write_file(f"{folder}/a", b"x")
    assert list(storage.list_files(folder)) == ["a"]
    storage.write_file(f"{folder}/b", b"x")
    assert sorted(storage.list_files(folder)) == ["a", "b"]


def test_files_and_filled_folders_exist(folder: str) -> None:
    assert not storage.exists(folder)
    storage.write_file(f"{folder}/deep/file", b"x")
    assert storage.exists(folder)
    assert storage.exists(f"{folder}/deep/file")
    assert not storage.exists(f"{folder}/other")


def test_an_empty_folder_does_not_count_as_existing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not storage.exists(str(tmp_path / "empty"))


def test_a_removed_tree_is_gone_and_its_neighbours_are_not(folder: str) -> None:
    for name in ("tree/deep/file", "tree/file", "trees/file"):
        storage.write_file(f"{folder}/{name}", b"x")
    storage.remove_tree(f"{folder}/tree")
    assert not storage.exists(f"{folder}/tree")
    assert storage.exists(f"{folder}/trees/file")


@pytest.mark.parametrize("url", ["s3://bucket/a.zarr", "memory://a/b"])
def test_a_url_loses_only_its_trailing_slash(url: str) -> None:
    assert storage.absolute(url) == url
    assert storage.absolute(f"{url}/") == url


@pytest.mark.parametrize("given", ["a.zarr", "a.zarr/", "./b/../a.zarr", "link/a.zarr", Path("a.zarr")], ids=str)
def test_a_path_becomes_absolute_with_its_links_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert storage.absolute(given) == str(tmp_path.resolve() / "a.zarr")


def test_a_file_url_is_its_path(tmp_path: Path) -> None:
    assert storage.absolute(f"file://{tmp_path}/a.zarr") == str(tmp_path.resolve() / "a.zarr")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.absolute("~/a.zarr") == str(tmp_path.resolve() / "a.zarr")


def test_a_folder_is_writable_and_checking_leaves_nothing(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "new" / "folders"))
    storage.check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.check_writable(str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="ermi"):
        storage.check_writable("/sys/folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("c/0/1", "c/0/1.0a.partial", "zarr.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    storage.remove_partials(str(tmp_path))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["c/0/1", "zarr.json"]


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_of_two_writers_of_a_new_file_the_first_succeeds(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path}/plan.json"
    assert storage.write_new_file(url, b"first")
    assert not storage.write_new_file(url, b"second")
    assert storage.read_file(url) == b"first"
    assert list(storage.list_files(f"{scheme}{tmp_path}")) == ["plan.json"]
