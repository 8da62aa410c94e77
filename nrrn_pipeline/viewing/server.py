"""A web server on loopback: Neuroglancer's client, and layers as Zarr arrays whose chunks are read when asked for.

There are no files behind its addresses but the client's: what is asked for is looked up by name or by number, below a
token that only who started the server knows. Pages from elsewhere cannot read it: it sends no CORS header.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np

from nrrn_pipeline import ome
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.viewing.layers import Layer, Level
from nrrn_pipeline.viewing.state import fragment, viewer_state

HOST = "127.0.0.1"
SESSION = "nrrn"  # the client's name for where it gets events
HEARTBEAT_S = 5.0
MEMORY_BYTES = 2**30  # for chunks that are read at the same time
MOST_READERS = 8
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".css": "text/css",
    ".wasm": "application/wasm",
}


@contextmanager
def serving(layers: Sequence[Layer], port: int = 0, trouble: Callable[[str], None] = print) -> Iterator[str]:
    """The address at which a browser on this machine sees the layers, until the block ends.

    port: 0 for any that is free. trouble: is told what cannot be read. Raises InputError if the port cannot be had, or
    the package neuroglancer, which holds the client, is not installed.
    """
    client = _client_files()
    try:
        server = _Server(layers, client, port, trouble)
    except OSError as error:
        raise InputError(f"port {port} cannot be had ({error.strerror}): give another --port, or none") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/{server.token}/"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def _client_files() -> dict[str, str]:
    """The paths of the client's files by name. Raises InputError if it is not installed."""
    found = find_spec("neuroglancer")  # not imported: only its files are needed
    places = found.submodule_search_locations if found else None
    folder = os.path.join(places[0], "static", "client") if places else ""
    if not os.path.isfile(os.path.join(folder, "index.html")):
        raise InputError("the viewer is not installed: pip install nrrn-pipeline[view]")
    return {name: os.path.join(folder, name) for name in os.listdir(folder) if os.path.splitext(name)[1] in KINDS}


class _Server(ThreadingHTTPServer):
    """Layers, and what requests about them share."""

    def __init__(
        self, layers: Sequence[Layer], client: dict[str, str], port: int, trouble: Callable[[str], None]
    ) -> None:
        self.layers, self.client, self.trouble = layers, client, trouble
        self.token = secrets.token_urlsafe(16)
        self.closing = threading.Event()
        largest = max(_bytes_of_reading(level) for layer in layers for level in layer.levels)
        self.readers = threading.BoundedSemaphore(max(1, min(MOST_READERS, MEMORY_BYTES // largest)))
        super().__init__((HOST, port), _Handler)

    def answer(self, words: list[str], host: str) -> tuple[int, str, bytes]:
        """HTTP status, kind and content of an address below the token; the kind of a redirection is where to."""
        match words:
            case [""]:
                return 302, f"v/{SESSION}/{fragment(self._state(host))}", b""
            case ["v", session, name] if session == SESSION and (path := self.client.get(name or "index.html")):
                with open(path, "rb") as file:
                    return 200, KINDS[os.path.splitext(path)[1]], file.read()
            case [layer, "zarr.json"] if found := _numbered(self.layers, layer):
                return 200, "application/json", json.dumps(_group(found)).encode()
            case [layer, level, *rest] if found := _numbered(self.layers, layer):
                if array := _numbered(found.levels, level):
                    return self._of_array(array, rest)
        return 404, "text/plain", b"nothing is here\n"

    def _of_array(self, array: Level, words: list[str]) -> tuple[int, str, bytes]:
        match words:
            case ["zarr.json"]:
                return 200, "application/json", json.dumps(_array(array)).encode()
            case ["c", *place] if part := _part(array, place):
                with self.readers:
                    return 200, "application/octet-stream", _chunk(array, part)
        return 404, "text/plain", b"nothing is here\n"

    def _state(self, host: str) -> dict[str, Any]:
        """At the name by which the browser knows this server: a tunnel may have another port."""
        addresses = [f"http://{host}/{self.token}/{number}/|zarr3:" for number in range(len(self.layers))]
        return viewer_state(self.layers, addresses)


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD below the token; all else is not there."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nrrn", ""
    disable_nagle_algorithm = True  # head and content are sent one after the other

    def handle(self) -> None:
        """What http.server calls for a connection; so are the others."""
        with suppress(ConnectionError):  # a browser that looks elsewhere drops what it asked for, or ends it
            super().handle()

    def do_GET(self) -> None:
        """For a request."""
        self._answer()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Not a line for each chunk."""

    def _answer(self) -> None:
        token, *words = self.path.partition("?")[0].removeprefix("/").split("/")
        if self.path == "/favicon.ico":
            return self._send(204, "image/x-icon", b"")  # browsers ask of themselves
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._send(404, "text/plain", b"nothing is here\n")
        if words == ["events", SESSION]:
            return self._send_events()
        try:
            answer = self.server.answer(words, self.headers.get("Host", ""))
        except Exception as error:  # of storage, of a codec: the browser shows it, and so do we
            reason = reason_of(error)
            self.server.trouble(reason)
            answer = 500, "text/plain; charset=utf-8", reason.encode()
        return self._send(*answer)

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Location" if status == 302 else "Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_events(self) -> None:
        """Nothing ever happens, but the client says so if it cannot listen."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        while self.command != "HEAD":
            self.wfile.write(b": nothing\n\n")
            if self.server.closing.wait(HEARTBEAT_S):
                break


def _numbered(those: Sequence[Any], number: str) -> Any:
    """The one of a number in plain digits; None if there is none."""
    known = {str(index): one for index, one in enumerate(those)}
    return known.get(number)


def _bytes_of_reading(level: Level) -> int:
    """What one piece takes in memory: the chunks decoded, and the piece."""
    voxels = sum(prod(volume.chunk) for volume in (level.volume, level.whole) if volume) + 3 * prod(level.piece)
    return voxels * np.dtype(level.dtype).itemsize


def _group(layer: Layer) -> dict[str, Any]:
    """Its zarr.json: an OME-Zarr 0.5 image of the layer's levels."""
    levels = [
        ome.Level(str(number), ("z", "y", "x"), level.volume.voxel_size, level.volume.origin, level.volume.in_nm)
        for number, level in enumerate(layer.levels)
    ]
    attributes = ome.image_attributes(layer.name, levels[0])
    attributes["ome"]["multiscales"][0]["datasets"] = [ome.dataset_of(level) for level in levels]
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(level: Level) -> dict[str, Any]:
    """Its zarr.json: chunks that nothing compresses."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": level.volume.shape,
        "data_type": level.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": level.piece}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0,
        "dimension_names": ["z", "y", "x"],
        "attributes": {},
    }


def _part(level: Level, place: list[str]) -> Box | None:
    """The voxels of a chunk, given its place in the grid; None if there is no such chunk."""
    if len(place) != 3 or not all(one.isdecimal() and len(one) < 9 for one in place):
        return None
    starts = [int(one) * size for one, size in zip(place, level.piece, strict=True)]
    if any(start >= length for start, length in zip(starts, level.volume.shape, strict=True)):
        return None
    ends = zip(starts, level.piece, level.volume.shape, strict=True)
    return Box(*(Span(start, min(start + size, length)) for start, size, length in ends))


def _chunk(level: Level, part: Box) -> bytes:
    """A chunk's bytes; at the volume's end filled up with 0."""
    voxels = level.read(part)
    missing = [(0, size - length) for size, length in zip(level.piece, voxels.shape, strict=True)]
    return np.pad(voxels, missing).astype(np.dtype(level.dtype).newbyteorder("<")).tobytes()
