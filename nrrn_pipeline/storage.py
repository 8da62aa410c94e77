"""Small files beside a volume, on a local path or any fsspec URL: whole files in, whole files out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import fsspec


def absolute(url: str | os.PathLike[str]) -> str:
    """The URL, or the absolute path with links resolved, without a trailing slash."""
    url = os.fspath(url).removeprefix("file://")
    if "://" in url:
        return url.rstrip("/")
    return os.path.realpath(os.path.expanduser(url))


def write_file(url: str, data: bytes) -> None:
    """Write a whole file, over one that exists; nobody ever sees a part of it."""
    files, path = _resolve(url)
    if "://" in url:
        files.pipe_file(path, data)  # an object appears whole or not at all
    else:
        _write_aside(path, data, os.replace)


def write_new_file(url: str, data: bytes) -> bool:
    """Write a whole file unless there is one; whether it was written. Of several writers at a time one succeeds."""
    files, path = _resolve(url)
    try:
        if "://" in url:
            files.pipe_file(path, data, mode="create")
        else:
            _write_aside(path, data, os.link)
    except FileExistsError:
        return False
    return True


def _write_aside(path: str, data: bytes, place: Callable[[str, str], None]) -> None:
    """Write a partial file beside `path`, then put it there in one step."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
        place(partial, path)
    finally:
        with suppress(FileNotFoundError):  # it may never have been made, or be in its place
            os.unlink(partial)


def read_file(url: str, last: int | None = None) -> bytes | None:
    """The file's bytes, or no more than its `last` ones; None if, and only if, there is no such file."""
    files, path = _resolve(url)
    try:
        start = None if last is None else max(0, files.size(path) - last)
        data: bytes = files.cat_file(path, start=start)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return data


def list_files(url: str) -> Iterator[str]:
    """Names of the whole files in a folder, in no order; none if there is no such folder."""
    files, path = _resolve(url)
    files.invalidate_cache()
    try:
        entries = files.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = entry["name"].rpartition("/")[2]
        if entry["type"] == "file" and not name.endswith(".partial"):
            yield name


def list_tree(url: str) -> list[str]:
    """Paths of all files below a folder, relative to it; none if there is no such folder."""
    files, path = _resolve(url)
    files.invalidate_cache()
    return [str(found).removeprefix(path).lstrip("/") for found in files.find(path)]


def exists(url: str) -> bool:
    """Whether there is a file or a folder that is not empty."""
    files, path = _resolve(url)
    files.invalidate_cache()
    return bool(files.exists(path)) and not (files.isdir(path) and not files.ls(path))


def check_writable(url: str) -> None:
    """Write and delete a file in a folder, and the folders that this needs; leaves nothing behind.

    Raises OSError if nothing can be written there.
    """
    probe, missing = f"{url}/{uuid.uuid4().hex}.probe", []
    folder = url
    while "://" not in url and not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    try:
        write_file(probe, b"")
        remove_tree(probe)
    finally:
        for folder in missing:
            with suppress(FileNotFoundError):  # writing may have failed before it was made
                os.rmdir(folder)


def remove_partials(url: str) -> None:
    """Delete what processes that were killed in the middle of a write left in a folder on disk.

    On object storage nothing is left: an object that was not written whole is not there.
    """
    if "://" in url:
        return
    for folder, _, names in os.walk(url):
        for name in names:
            if name.endswith(".partial"):
                with suppress(FileNotFoundError):  # its writer may be alive yet, and faster
                    os.unlink(os.path.join(folder, name))


def remove_tree(url: str) -> None:
    """Delete a folder with all in it."""
    files, path = _resolve(url)
    files.rm(path, recursive=True)


def _resolve(url: str) -> tuple[Any, str]:
    files, path = fsspec.core.url_to_fs(url)
    return files, path
