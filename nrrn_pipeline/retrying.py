"""Which errors of storage pass by themselves, and how they are waited for.

Transient: timeouts, broken connections, 408, 429, 5xx. Permanent: all else, such as 403, a wrong key, a full disk.
A request is tried ATTEMPTS times, with growing pauses of about 20 s in all, through a store opened anew.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from nrrn_pipeline.errors import NrrnError, StorageError

ATTEMPTS = 8
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0

Answer = TypeVar("Answer")

# of a status that no other says better: a token that has run out may be renewed where a new store looks for it
_TRANSIENT_CODES = {
    *("ExpiredToken", "RequestTimeTooSkewed", "RequestTimeout", "SlowDown", "TokenRefreshRequired"),
    *("ConditionalRequestConflict", "OperationAborted"),  # others write at the same moment
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),  # damaged on the way
}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504, 509}
_BROKEN_CONNECTIONS = (
    TimeoutError,
    ConnectionError,
    EOFError,
    aiohttp.ClientError,
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    ResponseParserError,
)
_TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH")
    if hasattr(errno, name)
}
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, StorageError):
        return not error.permanent
    chain = [error, *filter(None, [error.__cause__])]
    if any(_code(link) in _TRANSIENT_CODES for link in chain):
        return True
    if not _status(error) and isinstance(error, _BROKEN_CONNECTIONS):
        return True
    if status := next(filter(None, map(_status, chain)), None):
        return status in _TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def is_refused(error: BaseException) -> bool:
    """Whether storage said no: no permission, no credentials, no room, no such bucket; a retry would hear it again."""
    if isinstance(error, StorageError):
        return error.permanent
    if isinstance(error, (NrrnError, boto.BotoCoreError, aiohttp.ClientError)):
        return not is_transient(error)
    answered = isinstance(error, OSError) or _status(error) is not None  # web servers' and GCS's are no OSErrors
    return answered and not isinstance(error, _ABSENT) and not is_transient(error)


def is_final(error: BaseException) -> bool:
    """Whether storage, or we, had the last word; all else that goes wrong in reading is damaged bytes."""
    answered = isinstance(error, (NrrnError, StorageError, MemoryError))
    return answered or (isinstance(error, OSError) and error.errno is not None)


def retried(url: str, request: Callable[[bool], Answer]) -> Answer:
    """What `request(fresh)` gives; `fresh` from the second attempt on: go through a store that is opened anew.

    Raises FileNotFoundError and its like as they come, StorageError for whatever else storage says, once retries end.
    """
    for attempt, pause in enumerate(_pauses(), start=1):
        try:
            return request(attempt > 1)
        except Exception as error:
            _give_up(url, error, attempt)
        time.sleep(pause)
    raise AssertionError("unreachable: the last attempt gives up")


def reason_of(error: BaseException) -> str:
    """One line for people: what it is and what it says."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (NrrnError, StorageError)) else f"{type(error).__name__}: {text}"[:500]


def _give_up(url: str, error: Exception, attempt: int) -> None:
    """Returns if there is to be another attempt."""
    if isinstance(error, NrrnError):
        raise error
    if is_transient(error):
        if attempt == ATTEMPTS:
            what = reason_of(error) if isinstance(error, StorageError) else f"{url}: {reason_of(error)}"
            raise StorageError(f"{what}; tried {attempt} times") from error
    elif is_refused(error):
        if isinstance(error, OSError) and error.errno is not None and "://" not in url:
            raise error  # of a disk, with its number: callers tell a full one from one that is read-only
        raise StorageError(f"{url}: {reason_of(error)}", permanent=True) from error
    else:
        raise error


def _pauses() -> Iterator[float]:
    """After each attempt, in s: doubling, and never alike for two workers."""
    for attempt in range(ATTEMPTS):
        yield min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of S3, GCS, Azure or plain HTTP holds."""
    found = None
    if isinstance(response := getattr(error, "response", None), dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status", "status_code", "code"):
        found = found or getattr(error, name, None)
    number = int(f"{found}") if f"{found}".isdecimal() else 0
    return number if 400 <= number < 600 else None


def _code(error: BaseException) -> str | None:
    """S3's own name for an error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else None
