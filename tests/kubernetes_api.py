"""A Kubernetes API server and a Dask operator in one, as far as a run asks them: objects in a dictionary.

And what a pod's container would be, as a process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import wsproto
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, RejectConnection, Request

Answer = tuple[int, dict[str, Any] | str]
ROOT = Path(__file__).parents[1]
READY = [{"type": "Ready", "status": "True"}]


def pod(cluster: str, component: str, **status: Any) -> dict[str, Any]:
    labels = {"dask.org/cluster-name": cluster, "dask.org/component": component}
    name = f"{cluster}-{component}-0"
    metadata = {"name": name, "namespace": "lab", "labels": labels}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "status": status}


def ready_pods(cluster: str) -> list[dict[str, Any]]:
    return [pod(cluster, each, conditions=READY) for each in ("scheduler", "worker")]


class FakeKubernetes:
    """What a test sees of the server; all is in the namespace lab.

    objects: by path. asked: method and path of every request. pods: those of a cluster by its name. phases: what the
    operator says at each look, the last one for ever. fail: an answer in place of the right one, or None.
    """

    def __init__(self, scheduler_port: int) -> None:
        self.scheduler_port = scheduler_port
        self.objects: dict[str, dict[str, Any]] = {}
        self.made: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.pods: Callable[[str], list[dict[str, Any]]] = ready_pods
        self.phases: list[str | None] = [None, "Created", "Pending", "Running"]
        self.fail: Callable[[str, str], Answer | None] = lambda method, path: None

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        url = urlsplit(target)
        url = url._replace(path=url.path.rstrip("/"))
        self.asked.append(f"{method} {url.path}")
        if (failure := self.fail(method, url.path)) is not None:
            return failure
        if url.path == "/version":
            return 200, {"gitVersion": "v1.34.1"}
        if method == "POST":
            made = json.loads(body)
            made["metadata"]["uid"] = str(uuid.uuid4())
            self.made.append(made)
            self.objects[f"{url.path}/{made['metadata']['name']}"] = made
            return 201, made
        if url.path.endswith("/pods"):
            (selector,) = parse_qs(url.query)["labelSelector"]
            return 200, {"items": self.pods(selector.removeprefix("dask.org/cluster-name=")), "metadata": {}}
        if url.path not in self.objects:
            return 404, status(404, f"{url.path} not found")
        if method == "DELETE":
            return 200, self.objects.pop(url.path)
        phase = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        return 200, {**self.objects[url.path], **({"status": {"phase": phase}} if phase else {})}


def status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "message": message}


@contextmanager
def fake_kubernetes(kubeconfig: Path, scheduler_port: int) -> Iterator[FakeKubernetes]:
    """A server on loopback; the file `kubeconfig` leads to it, and port-forwards lead to scheduler_port."""
    fake = FakeKubernetes(scheduler_port)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if self.path.split("?")[0].endswith("/portforward"):
                fake.asked.append(f"FORWARD {self.path.split('?')[0]}")
                forward(self.connection, self.path, dict(self.headers), fake.scheduler_port)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            code, content = fake.answer(self.command, self.path, body)
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(code)
            self.send_header("content-type", "text/plain" if isinstance(content, str) else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = answer  # noqa: N815  (http.server's names)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        write_kubeconfig(kubeconfig, f"http://127.0.0.1:{server.server_address[1]}")
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_kubeconfig(path: Path, server: str) -> None:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {"token": "test"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
    }
    path.write_text(json.dumps(content))  # JSON is YAML


def forward(client: socket.socket, target: str, headers: dict[str, str], port: int) -> None:
    """One connection to `port`, through a WebSocket as Kubernetes does it: channel 0 is data, 1 is errors."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    wire, lock = wsproto.WSConnection(wsproto.ConnectionType.SERVER), threading.Lock()
    wire.receive_data(f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode())
    next(event for event in wire.events() if isinstance(event, Request))

    def send(event: Any) -> None:
        with lock, suppress(OSError):
            client.sendall(wire.send(event))

    try:
        scheduler = socket.create_connection(("127.0.0.1", port))
    except OSError:
        send(RejectConnection(status_code=500))
        return
    send(AcceptConnection())
    for channel in (b"\0", b"\1"):  # each begins with the port
        send(BytesMessage(channel + port.to_bytes(2, "little")))

    def back() -> None:
        with suppress(OSError):
            while data := scheduler.recv(2**16):
                send(BytesMessage(b"\0" + data))
        send(CloseConnection(code=1000))

    thread = threading.Thread(target=back)
    thread.start()
    message = b""
    try:
        with suppress(OSError):
            while data := client.recv(2**16):
                wire.receive_data(data)
                for event in wire.events():
                    if isinstance(event, CloseConnection):
                        return
                    if isinstance(event, BytesMessage):
                        message += bytes(event.data)
                        if event.message_finished:
                            scheduler.sendall(message[1:])
                            message = b""
    finally:
        with suppress(OSError):
            scheduler.shutdown(socket.SHUT_RDWR)
        thread.join()
        scheduler.close()


def free_ports() -> tuple[int, int, int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        one, two, three = (probe.getsockname()[1] for probe in probes)
        return one, two, three


@contextmanager
def running(
    container: dict[str, Any], keys: Path, ports: tuple[int, int, int], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that a pod's container would be, but on loopback, and with `ports` instead of 8786, 8787 and 8788."""
    places = {"nrrn-scheduler": "127.0.0.1", "/keys": str(keys)}
    places |= {str(old): str(new) for old, new in zip((8786, 8787, 8788), ports, strict=True)}

    def here(text: str) -> str:
        for old, new in places.items():
            text = text.replace(old, new)
        return text

    given = {each["name"]: here(each["value"]) for each in container["env"]}
    # the operator adds these to every worker; the image holds deploy/dask in /etc/dask
    given |= {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1", "DASK_WORKER_NAME": "nrrn-default-worker-0"}
    given |= {"DASK_ROOT_CONFIG": str(ROOT / "deploy" / "dask"), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(here, container["command"])]
    command += ["--host", "127.0.0.1"]
    if "worker" in command:
        command[command.index("300")] = "60"
    with open(folder / f"{container['name']}.log", "wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **given}, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
