from __future__ import annotations

import errno
import pickle
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error

from nrrn_pipeline import retrying
from nrrn_pipeline.errors import InputError, NrrnError, RunError, SlabsFailedError, StorageError
from nrrn_pipeline.retrying import ATTEMPTS, is_final, is_refused, is_transient, reason_of, retried

URL = "s3://bucket/a"


class OtherStoreError(Exception):
    """As those of gcsfs (code) and adlfs (status_code)."""

    def __init__(self, **status: Any) -> None:
        super().__init__(f"{status}")
        vars(self).update(status)


def s3_error(status: int, code: str) -> BaseException:
    """What s3fs raises for an answer of S3."""
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: BaseException = translate_boto_error(boto.ClientError(answer, "GetObject"))
    return error


def http_error(status: int) -> aiohttp.ClientResponseError:
    asked: Any = SimpleNamespace(real_url=URL)
    return aiohttp.ClientResponseError(asked, (), status=status, message="no")


TRANSIENT = [
    TimeoutError("slow"),
    ConnectionResetError("reset"),
    BrokenPipeError("broken"),
    EOFError("cut"),
    aiohttp.ClientPayloadError("payload is not completed"),
    aiohttp.ServerDisconnectedError(),
    boto.ReadTimeoutError(endpoint_url=URL),
    boto.ConnectTimeoutError(endpoint_url=URL),
    boto.EndpointConnectionError(endpoint_url=URL),
    boto.ConnectionClosedError(endpoint_url=URL),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ResponseStreamingError(error="cut"),
    s3_error(500, "InternalError"),
    s3_error(502, "502"),
    s3_error(503, "SlowDown"),
    s3_error(503, "ServiceUnavailable"),
    s3_error(503, "503"),
    s3_error(504, "GatewayTimeout"),
    s3_error(429, "TooManyRequests"),
    s3_error(408, "RequestTimeout"),
    s3_error(400, "RequestTimeout"),
    s3_error(400, "ExpiredToken"),
    s3_error(403, "RequestTimeTooSkewed"),
    http_error(503),
    http_error(429),
    OtherStoreError(code=503),
    OtherStoreError(code="429"),
    OtherStoreError(status_code=500),
    OtherStoreError(status=408),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.ETIMEDOUT, "timed out"),
    OSError(errno.EHOSTUNREACH, "no route"),
    StorageError(f"{URL}: listed but not found"),
]
REFUSED = [
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.ENOSPC, "no space left"),
    OSError(errno.EROFS, "read-only"),
    OSError(errno.EDQUOT, "quota"),
    boto.NoCredentialsError(),
    boto.ProfileNotFound(profile="lab"),
    boto.ParamValidationError(report="bucket name"),
    s3_error(403, "AccessDenied"),
    s3_error(403, "SignatureDoesNotMatch"),
    s3_error(403, "InvalidAccessKeyId"),
    s3_error(400, "InvalidRequest"),
    s3_error(400, "EntityTooLarge"),
    s3_error(501, "NotImplemented"),
    http_error(401),
    http_error(403),
    http_error(501),
    OtherStoreError(code=403),
    OtherStoreError(status_code=401),
    StorageError("refused", permanent=True),
]
ABSENT = [
    FileNotFoundError(errno.ENOENT, "none"),
    FileNotFoundError("none"),
    NotADirectoryError(errno.ENOTDIR, "a file"),
    IsADirectoryError("a folder"),
    FileExistsError(errno.EEXIST, "there"),
    s3_error(404, "NoSuchKey"),
    s3_error(404, "404"),
]
OTHERS = [ValueError("damaged"), KeyError("key"), ZeroDivisionError(), NotImplementedError()]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


class Request:
    """Fails so many times, each time with the next error, then answers; `fresh` is what each attempt was told."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.fresh: list[bool] = []

    def __call__(self, fresh: bool) -> str:
        self.fresh.append(fresh)
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_passes_by_itself_is_transient(error: BaseException) -> None:
    assert is_transient(error)
    assert not is_refused(error)


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_what_no_retry_mends_is_refused(error: BaseException) -> None:
    assert is_refused(error)
    assert not is_transient(error)


@pytest.mark.parametrize("error", ABSENT + OTHERS, ids=repr)
def test_what_is_not_there_or_not_storages_word_is_neither(error: BaseException) -> None:
    assert not is_transient(error)
    assert not is_refused(error)


@pytest.mark.parametrize("error", [InputError("no"), RunError("no")], ids=repr)
def test_our_own_last_word_is_never_transient(error: BaseException) -> None:
    assert not is_transient(error)
    assert is_final(error)


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (StorageError("away"), True),
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "full"), True),
        (OSError("Not a gzipped file"), False),
        (ValueError("damaged"), False),
        (RuntimeError("error during blosc decompression"), False),
    ],
    ids=repr,
)
def test_all_but_storages_and_our_own_words_are_damaged_bytes(error: BaseException, final: bool) -> None:
    assert is_final(error) == final


def test_a_request_that_succeeds_is_made_once() -> None:
    request = Request()
    assert retried(URL, request) == "answer"
    assert request.fresh == [False]


@pytest.mark.parametrize("failures", [1, 3, ATTEMPTS - 1])
def test_transient_failures_are_tried_until_success_each_through_a_fresh_store(
    failures: int, pauses: list[float]
) -> None:
    request = Request(*[ConnectionResetError("reset")] * failures)
    assert retried(URL, request) == "answer"
    assert request.fresh == [False] + [True] * failures
    assert len(pauses) == failures


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_does_not_pass_is_an_error_after_all_attempts(error: BaseException, pauses: list[float]) -> None:
    request = Request(*[error] * ATTEMPTS, AssertionError("one attempt too many"))
    with pytest.raises(StorageError, match=rf"^{URL}: .*tried {ATTEMPTS} times$") as given_up:
        retried(URL, request)
    assert not given_up.value.permanent
    assert given_up.value.__cause__ is error
    assert len(request.fresh) == ATTEMPTS
    assert len(pauses) == ATTEMPTS - 1


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_what_is_refused_is_an_error_at_once(error: BaseException, pauses: list[float]) -> None:
    request = Request(error)
    with pytest.raises(StorageError, match=f"^{URL}: ") as refused:
        retried(URL, request)
    assert refused.value.permanent
    assert (request.fresh, pauses) == ([False], [])


@pytest.mark.parametrize("error", [*ABSENT, *OTHERS, InputError("no"), RunError("no")], ids=repr)
def test_what_storage_does_not_refuse_comes_as_it_is(error: BaseException) -> None:
    request = Request(error)
    with pytest.raises(type(error)) as raised:
        retried(URL, request)
    assert raised.value is error
    assert request.fresh == [False]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disks_refusal_keeps_its_number(number: int) -> None:
    with pytest.raises(OSError, match="no") as refused:
        retried("/disk/a", Request(OSError(number, "no")))
    assert refused.value.errno == number


def test_a_refusal_after_transient_failures_ends_the_attempts() -> None:
    request = Request(TimeoutError(), s3_error(403, "AccessDenied"), AssertionError("one attempt too many"))
    with pytest.raises(StorageError) as refused:
        retried(URL, request)
    assert refused.value.permanent
    assert request.fresh == [False, True]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_stops_us_is_obeyed(stop: type[BaseException]) -> None:
    request = Request(stop())
    with pytest.raises(stop):
        retried(URL, request)
    assert request.fresh == [False]


def test_pauses_grow_differ_and_end_in_half_a_minute(pauses: list[float]) -> None:
    runs = []
    for _ in range(20):
        with pytest.raises(StorageError):
            retried(URL, Request(*[TimeoutError()] * ATTEMPTS))
        runs.append(list(pauses))
        pauses.clear()
    assert len({run[0] for run in runs}) > 1
    assert all(10 < sum(run) < 45 for run in runs)
    assert all(0 < pause <= retrying.LONGEST_PAUSE_S for run in runs for pause in run)
    assert all(run[3] > run[0] for run in runs)


def test_a_refused_connection_is_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()
    with pytest.raises(OSError, match="refused") as refused:
        socket.create_connection(address)
    assert is_transient(refused.value)


@pytest.mark.parametrize("permanent", [False, True])
def test_a_storage_error_travels_with_its_permanence(permanent: bool) -> None:
    arrived = pickle.loads(pickle.dumps(StorageError("s3://bucket/a: no", permanent)))
    assert type(arrived) is StorageError
    assert (str(arrived), arrived.permanent) == ("s3://bucket/a: no", permanent)


@pytest.mark.parametrize("kind", [NrrnError, InputError, RunError, SlabsFailedError])
def test_our_errors_travel(kind: type[NrrnError]) -> None:
    arrived = pickle.loads(pickle.dumps(kind("no")))
    assert (type(arrived), str(arrived), arrived.exit_status) == (kind, "no", kind.exit_status)


@given(text=st.text(), kind=st.sampled_from([ValueError, KeyError, OSError, InputError, StorageError]))
def test_a_reason_is_one_line(text: str, kind: Callable[[str], Exception]) -> None:
    assert len(reason_of(kind(f"first\n{text}\r\nlast")).splitlines()) == 1


def test_a_reason_names_what_went_wrong_unless_the_words_are_ours() -> None:
    assert reason_of(ValueError("damaged\n  here")) == "ValueError: damaged here"
    assert reason_of(StorageError("s3://bucket/a: no")) == "s3://bucket/a: no"
    assert reason_of(InputError("choose another")) == "choose another"
    assert len(reason_of(ValueError("x" * 10_000))) == 500


@pytest.mark.parametrize("value", [None, 0, 200, 302, 600, "none", "5\u00b2", b"503", [503], True, 1e3])
def test_what_is_no_status_of_failure_decides_nothing(value: Any) -> None:
    assert not is_transient(OtherStoreError(status=value, code=value))


@pytest.mark.parametrize("response", [{}, {"Error": {}}, {"ResponseMetadata": {}}, "text", None])
def test_an_answer_without_status_decides_nothing(response: Any) -> None:
    assert not is_transient(OtherStoreError(response=response))
