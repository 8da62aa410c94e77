"""Dask's own commands and our client meet over TLS; nobody else gets in, and the local cluster stays on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from nrrn_pipeline import Options
from nrrn_pipeline.cluster import address_client, local_client, make_keys
from nrrn_pipeline.errors import InputError


@dataclass(frozen=True)
class Members:
    """A scheduler and a worker that Dask's commands started, and their keys."""

    keys: Path
    address: str
    pids: tuple[int, int]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextmanager
def started(folder: Path, keys: Path, *words: str) -> Iterator[int]:
    """The id of a running `dask ...`; it and its children are killed at the end, and leave by themselves if we die."""
    # without an address of its own a worker's HTTP server listens everywhere, whatever --host says
    command = [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    environment = {**os.environ, "DASK_CONFIG": str(keys), "DASK_TEMPORARY_DIRECTORY": str(folder)}
    with open(folder / f"{words[0]}.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Members]:
    folder = tmp_path_factory.mktemp("tls")
    keys, told = make_keys(folder / "keys"), folder / "scheduler.json"
    scheduler = ("scheduler", "--port", "0", "--scheduler-file", str(told), "--idle-timeout", "5 minutes")
    with started(folder, keys, *scheduler) as scheduler_pid:
        address = announced(told)
        with started(folder, keys, "worker", address, "--nthreads", "1", "--death-timeout", "60") as worker_pid:
            yield Members(keys, address, (scheduler_pid, worker_pid))


def announced(file: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()).endswith("}"):
            return str(json.loads(text)["address"])
        time.sleep(0.05)
    raise TimeoutError(f"no scheduler announced itself: {(file.parent / 'scheduler.log').read_text()}")


def refusal(address: str, keys: Path | None = None) -> str:
    begun = time.monotonic()
    with pytest.raises(InputError) as refused, address_client(address, keys):
        pass
    assert time.monotonic() - begun < 45  # and not a minute
    assert str(refused.value).isprintable()
    return str(refused.value)


def family(pid: int) -> set[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return {process, *process.children(recursive=True)}


def listening(processes: set[psutil.Process]) -> list[str]:
    """Where they listen."""
    return [
        connection.laddr.ip
        for each in processes
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]


@pytest.mark.parametrize("slabs_each", [1, 2])
def test_the_local_cluster_listens_on_loopback_alone(slabs_each: int) -> None:
    servers = family(os.getpid()) - {psutil.Process()}  # those that other tests' fixtures keep
    with local_client(2, slabs_each) as client:
        assert list(client.nthreads().values()) == [slabs_each] * 2
        found = listening(family(os.getpid()) - servers)
    assert len(found) >= 2 + 2 * 3  # scheduler and dashboard; nanny, worker and its HTTP
    assert all(ip_address(address).is_loopback for address in found)


def test_two_slabs_are_in_flight_in_one_worker(tmp_path: Path) -> None:
    with local_client(1, slabs_each=2) as client:
        futures = [client.submit(_meet, tmp_path / mine, tmp_path / other) for mine, other in ("ab", "ba")]
        first, second = client.gather(futures)
    assert first == second != os.getpid()


def _meet(mine: Path, other: Path) -> int:
    """The process, once the other is there too."""
    mine.touch()
    deadline = time.monotonic() + 20
    while not other.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the other slab has not begun")
        time.sleep(0.01)
    return os.getpid()


def test_with_the_keys_tasks_run(members: Members) -> None:
    assert members.address.startswith("tls://127.0.0.1:")
    for address in (members.address, members.address.removeprefix("tls://")):
        with address_client(address, members.keys) as client:
            assert client.submit(sum, [1, 2, 3], pure=False).result(timeout=30) == 6
            (worker,) = client.scheduler_info()["workers"]
            assert worker.startswith("tls://127.0.0.1:")
            assert client.run(os.getppid) == {worker: members.pids[1]}


def test_keys_in_the_configuration_of_dask_are_as_good(members: Members) -> None:
    configuration = dask.config.merge(dask.config.config, dask.config.collect([str(members.keys)], env={}))
    with dask.config.set(configuration):
        for address in (members.address, members.address.removeprefix("tls://")):
            with address_client(address) as client:
                assert client.submit(sum, [1, 2, 3], pure=False).result(timeout=30) == 6


def test_all_that_daskconfig_starts_is_where_it_was_told(members: Members) -> None:
    with address_client(members.address, members.keys):
        found = [listening(family(pid)) for pid in members.pids]
    assert [len(each) for each in found] == [2, 3]  # each Dask server, and HTTP in the scheduler and the worker
    assert {*found[0], *found[1]} == {"127.0.0.1"}


def test_without_the_keys_nobody_gets_in(members: Members, tmp_path: Path) -> None:
    assert f"{members.address} needs keys: `nrrn cluster keys FOLDER` makes some" in refusal(members.address)
    said = refusal(members.address, make_keys(tmp_path / "others"))
    assert "has other keys than given here, or none ([SSL: CERTIFICATE_VERIFY_FAILED]" in said
    assert "give --keys the folder that it was started with" in said
    plain = members.address.replace("tls", "tcp")
    assert f"no Dask scheduler answers at {plain}" in refusal(plain)
    with pytest.raises(OSError, match=r"[Tt]imed out|[Cc]losed"), Client(plain, timeout=3):
        pass


@pytest.mark.parametrize("certificate", ["none", "another cluster's"])
def test_a_client_that_trusts_anybody_is_shut_out_all_the_same(
    members: Members, tmp_path: Path, certificate: str
) -> None:
    careless = ssl.create_default_context()
    careless.check_hostname, careless.verify_mode = False, ssl.CERT_NONE
    if certificate != "none":
        others = make_keys(tmp_path / "others")
        careless.load_cert_chain(others / "cert.pem", others / "key.pem")
    with (
        socket.create_connection(("127.0.0.1", members.port), timeout=10) as raw,
        pytest.raises(ssl.SSLError, match=r"CERTIFICATE_REQUIRED|UNKNOWN_CA|DECRYPT_ERROR"),
        careless.wrap_socket(raw) as wrapped,
    ):
        wrapped.recv(1)


def test_a_worker_is_no_scheduler(members: Members) -> None:
    with address_client(members.address, members.keys) as client:
        (worker,) = client.scheduler_info()["workers"]
    assert f"what answers at {worker} is 'Worker', not a scheduler" in refusal(worker, members.keys)


def test_a_scheduler_without_tls_is_not_taken_for_ours(members: Members) -> None:
    with LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0") as cluster:
        address = cluster.scheduler_address.replace("tcp", "tls")
        said = refusal(address, members.keys)
    # which, depends on whether its greeting arrives before our TLS begins
    assert "or none ([SSL: WRONG_VERSION_NUMBER]" in said or f"what answers at {address} is not Dask over TLS" in said


GREETINGS = {"silence": b"", "ssh": b"SSH-2.0-OpenSSH_9\r\n", "a huge frame": b"\0\0\0\x40\1\0\0\0" + bytes(20)}


@pytest.mark.parametrize("greeting", GREETINGS)
@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_what_is_no_dask_is_refused_in_time(
    members: Members, scheme: str, greeting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nrrn_pipeline.cluster.address.ANSWER_S", 1)
    with answering(GREETINGS[greeting]) as port:
        said = refusal(f"{scheme}://127.0.0.1:{port}", members.keys if scheme == "tls" else None)
    assert any(word in said for word in ("is not Dask", "no Dask scheduler answers", "has other keys"))


@contextmanager
def answering(greeting: bytes) -> Iterator[int]:
    """The port of a server that says one thing to all and then keeps them waiting."""
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return
            held[-1].sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread: closing alone would not
        thread.join()
    for each in held:
        each.close()


@pytest.mark.parametrize("cluster", ["local", "serial"])
def test_keys_without_a_cluster_to_use_them_for_are_refused(cluster: str) -> None:
    with pytest.raises(InputError, match="keys are for a cluster that is there already"):
        Options(cluster=cluster, keys="keys")
