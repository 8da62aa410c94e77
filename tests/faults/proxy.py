"""An S3 endpoint that fails on purpose: it stands before a real one, and harms a seeded share of the requests."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from random import Random
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["500", "503", "429", "403", "404", "reset", "stall", "truncated", "short", "flipped"]
Headers = tuple[tuple[str, str], ...]

ERRORS = {
    "500": "InternalError",
    "503": "SlowDown",
    "429": "TooManyRequests",
    "403": "AccessDenied",
    "404": "NoSuchKey",
}
OF_READS = {"404", "truncated", "short", "flipped"}  # happen only to data that the store has and would give
EARLY_OR_LATE = {"500", "503", "reset", "stall"}  # before the store has changed anything, or after
CHANGES = {"PUT", "POST", "DELETE"}
NO_OBJECT = {"list-type", "uploads", "uploadId", "acl", "tagging", "attributes"}  # queries for something else
ONE_HOP = {"connection", "keep-alive", "expect", "transfer-encoding"}
UPSTREAM_S = 60.0


@dataclass(frozen=True)
class Request:
    """What a client asks for; the path without percent signs."""

    method: str
    path: str
    query: str = ""
    range: str | None = None

    @property
    def key(self) -> str:
        """The object's name in its bucket, if it is about an object."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def reads_object(self) -> bool:
        asked = parse_qs(self.query, keep_blank_values=True).keys()
        return self.method == "GET" and bool(self.key) and not asked & NO_OBJECT


@dataclass(frozen=True)
class Response:
    """What the client gets: a body, and headers that may promise another one."""

    status: int
    reason: str
    headers: Headers
    body: bytes = b""

    @property
    def has_data(self) -> bool:
        return self.status in (200, 206) and bool(self.body)

    def cut(self, length: int) -> Response:
        """The first bytes of the data, with headers as if that were all."""

        def fit(name: str, value: str) -> str:
            if name.lower() == "content-range":
                return re.sub(r"(\d+)-\d+", lambda found: f"{found[1]}-{int(found[1]) + length - 1}", value)
            return str(length) if name.lower() == "content-length" else value

        return replace(self, headers=tuple((n, fit(n, v)) for n, v in self.headers), body=self.body[:length])

    def flipped(self, position: int, change: int) -> Response:
        """One byte changed."""
        body = bytearray(self.body)
        body[position] ^= change
        return replace(self, body=bytes(body))

    def unchecked(self) -> Response:
        """Without the store's checksums, which would give a change away."""
        kept = tuple((n, v) for n, v in self.headers if not n.lower().startswith("x-amz-checksum-"))
        return replace(self, headers=kept)

    def __bytes__(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


NONE = Response(0, "", ())


@dataclass
class Fault:
    """One kind of harm to some of the requests, with what it has seen and done."""

    kind: Kind
    rate: float
    matching: Callable[[Request], bool]
    limit: int | None
    after: int
    seen: int = 0
    done: int = 0

    def picks(self, request: Request, dice: Random) -> bool:
        if (self.kind in OF_READS and not request.reads_object) or not self.matching(request):
            return False
        self.seen += 1
        picked = self.seen > self.after and self.done != self.limit and dice.random() < self.rate
        self.done += picked
        return picked


class FaultProxy:
    """Passes HTTP/1.1 requests on as they come, with the Host that is signed, and harms those that a fault picks.

    Which ones depends on the seed, the request and how many equal ones came before, so not on the order of others.

    500, 503, 429, 403: an S3 error. 404: NoSuchKey, for an object that is there.
    reset, stall: no answer; the connection is reset, or silent for `stall_s` and then closed.
    truncated: headers for all of the data, a part of it, and the connection's end.
    short: a part of the data as if it were all. flipped: all of it, one byte changed. Both without S3's checksums.

    500, 503, reset and stall come before or after the store has done what it was asked to.

    Every request is held back for `delay_s` first, as if the store were far away.
    """

    def __init__(self, upstream: str, seed: int = 0, stall_s: float = 30.0, delay_s: float = 0.0) -> None:
        self.seed, self.stall_s, self.delay_s = seed, stall_s, delay_s
        self.requests: list[Request] = []
        self.injected: Counter[str] = Counter()
        self.closing = threading.Event()
        self._upstream = urlsplit(upstream).netloc
        self._seen: Counter[Request] = Counter()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fault proxy")
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def inject(
        self,
        kind: Kind,
        rate: float = 1.0,
        matching: Callable[[Request], bool] = lambda request: True,
        limit: int | None = None,
        after: int = 0,
    ) -> None:
        """Harm a share of the requests that match: at most `limit`, and none of the first `after`.

        Of several faults that pick a request the first one counts.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"no such fault: {kind}")
        with self._lock:
            self._faults.append(Fault(kind, rate, matching, limit, after))

    def clear(self) -> None:
        """No more faults; the counts stay."""
        with self._lock:
            self._faults.clear()

    def choose(self, request: Request) -> tuple[Fault | None, Random]:
        """The fault that picks a request, and dice for what the fault leaves open."""
        with self._lock:
            dice = Random(f"{self.seed} {self._seen[request]} {request}")
            self._seen[request] += 1
            self.requests.append(request)
            return next((fault for fault in self._faults if fault.picks(request, dice)), None), dice

    def settle(self, fault: Fault, harmed: bool) -> None:
        """Count a fault, or take it back if there was nothing to harm."""
        with self._lock:
            self.injected.update([fault.kind] if harmed else [])
            fault.done -= not harmed

    def forward(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> Response:
        """What the store says to a request."""
        with closing(HTTPConnection(self._upstream, timeout=UPSTREAM_S)) as upstream:
            chunked = any(name.lower() == "transfer-encoding" for name, _ in headers)
            upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in ONE_HOP:
                    upstream.putheader(name, value)
            if chunked:
                upstream.putheader("Transfer-Encoding", "chunked")
            upstream.endheaders(body, encode_chunked=chunked)
            answer = upstream.getresponse()
            data = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in ONE_HOP]
            if method != "HEAD" and answer.status not in (204, 304) and answer.headers["Content-Length"] is None:
                kept.append(("Content-Length", str(len(data))))
            return Response(answer.status, answer.reason, tuple(kept), data)


class _Connection(BaseHTTPRequestHandler):
    """A client's connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def answer(self) -> None:
        proxy, body = self.server.proxy, self._body()
        url = urlsplit(self.path)
        request = Request(self.command, unquote(url.path), url.query, self.headers["Range"])
        proxy.closing.wait(proxy.delay_s)
        fault, dice = proxy.choose(request)
        late = request.method in CHANGES and dice.random() < 0.5
        response = NONE
        if fault is None or fault.kind in OF_READS or (fault.kind in EARLY_OR_LATE and late):
            response = proxy.forward(self.command, self.path, self.headers.items(), body)
        if fault:
            harmed = fault.kind not in OF_READS or response.has_data
            proxy.settle(fault, harmed)
            fault = fault if harmed else None
        self._send(fault.kind if fault else None, response, dice)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def _send(self, kind: Kind | None, response: Response, dice: Random) -> None:
        size = len(response.body)
        self.close_connection = self.close_connection or kind in ("reset", "stall", "truncated")
        match kind:
            case None:
                self.wfile.write(bytes(response))
            case "reset":
                self._reset()
            case "stall":
                self.server.proxy.closing.wait(self.server.proxy.stall_s)
            case "truncated":
                self.wfile.write(bytes(replace(response, body=response.body[: dice.randrange(size)])))
            case "short":
                self.wfile.write(bytes(response.cut(dice.randrange(size)).unchecked()))
            case "flipped":
                self.wfile.write(bytes(response.flipped(dice.randrange(size), dice.randrange(1, 256)).unchecked()))
            case error:
                self.wfile.write(bytes(_error(error, with_body=self.command != "HEAD")))

    def _body(self) -> bytes:
        """All of the request's body; never a part of one whose client is gone."""
        if self.headers["Transfer-Encoding"] is None:
            return self._read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self._line().split(b";")[0], 16):
            parts.append(self._read(size))
            self._line()
        while self._line().strip():
            pass  # trailers
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError
        return data

    def _line(self) -> bytes:
        line = self.rfile.readline(65536)
        if not line:
            raise ConnectionAbortedError
        return line

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class _Server(ThreadingTCPServer):
    """A thread for each connection; none outlives the server."""

    request_queue_size = 128
    daemon_threads = False

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in list(self.connections):
            with suppress(OSError):  # it may end by itself meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exception(), OSError | HTTPException
        ):  # a client or the store is gone: the connection ends
            super().handle_error(request, client_address)


def _error(kind: str, with_body: bool) -> Response:
    body = (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{ERRORS[kind]}</Code><Message>injected</Message></Error>"
    )
    headers = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
    return Response(int(kind), HTTPStatus(int(kind)).phrase, headers, body.encode() if with_body else b"")
