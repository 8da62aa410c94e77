"""A real Slurm for tests: its controller and three nodes on loopback, two of them with a pretended GPU."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import free_ports

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "scancel", "squeue", "scontrol", "sinfo")
NODES = ("n1", "n2", "n3")
WAIT_S = 60.0
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
InactiveLimit=0
KillWait=5
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000 Gres=gpu:h100:1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000 Gres=gpu:h100:1 State=UNKNOWN
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={n3} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=gpu Nodes=n[1-2] MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = """\
NodeName=n1 Name=gpu Type=h100 File=/dev/null
NodeName=n2 Name=gpu Type=h100 File=/dev/zero
"""


@dataclass(frozen=True)
class Slurm:
    """A Slurm whose commands work in `environment`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @contextmanager
    def in_use(self) -> Iterator[Slurm]:
        """Its commands work in this process and those that it starts, until the block ends."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield self

    def run(self, *command: str) -> str:
        ended = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=30)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout

    def jobs(self) -> dict[str, str]:
        """The state of each job that has not ended, by its number."""
        lines = self.run("squeue", "--noheader", "--format=%A %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def node_of(self, job: str) -> str:
        """The node that it runs on, or nothing."""
        return self.run("squeue", "--noheader", "--format=%N", "--jobs", job).strip()

    def node_states(self) -> dict[str, str]:
        return dict(line.split() for line in self.run("sinfo", "-N", "-h", "-p", "cpu", "-o", "%N %T").splitlines())

    def cancel(self, *jobs: str) -> None:
        self.run("scancel", *jobs)

    def set_node(self, node: str, state: str) -> None:
        """Down, or drain."""
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def resume(self, node: str) -> None:
        """It may have come back by itself."""
        if not self.node_states()[node].startswith(("idle", "mixed", "allocated")):
            self.set_node(node, "resume")

    def wait_until_idle(self) -> None:
        """No job is left, and all nodes can take one."""
        deadline = time.monotonic() + WAIT_S
        while self.jobs() or set(self.node_states().values()) != {"idle"}:
            assert time.monotonic() < deadline, f"{self.jobs()} on {self.node_states()}"
            time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Slurm with all its files and sockets in a folder, and a munge of its own; nothing of it is left at the end.

    Skips the test if it is not installed, or fails it if NRRN_ALL_PARTS is 1.
    """
    if os.geteuid() != 0 or (missing := [command for command in COMMANDS if shutil.which(command) is None]):
        reason = "Slurm needs root" if os.geteuid() else f"Slurm is not installed: there is no {', '.join(missing)}"
        pytest.fail(reason) if os.environ.get("NRRN_ALL_PARTS") == "1" else pytest.skip(reason)
    for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = free_ports("controller", *NODES)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    (folder / "gres.conf").write_text(GPUS)
    there, servers = Slurm(folder), []
    commands = [_munge(folder), ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    try:
        for command in commands:
            servers.append(_server(folder, there, command))
            if command[0] == "munged":
                _wait_for(folder, servers, (folder / "munge.socket").exists)
        _wait_for(folder, servers, lambda: _is_idle(there))
        yield there
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            if jobs := list(there.jobs()):
                there.run("scancel", "--signal=KILL", "--full", *jobs)
                there.cancel(*jobs)
                there.wait_until_idle()
        for server in reversed(servers):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _munge(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"key": "key-file", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    words = [f"--{option}={folder}/munge.{name}" for name, option in files.items()]
    return ["munged", "--foreground", "--force", *words]  # by force, as the folder lies in one that all may write to


def _server(folder: Path, there: Slurm, command: list[str]) -> subprocess.Popen[bytes]:
    """It dies with this process."""
    with open(folder / "log" / f"{command[0]}-{command[-1][:2]}.out", "wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=os.environ | there.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _is_idle(there: Slurm) -> bool:
    with suppress(AssertionError):  # the controller does not answer yet
        return there.node_states() == dict.fromkeys(NODES, "idle")
    return False


def _wait_for(folder: Path, servers: list[subprocess.Popen[bytes]], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        if any(server.poll() is not None for server in servers) or time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted((folder / "log").iterdir()))
            raise RuntimeError(f"Slurm did not start: {logs}")
        time.sleep(0.1)
