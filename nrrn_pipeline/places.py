"""URLs and what it takes to open them: options that are no secrets, by the longest URL they begin; files of any kind.

Credentials are none of our business: each process finds them where its storage library looks, in the environment
(AWS_ACCESS_KEY_ID and so on), a profile, the machine's role, or fsspec's own configuration. So they are never in a
plan, a task or a log. Options travel in the environment too, and with every task.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import fsspec

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.retrying import reason_of

OPTIONS = "NRRN_STORAGE_OPTIONS"
REQUESTS_AT_ONCE = 16  # of one process to one store

Options = Mapping[str, Any]

_at_start = os.environ.get(OPTIONS, "")
_reopening, _reopened = threading.Lock(), deque([0.0], maxlen=1)

_NO_SECRETS = {
    *("access", "account_host", "account_name", "addressing_style", "anon", "client_kwargs", "config_kwargs"),
    *("connect_timeout", "consistency", "endpoint_url", "max_pool_connections", "profile", "project", "read_timeout"),
    *("region_name", "request_checksum_calculation", "requester_pays", "requests_timeout"),
    *("response_checksum_validation", "s3", "signature_version", "use_ssl", "verify"),
}
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_WITHOUT_LISTING = ("http", "https")


def absolute(url: str | os.PathLike[str]) -> str:
    """The URL, or the absolute path with links resolved, without a trailing slash.

    Raises InputError for what cannot be one, or holds a password.
    """
    text = os.fspath(url)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    try:
        if not text or not text.isprintable():
            raise ValueError("it is empty or holds unprintable characters")
        if "://" not in text:
            return os.path.realpath(os.path.expanduser(text))
        return _absolute_url(text)
    except ValueError as error:
        shown = text.rpartition("@")[2].partition("?")[0]
        raise InputError(f"{shown!r} cannot be a path or URL: {error}") from None


def _absolute_url(text: str) -> str:
    scheme, _, rest = text.partition("://")
    if "::" in text:
        raise ValueError("chained URLs are not supported")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (a password with a slash in it looks like one)
    except ValueError:
        raise ValueError("its host or port is none, or it holds a password") from None
    if not scheme:
        raise ValueError("it names no scheme")
    if parts.username or parts.password or (parts.query and scheme in _WITHOUT_LISTING):
        raise ValueError("it holds a password or a query; credentials belong in the environment")
    rest = rest.rstrip("/").lstrip("/") if scheme == "memory" else rest.rstrip("/")
    if not rest or any(part in (".", "..") for part in rest.split("/")):
        raise ValueError("it names nothing, or has . or .. in it")
    return f"{'s3' if scheme == 's3a' else scheme}://{rest}"


def files_of(url: str, fresh: bool = False) -> tuple[Any, str]:
    """The file system (fsspec's) that holds a URL, and the path in it; `fresh`: opened within the last second.

    Raises InputError if nothing here can open such URLs.
    """
    if "://" not in url:
        return fsspec.filesystem("file"), url
    scheme, options = url.partition("://")[0], json.dumps(options_of(url), sort_keys=True)
    if fresh:
        with _reopening:  # once for all threads that met the same trouble
            if time.monotonic() - _reopened[-1] > 1.0:
                _open.cache_clear()
                _reopened.append(time.monotonic())
    files = _open(scheme, options, (os.getpid(), *_credentials()))
    return files, files._strip_protocol(url)


@lru_cache(maxsize=16)
def _open(scheme: str, options_json: str, circumstances: tuple[Any, ...]) -> Any:  # noqa: ARG001
    """One for all threads: fsspec would open one a thread, each with its own connections.

    Under other circumstances another: a fork must not share connections, and new credentials are to be used.
    """
    options = {"use_listings_cache": False, "skip_instance_cache": True, **json.loads(options_json)}
    if scheme == "s3":
        ours = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 2 * REQUESTS_AT_ONCE}
        options["config_kwargs"] = ours | options.get("config_kwargs", {})
        options["max_concurrency"] = 1  # else a whole object takes a second request, for its size
    try:
        files = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        extra = f"install nrrn-pipeline[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else f"install what it needs ({error})"
        raise InputError(f"{scheme}:// URLs cannot be opened here: {extra}") from error
    except Exception as error:  # of a storage library: options that it does not take, profiles that are not there
        raise InputError(
            f"{scheme}:// URLs cannot be opened ({reason_of(error)}): use a path, or s3://, http://, gs:// or abfs:// "
            "with storage options that it takes"
        ) from error
    if scheme == "s3":
        files.retries = 1  # we count and wait, alike for every kind of storage
        files.close_session = _close
    return files


def _credentials() -> Iterator[str]:
    return (
        f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))
    )


def _close(loop: asyncio.AbstractEventLoop, connections: Any) -> None:
    """Close what an S3 file system held, in its own event loop; s3fs would take any that runs, such as Dask's."""
    closing = connections.__aexit__(None, None, None)
    try:
        here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        loop.create_task(closing)
    elif loop.is_running():
        with suppress(TimeoutError):  # they end with the process
            asyncio.run_coroutine_threadsafe(closing, loop).result(1.0)
    else:
        closing.close()


def can_list(url: str) -> bool:
    """Whether what is there can be listed; plain web servers cannot."""
    return url.partition("://")[0] not in _WITHOUT_LISTING


def options_of(url: str) -> dict[str, Any]:
    """The storage options in force for a URL."""
    table = _table(os.environ.get(OPTIONS, ""))
    matching = [prefix for prefix in table if url.startswith(prefix)]
    return dict(table[max(matching, key=len)]) if matching else {}


@contextmanager
def using_options(options: str | Options | None) -> Iterator[None]:
    """Within the block, in this process and all that it starts, these storage options hold instead of others.

    Options for all URLs, {"endpoint_url": ...}, or by what URLs begin with, {"s3://public/": {"anon": true}}; as JSON,
    or in a file named as @FILE. None: those of the environment variable NRRN_STORAGE_OPTIONS, if any.

    Raises InputError if they are malformed or hold what may be a secret.
    """
    before = os.environ.get(OPTIONS)
    try:
        text = before or "" if options is None else options if isinstance(options, str) else json.dumps(dict(options))
    except (TypeError, ValueError, RecursionError):
        raise InputError("storage options are no table that JSON can hold: give them as '{\"anon\": true}'") from None
    table = _table(_read_if_named(text))
    try:
        os.environ[OPTIONS] = json.dumps(table)
        yield
    finally:
        os.environ.pop(OPTIONS, None)
        if before is not None:
            os.environ[OPTIONS] = before


def options_text() -> str:
    """The options in force, as JSON; empty if there are none."""
    table = _table(os.environ.get(OPTIONS, ""))
    return json.dumps(table) if table else ""


def adopt_options(text: str) -> None:
    """From now on this process uses the options that a driver has; those it was started with if that has none."""
    os.environ[OPTIONS] = text or _at_start


def _read_if_named(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        with open(text[1:], encoding="utf-8") as file:
            return file.read(2**20)
    except (OSError, ValueError) as error:
        raise InputError(f"storage options {text[:200]!r} cannot be read ({error}): give JSON, or @FILE") from error


@lru_cache(maxsize=16)
def _table(text: str) -> dict[str, dict[str, Any]]:
    """Options by the beginning of the URLs that they hold for."""
    text = _read_if_named(text)
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InputError("storage options are no JSON: give them as '{\"anon\": true}' or @FILE") from None
    if not isinstance(given, dict):
        raise InputError("storage options are no table: give them as '{\"anon\": true}'")
    if any("://" in key for key in given) and not all("://" in key or not key for key in given):
        raise InputError("storage options mix URLs with options: give options for all URLs, or a table for each URL")
    by_url = given and all(("://" in key or not key) and isinstance(value, dict) for key, value in given.items())
    table: dict[str, dict[str, Any]] = given if by_url else {"": given} if given else {}
    for prefix, options in table.items():
        _refuse_secrets(options)
        if "@" in prefix or "?" in prefix:
            raise InputError("storage options name a URL that holds a password or a query: give its beginning alone")
    return table


def _refuse_secrets(options: Any, name: str = "") -> None:
    if isinstance(options, Mapping):
        for inner, value in options.items():
            harmless_token = inner == "token" and value in ("anon", "google_default", "cloud")
            if inner not in _NO_SECRETS and not harmless_token:
                raise InputError(
                    f"storage option {inner[:40]!r} is refused: it may be a secret, and options go with every task. "
                    "Put credentials into the environment of every worker (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), "
                    'name a profile ({"profile": "lab"}), or use fsspec\'s configuration files'
                )
            _refuse_secrets(value, inner)
    elif isinstance(options, list):
        for value in options:
            _refuse_secrets(value, name)
    elif isinstance(options, str) and "@" in options and "://" in options:
        raise InputError(f"storage option {name!r} is refused: its URL holds a password")
