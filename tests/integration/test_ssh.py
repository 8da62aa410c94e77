"""Workers through a real ssh server on loopback, over TLS."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nrrn_pipeline import Layout, Options, denoise
from nrrn_pipeline.cluster import make_keys, ssh, started
from nrrn_pipeline.cluster.ssh import SshSettings
from nrrn_pipeline.errors import InputError
from tests.servers import free_ports
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

CONFIGURATION = """\
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
SetEnv PYTHONPATH={python_path}
"""
WAIT_S = 30.0


@dataclass(frozen=True)
class Sshd:
    """An ssh server that lets in who has the key `user`."""

    folder: Path
    port: int

    def settings(self, **changes: Any) -> SshSettings:
        own = {
            "hosts": ("127.0.0.1",),
            "keys": str(self.folder / "keys"),
            "cores": 1,
            "interface": "lo",
            "port": self.port,
            "identity": str(self.folder / "user"),
            "known_hosts": str(self.folder / "known_hosts"),
        }
        return SshSettings(**own | changes)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or os.geteuid() != 0:
        reason = "an ssh server needs openssh-server, and root"
        pytest.fail(reason) if os.environ.get("NRRN_ALL_PARTS") == "1" else pytest.skip(reason)
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # it does not start without
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_ports("sshd")["sshd"]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(
        CONFIGURATION.format(folder=folder, python_path=os.environ.get("PYTHONPATH") or "/nowhere")
    )
    make_keys(folder / "keys")
    command = ["setpriv", "--pdeathsig", "KILL", server, "-D", "-f", folder / "sshd_config", "-p", str(port)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_S
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield Sshd(folder, port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_volume_is_denoised_by_workers_over_ssh(sshd: Sshd, tmp_path: Path) -> None:
    bare_zarr(tmp_path / "in.zarr", image_like((8, 60, 70)))
    weights = tiny_weights(tmp_path / "w.safetensors")
    layout = Layout(chunk=(4, 16, 32), shard=(4, 32, 64), tile=40)
    for name, cluster in (("serial", "serial"), ("ssh", sshd.settings(workers=2))):
        options = Options(layout=layout, cluster=cluster)
        denoise(tmp_path / "in.zarr", tmp_path / name, weights, options)
    assert stored_chunks(tmp_path / "ssh/0") == stored_chunks(tmp_path / "serial/0")


def test_workers_speak_tls_have_their_settings_and_end_with_the_cluster(sshd: Sshd) -> None:
    with started(sshd.settings(workers=2, gpus=2, cores=3), 2) as cluster:
        workers = cluster.client.scheduler_info(n_workers=-1)["workers"]
        assert len(workers) == 2
        assert all(address.startswith("tls://127.0.0.1:") for address in workers)
        assert [worker["nthreads"] for worker in workers.values()] == [2, 2]
        assert [worker["resources"] for worker in workers.values()] == [{"GPU": 1}] * 2
        environments = cluster.client.run(lambda: dict(os.environ)).values()
        assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"3"}
        assert {environment["CUDA_VISIBLE_DEVICES"] for environment in environments} == {"0", "1"}
        assert not any(cluster.client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks).values())
        pids = list(cluster.client.run(os.getpid).values())
        assert "1 host over ssh, dashboard http://127.0.0.1:" in cluster.where
        encrypted = {int(address.rpartition(":")[2]) for address in workers}
        for pid in pids:
            listening = [c.laddr for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
            assert {address.port for address in listening if address.ip != "127.0.0.1"} <= encrypted
    deadline = time.monotonic() + WAIT_S
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their cluster"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "stranger"}, "no worker starts on 127.0.0.1 .*Permission denied"),
        ({"known_hosts": "empty"}, "no worker starts on 127.0.0.1 .*[Hh]ost key is not trusted"),
        ({"port": 1}, "no worker starts on 127.0.0.1 .*Connect call failed"),
        ({"python": "/bin/false"}, "no worker starts on 127.0.0.1 .*Worker failed to start"),
        ({"interface": "ib7"}, "no interface 'ib7'"),
        ({"keys": "nowhere"}, "there are no keys in .*nowhere"),
    ],
)
def test_what_keeps_workers_from_starting_is_said(sshd: Sshd, changes: dict[str, Any], message: str) -> None:
    (sshd.folder / "empty").touch()
    there = {
        name: str(sshd.folder / value) if name in ("identity", "known_hosts", "keys") else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=message), started(sshd.settings(**there), 2):
        pass


def test_hosts_that_are_silent_are_given_up(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 30\n")
    silent.chmod(0o755)
    monkeypatch.setattr(ssh, "START_S", 1)
    with (
        pytest.raises(InputError, match=r"no worker starts on 127\.0\.0\.1 .nothing for 1 s"),
        started(sshd.settings(python=str(silent)), 2),
    ):
        pass


def test_without_asyncssh_it_says_what_to_install(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(InputError, match=r"pip install nrrn-pipeline\[ssh\]"), started(sshd.settings(), 2):
        pass
