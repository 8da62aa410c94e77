"""Object stores for tests, on loopback: SeaweedFS, a real one that checks signatures, and moto, which starts faster."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import s3fs

START_S = 60.0


@dataclass(frozen=True)
class ObjectStore:
    """An S3 endpoint, and a look into it past fsspec and its caches."""

    endpoint: str
    key: str = "testkey"
    secret: str = "testsecret"

    @property
    def environment(self) -> dict[str, str]:
        """What lets plain `s3://` URLs lead here, and hides the machine's own configuration."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @contextmanager
    def in_use(self) -> Iterator[ObjectStore]:
        """`s3://` URLs lead here, in this process and those that it starts, until the block ends."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()  # fsspec knows file systems by arguments, not by environment
            try:
                yield self
            finally:
                s3fs.S3FileSystem.clear_instance_cache()

    def make_bucket(self, name: str) -> None:
        with self._client() as s3:
            s3.create_bucket(Bucket=name)

    def listing(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """All objects below a prefix, by their names relative to it."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        with self._client() as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
            return {
                key.removeprefix(folder): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in sorted(keys)
            }

    def put(self, bucket: str, key: str, data: bytes) -> None:
        with self._client() as s3:
            s3.put_object(Bucket=bucket, Key=key, Body=data)

    def delete(self, bucket: str, key: str) -> None:
        with self._client() as s3:
            s3.delete_object(Bucket=bucket, Key=key)

    def _client(self) -> closing[Any]:
        client = _session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )
        return closing(client)


@cache
def _session() -> botocore.session.Session:
    return botocore.session.Session()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    """SeaweedFS with its data in a folder; it dies with this process."""
    ports = free_ports(
        *(f"{server}.port{kind}" for server in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))
    )
    store = ObjectStore(f"http://127.0.0.1:{ports['s3.port']}")
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *_seaweedfs_command(folder, store, ports)],
            cwd=folder,  # its sockets are relative: the name of one holds 107 characters at most
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(ports):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield store
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # a polite stop takes seconds
        server.wait()
        for name, port in ports.items():
            Path(f"/tmp/seaweedfs-{name.removesuffix('.port.grpc')}-grpc-{port}.sock").unlink(missing_ok=True)


def _seaweedfs_command(folder: Path, store: ObjectStore, ports: dict[str, int]) -> list[str]:
    """All its ports given, gRPC's too: else it would take each port + 10000, 8181 and 9101."""
    credentials = [{"accessKey": store.key, "secretKey": store.secret}]
    user = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    (folder / "data").mkdir()
    return [
        os.path.join(sysconfig.get_path("scripts"), "weed"),
        "-logtostderr=true",
        "server",
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=200",  # each bucket takes several
        "-filer",
        "-filer.localSocket=filer.sock",
        "-s3",
        "-s3.config=s3.json",
        "-s3.localSocket=s3.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _is_ready(ports: dict[str, int]) -> bool:
    """Whether it is healthy and has room: the volume server may join seconds after S3 calls itself healthy."""
    with suppress(OSError):
        health, _ = _get(ports["s3.port"], "/healthz")
        _, topology = _get(ports["master.port"], "/dir/status")
        return health == 200 and json.loads(topology)["Topology"]["Max"] > 0
    return False


def _get(port: int, path: str) -> tuple[int, bytes]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def free_ports(*names: str) -> dict[str, int]:
    """A free port for each name, below those that the kernel gives away to outgoing connections."""
    ports: dict[str, int] = {}
    with ExitStack() as held:
        for port in random.SystemRandom().sample(range(10_000, 32_000), 1000):
            if len(ports) == len(names):
                break
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports[names[len(ports)]] = port
    return ports


@contextmanager
def moto() -> Iterator[ObjectStore]:
    """moto in a thread; it believes every signature."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield ObjectStore(f"http://{host}:{port}")
    finally:
        server.stop()
