from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPMessage, IncompleteRead
from random import Random
from typing import Any

import aiohttp
import fsspec
import pytest

from tests.faults.proxy import FaultProxy, Request
from tests.servers import ObjectStore

DATA = Random(0).randbytes(1000)
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request"}  # enough for moto


@dataclass(frozen=True)
class Answer:
    status: int
    headers: HTTPMessage
    body: bytes


class Client:
    """A connection that keeps alive, and retries nothing."""

    def __init__(self, endpoint: str, timeout: float = 20) -> None:
        self._connection = HTTPConnection(endpoint.removeprefix("http://"), timeout=timeout)

    def close(self) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        try:
            self._connection.request(method, path, body, SIGNED | headers)
            with self._connection.getresponse() as response:
                return Answer(response.status, response.headers, response.read())
        except Exception:
            self._connection.close()  # the next request begins a new one
            raise


@pytest.fixture
def bucket(moto_s3: ObjectStore) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    moto_s3.make_bucket(name)
    moto_s3.put(name, "object", DATA)
    return name


@pytest.fixture
def proxy(moto_s3: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[Client]:
    with closing(Client(proxy.endpoint)) as client:
        yield client


def test_without_faults_nothing_changes(client: Client, proxy: FaultProxy, bucket: str, moto_s3: ObjectStore) -> None:
    with closing(Client(moto_s3.endpoint)) as direct:
        for method, path in [
            ("GET", "object"),
            ("HEAD", "object"),
            ("GET", "none"),
            ("HEAD", "none"),
            ("DELETE", "no"),
        ]:
            answer, expected = (c.ask(method, f"/{bucket}/{path}") for c in (client, direct))
            assert answer.status == expected.status
            assert set(answer.headers) | {"Connection"} == set(expected.headers) | {"Connection"}
            assert answer.headers["Content-Length"] == expected.headers["Content-Length"]
            assert path == "none" or answer.body == expected.body  # errors have an id
    assert client.ask("GET", f"/{bucket}/object", Range="bytes=10-19").body == DATA[10:20]
    assert not proxy.injected
    assert proxy.requests[0] == Request("GET", f"/{bucket}/object")
    assert proxy.requests[-1] == Request("GET", f"/{bucket}/object", range="bytes=10-19")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("500", "InternalError"),
        ("503", "SlowDown"),
        ("429", "TooManyRequests"),
        ("403", "AccessDenied"),
        ("404", "NoSuchKey"),
    ],
)
def test_errors_are_those_of_s3_and_the_connection_lives_on(
    client: Client, proxy: FaultProxy, bucket: str, kind: Any, code: str
) -> None:
    proxy.inject(kind, limit=2)
    for _ in range(2):
        answer = client.ask("GET", f"/{bucket}/object")
        assert answer.status == int(kind)
        assert f"<Code>{code}</Code>".encode() in answer.body
    assert client.ask("GET", f"/{bucket}/object").body == DATA
    assert proxy.injected == {kind: 2}


def test_an_error_to_a_head_has_no_body(client: Client, proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("503", limit=1)
    assert [client.ask("HEAD", f"/{bucket}/object").status for _ in range(2)] == [503, 200]


def test_a_reset_is_one(client: Client, proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("reset", limit=1)
    with pytest.raises(ConnectionResetError, match="reset by peer"):
        client.ask("GET", f"/{bucket}/object")
    assert client.ask("GET", f"/{bucket}/object").body == DATA


def test_a_stall_holds_up_nobody_else_and_not_the_proxys_end(client: Client, moto_s3: ObjectStore, bucket: str) -> None:
    started = time.monotonic()
    with FaultProxy(moto_s3.endpoint) as proxy, closing(Client(proxy.endpoint, timeout=0.2)) as impatient:
        proxy.inject("stall", limit=1)
        with pytest.raises(TimeoutError):
            impatient.ask("GET", f"/{bucket}/object")
        assert impatient.ask("GET", f"/{bucket}/object").body == DATA
    assert time.monotonic() - started < 25  # a stall takes 30


def test_a_stall_ends_without_an_answer(moto_s3: ObjectStore, bucket: str) -> None:
    with FaultProxy(moto_s3.endpoint, stall_s=0.1) as proxy, closing(Client(proxy.endpoint)) as client:
        proxy.inject("stall", limit=1)
        with pytest.raises(ConnectionError, match="closed connection without response"):
            client.ask("GET", f"/{bucket}/object")


def test_truncated_data_end_before_their_length(client: Client, proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("truncated", limit=5)
    for _ in range(5):
        with pytest.raises(IncompleteRead) as error:
            client.ask("GET", f"/{bucket}/object")
        assert DATA.startswith(error.value.partial)
        assert len(error.value.partial) + (error.value.expected or 0) == len(DATA)
    assert client.ask("GET", f"/{bucket}/object").body == DATA


def test_short_data_look_whole(client: Client, proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("short")
    answer = client.ask("GET", f"/{bucket}/object")
    assert len(answer.body) < len(DATA)
    assert DATA.startswith(answer.body)
    part = client.ask("GET", f"/{bucket}/object", Range="bytes=100-199")
    assert part.headers["Content-Range"] == f"bytes 100-{100 + len(part.body) - 1}/1000"
    assert DATA[100:200].startswith(part.body)
    assert proxy.injected == {"short": 2}


def test_of_flipped_data_one_byte_is_another(client: Client, proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("flipped")
    places = set()
    for _ in range(5):
        body = client.ask("GET", f"/{bucket}/object").body
        (place,) = [i for i, (got, true) in enumerate(zip(body, DATA, strict=True)) if got != true]
        places.add(place)
    assert len(places) > 2


@pytest.mark.parametrize("kind", ["404", "truncated", "short", "flipped"])
def test_faults_of_data_spare_all_but_data_that_exist(
    client: Client, proxy: FaultProxy, bucket: str, moto_s3: ObjectStore, kind: Any
) -> None:
    moto_s3.put(bucket, "empty", b"")
    proxy.inject(kind, limit=1, matching=lambda request: request.path.startswith(f"/{bucket}"))
    assert client.ask("GET", f"/{bucket}?list-type=2").status == 200
    assert client.ask("HEAD", f"/{bucket}/object").status == 200
    assert client.ask("PUT", f"/{bucket}/new", b"1").status == 200
    assert b"<Code>NoSuchKey</Code>" in client.ask("GET", f"/{bucket}/none").body
    assert client.ask("GET", f"/{bucket}/empty").body == b""
    assert not proxy.injected
    with suppress(IncompleteRead):
        assert client.ask("GET", f"/{bucket}/object").body != DATA
    assert proxy.injected == {kind: 1}
    assert client.ask("GET", f"/{bucket}/object").body == DATA


@pytest.mark.parametrize("kind", ["500", "503", "reset", "stall"])
def test_a_write_that_fails_may_have_happened(moto_s3: ObjectStore, bucket: str, kind: Any) -> None:
    with FaultProxy(moto_s3.endpoint, stall_s=0) as proxy, closing(Client(proxy.endpoint)) as client:
        proxy.inject(kind)
        for i in range(40):
            with suppress(ConnectionError):
                assert client.ask("PUT", f"/{bucket}/new/{i}", b"1").status == int(kind)
        assert proxy.injected == {kind: 40}
    assert 5 < len(moto_s3.listing(bucket, "new")) < 35


def test_limits_begin_after_some_requests_and_the_first_fault_wins(
    client: Client, proxy: FaultProxy, bucket: str
) -> None:
    proxy.inject("500", limit=2, after=1, matching=lambda request: request.key == "object")
    proxy.inject("403", limit=2, after=2)
    asked = ["object", "object", "none", "object", "object", "none", "object", "object"]
    statuses = [client.ask("GET", f"/{bucket}/{key}").status for key in asked]
    assert statuses == [200, 500, 404, 500, 403, 403, 200, 200]
    proxy.inject("503")
    assert client.ask("GET", f"/{bucket}/object").status == 503
    proxy.clear()
    assert client.ask("GET", f"/{bucket}/object").status == 200
    assert proxy.injected == {"500": 2, "403": 2, "503": 1}
    assert len(proxy.requests) == 10


def test_a_kind_that_is_none_is_refused(proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="no such fault: 418"):
        proxy.inject("418")  # type: ignore[arg-type]


def test_the_seed_decides_which_requests_fail_whatever_their_order(moto_s3: ObjectStore, bucket: str) -> None:
    def failed(keys: list[int], seed: int) -> set[int]:
        with FaultProxy(moto_s3.endpoint, seed) as proxy, closing(Client(proxy.endpoint)) as client:
            proxy.inject("503", rate=0.3)
            harmed = {key for key in keys if client.ask("HEAD", f"/{bucket}/{key}").status == 503}
            assert proxy.injected == {"503": len(harmed)}
        return harmed

    keys = list(range(100))
    harmed = failed(keys, seed=0)
    assert 15 < len(harmed) < 45
    assert failed(keys[::-1], seed=0) == harmed
    assert failed(keys, seed=1) != harmed


def test_counts_are_exact_among_many_clients(proxy: FaultProxy, bucket: str) -> None:
    proxy.inject("flipped", rate=0.3)
    proxy.inject("503", rate=0.3)

    async def read(session: aiohttp.ClientSession) -> str:
        async with session.get(f"{proxy.endpoint}/{bucket}/object", headers=SIGNED) as response:
            body = await response.read()
            return str(response.status) if response.status != 200 else "whole" if body == DATA else "flipped"

    async def read_all() -> list[str]:
        connector = aiohttp.TCPConnector(limit=16)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(read(session) for _ in range(200)))

    got = asyncio.run(read_all())
    assert {kind: got.count(kind) for kind in ("flipped", "503")} == proxy.injected
    assert min(got.count(kind) for kind in ("flipped", "503", "whole")) > 20
    assert proxy.requests == [Request("GET", f"/{bucket}/object")] * 200


def test_bodies_may_come_in_chunks_and_wait_to_be_asked_for(proxy: FaultProxy, bucket: str) -> None:
    async def write() -> tuple[int, bytes]:
        async def parts() -> Any:
            for i in range(0, len(DATA), 100):
                yield DATA[i : i + 100]

        async with aiohttp.ClientSession(headers=SIGNED) as session:
            url = f"{proxy.endpoint}/{bucket}/new"
            async with session.put(url, data=parts(), expect100=True) as response:
                status = response.status
            async with session.get(url) as response:
                return status, await response.read()

    assert asyncio.run(write()) == (200, DATA)


def test_chunks_of_aws_pass_with_their_checksums(client: Client, bucket: str, moto_s3: ObjectStore) -> None:
    framed = b"3e8\r\n" + DATA + b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    headers = {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Decoded-Content-Length": "1000",
        "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "X-Amz-Trailer": "x-amz-checksum-crc32",
    }
    assert client.ask("PUT", f"/{bucket}/new", framed, **headers).status == 200
    assert moto_s3.listing(bucket)["new"] == DATA


def test_signatures_hold_and_data_come_back_whole(seaweed: ObjectStore) -> None:
    seaweed.make_bucket("signed")
    data = Random(1).randbytes(5_000_000)
    with FaultProxy(seaweed.endpoint) as proxy:
        through = replace(seaweed, endpoint=proxy.endpoint)
        with through.in_use():
            files = fsspec.filesystem("s3")
            files.pipe_file("signed/a ü+b", data)
            assert files.cat_file("signed/a ü+b") == data
            assert files.cat_file("signed/a ü+b", start=10, end=20) == data[10:20]
        with replace(through, secret="wrong").in_use(), pytest.raises(PermissionError):
            fsspec.filesystem("s3").cat_file("signed/a ü+b")
        assert Request("PUT", "/signed/a ü+b") in proxy.requests
        assert not proxy.injected
    assert seaweed.listing("signed") == {"a ü+b": data}
