"""Small whole files beside a volume, on a local path or any fsspec URL: retried, and never absent by mistake."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO

from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.places import absolute, can_list, files_of
from nrrn_pipeline.retrying import retried

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_REREADS = 6


def write_file(url: str, data: bytes) -> None:
    """Write a whole file, over one that exists; nobody ever sees a part of it."""

    def request(fresh: bool) -> None:
        files, path = files_of(url, fresh)
        if "://" in url:
            files.pipe_file(path, data)  # an object appears whole or not at all
        else:
            _write_aside(path, data, os.replace)

    retried(url, request)


def write_new_file(url: str, data: bytes) -> bool:
    """Write a whole file unless there is one; whether it was written. Of several writers at a time one succeeds.

    False may also mean that our own write succeeded, but its answer was lost: look what is there.
    """

    def request(fresh: bool) -> None:
        files, path = files_of(url, fresh)
        if "://" not in url:
            return _write_aside(path, data, _place_exclusively)
        try:
            files.pipe_file(path, data, mode="create")
        except OSError as error:
            if "PreconditionFailed" in f"{error.__cause__}":
                raise FileExistsError(url) from error
            raise

    try:
        retried(url, request)
    except FileExistsError:
        return False
    return True


def _place_exclusively(partial: str, path: str) -> None:
    """Give a partial file its name unless that is taken, also where there are no hard links, as on SMB or exFAT."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # refused if it is there; filled in one step
        os.replace(partial, path)


def _write_aside(path: str, data: bytes, place: Callable[[str, str], None]) -> None:
    """Write a partial file beside `path`, then put it there in one step."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with _opened_in_new_folder(partial) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the name without the bytes
        place(partial, path)
    finally:
        with suppress(FileNotFoundError):  # it may never have been made, or be in its place
            os.unlink(partial)


def _opened_in_new_folder(path: str) -> BinaryIO:
    """The file, to be written, in a folder that another process may delete while it is empty."""
    for _ in range(100):
        with suppress(FileNotFoundError, FileExistsError):  # makedirs says either
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "wb")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return open(path, "wb")


def read_file(url: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """The file's bytes from `start` (if negative, from the end) up to `stop`, or to its end; None if there is no file.

    A file that storage lists but does not find is an error, never None.
    """

    def request(fresh: bool) -> bytes:
        files, path = files_of(url, fresh)
        try:
            if start == 0 and stop is None:
                return bytes(files.cat_file(path))
            return bytes(files.cat_file(path, start=start, end=stop))
        except _NOT_THERE:
            if listed(url, fresh):
                raise StorageError(f"{url}: storage lists it but does not find it") from None
            raise
        except OSError as error:
            if "not satisfiable" in f"{error}".lower():
                return b""  # S3's answer to a range that begins beyond the object's end
            raise

    try:
        data = retried(url, request)
    except _NOT_THERE:
        return None
    ignored_range = not can_list(url) and stop is not None and len(data) > stop - start  # some web servers do
    return data[start:stop] if ignored_range else data


def read_agreed(url: str, limit: int) -> bytes | None:
    """A file's bytes, `limit` at most; None if there is no such file.

    Read until two readings agree: of a file without a checksum a flipped byte would go unnoticed.
    """
    seen: list[bytes | None] = []
    for _ in range(_REREADS):
        now = read_file(url, 0, limit)
        if now in seen:
            return now
        seen.append(now)
    raise StorageError(f"{url}: each of {_REREADS} readings gave other bytes")


def write_document(url: str, document: dict[str, Any], new: bool = False) -> bool:
    """Write JSON with its own checksum; `new`: unless there is a file. Whether it was written."""
    data = sealed(document)
    if new:
        return write_new_file(url, data)
    write_file(url, data)
    return True


def sealed(document: dict[str, Any]) -> bytes:
    """JSON that holds its own checksum, under digest."""
    return json.dumps({"digest": _digest_of(document), **document}).encode()


def read_document(url: str) -> dict[str, Any] | None:
    """What write_document wrote; None if there is no such file.

    Raises ValueError if it was damaged or cut short, as several readings agree.
    """
    for _ in range(_REREADS):
        data = read_file(url)
        if data is None:
            return None
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            document = json.loads(data)
            if document.pop("digest") == _digest_of(document):
                return dict(document)
    raise ValueError(f"{url} is damaged: what is in it does not fit its checksum")


def _digest_of(document: dict[str, Any]) -> str:
    return digest(json.dumps(document, sort_keys=True).encode())  # of tuples and lists alike


def digest(data: bytes) -> str:
    """BLAKE2b of 8 bytes, in hexadecimal digits: whether bytes are those that were written.

    No CRC-32C: chunks end with their own, and the CRC-32C of data with its CRC-32C is the same whatever the data.
    """
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def listed(url: str, fresh: bool = False) -> bool:
    """Whether storage lists the file in its folder; no, where nothing can be listed. Asked once: who asks retries."""
    folder, _, name = url.rpartition("/")
    try:
        return can_list(url) and name in _files_in(_entries(folder, name, fresh), beginning=name)
    except _NOT_THERE:
        return False


def list_sizes(url: str, beginning: str = "") -> dict[str, int]:
    """Names of the whole files in a folder, those that begin so, with their bytes; none if there is no such folder."""
    try:
        return _files_in(retried(url, partial(_entries, url, beginning)), beginning)
    except _NOT_THERE:
        return {}


def _entries(url: str, beginning: str, fresh: bool) -> list[dict[str, Any]]:
    files, path = files_of(url, fresh)
    files.invalidate_cache()
    if beginning and url.startswith("s3://"):  # S3 looks for it, instead of listing all
        return list(files.find(path, prefix=beginning, maxdepth=1, detail=True).values())
    return list(files.ls(path, detail=True))


def list_folders(url: str) -> list[str]:
    """Names of the folders right below a folder; none if there is no such folder."""
    try:
        entries = retried(url, partial(_entries, url, ""))
    except _NOT_THERE:
        return []
    return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]


def list_tree(url: str, partials: bool = False) -> dict[str, int]:
    """Paths of all whole files below a folder, relative to it, with their bytes; none if there is no such folder.

    With `partials` also those that killed writers left.
    """
    root = files_of(url)[1]

    def request(fresh: bool) -> list[dict[str, Any]]:
        files, path = files_of(url, fresh)
        files.invalidate_cache()
        return list(files.find(path, detail=True).values())

    try:
        return _files_in(retried(url, request), below=root, partials=partials)
    except _NOT_THERE:
        return {}


def _files_in(
    entries: list[dict[str, Any]], beginning: str = "", below: str | None = None, partials: bool = False
) -> dict[str, int]:
    found = {}
    for entry in entries:
        path = entry["name"]
        name = path.rpartition("/")[2] if below is None else path.removeprefix(below).lstrip("/")
        if entry["type"] != "file" or not name.startswith(beginning) or not name or name.endswith("/"):
            continue  # "" and "name/" are marks of folders
        if partials or not name.endswith(".partial"):
            found[name] = entry["size"]
    return found


def exists(url: str) -> bool:
    """Whether there is a file, or a folder with a file somewhere in it."""

    def request(fresh: bool) -> bool:
        files, path = files_of(url, fresh)
        files.invalidate_cache()
        try:
            if files.info(path)["type"] == "file":
                return True
            return any(any(names) for _, _, names in files.walk(path, on_error="raise"))  # "": a folder's mark
        except _NOT_THERE:  # or no more: another process has just deleted it
            return False

    return retried(url, request)


def check_writable(url: str) -> None:
    """Write and delete a file in a folder, and the folders that this needs; leaves nothing behind.

    Raises OSError if nothing can be written there.
    """
    with probe(url):
        pass


def check_new_file(location: str | os.PathLike[str]) -> None:
    """Raises InputError if there is a file already, or none can be written there; leaves nothing behind."""
    url = absolute(location)
    folder = url.rpartition("/")[0]
    try:
        if exists(url):
            raise InputError(f"{location} exists: choose another file, or delete it")
        if "://" not in url and not os.path.isdir(folder):
            raise InputError(f"{location} cannot be written: its folder is missing; make it first")
        check_writable(folder)
    except OSError as error:
        raise InputError(f"{location} cannot be written: {error.strerror or error}; choose another file") from error


@contextmanager
def probe(url: str, content: bytes = b"") -> Iterator[str]:
    """A new file in a folder, gone when the block ends, with all whose names begin like its own, and new folders.

    Raises OSError if nothing can be written there.
    """
    name, missing = f"{uuid.uuid4().hex}.probe", []
    folder = url
    while "://" not in url and not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    try:
        write_file(f"{url}/{name}", content)
        try:
            yield f"{url}/{name}"
        finally:
            for each in list_sizes(url, beginning=name) if content else [name]:
                remove_file(f"{url}/{each}")
    except NotImplementedError as error:
        raise StorageError(f"{url}: this kind of storage is read-only", permanent=True) from error
    finally:
        for folder in missing:
            with suppress(OSError):  # writing may have failed before it was made, or another begun to fill it
                os.rmdir(folder)


def remove_partials(url: str, deep: bool = True) -> None:
    """Delete what processes that were killed in the middle of a write left in a folder on disk; and `deep`, below it.

    On object storage nothing is left: an object that was not written whole is not there.
    """
    if "://" in url:
        return
    for folder, _, names in os.walk(url):
        for name in names:
            if name.endswith(".partial"):
                with suppress(FileNotFoundError):  # its writer may be alive yet, and faster
                    os.unlink(os.path.join(folder, name))
        if not deep:
            return


def remove_file(url: str) -> None:
    """Delete a file, if there is one."""

    def request(fresh: bool) -> None:
        files, path = files_of(url, fresh)
        files.rm_file(path)

    with suppress(*_NOT_THERE):
        retried(url, request)


def remove_all_but(url: str, kept: str) -> None:
    """Delete all in a folder but what is below its folder `kept`; folders before files, so metadata go last."""
    first, _, rest = kept.partition("/")
    for name in list_folders(url):
        if name != first:
            remove_tree(f"{url}/{name}")
        elif rest:
            remove_all_but(f"{url}/{name}", rest)
    for name in list_sizes(url):
        remove_file(f"{url}/{name}")


def remove_tree(url: str) -> None:
    """Delete a folder with all in it, if there is one."""

    def request(fresh: bool) -> None:
        files, path = files_of(url, fresh)
        files.invalidate_cache()
        files.rm(path, recursive=True)

    with suppress(*_NOT_THERE):
        retried(url, request)
