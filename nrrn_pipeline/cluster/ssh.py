"""Workers on machines that ssh reaches: started for one run, and gone with it.

Dask's SSHCluster starts its scheduler through ssh too, and can be told of TLS through Dask's configuration alone. So
the scheduler is in this process, and only SSHCluster's workers are used; the configuration, which they get on their
command line, names the files of the keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import dask
import psutil
from distributed import Client, Scheduler, Security, SpecCluster
from distributed.core import Status
from distributed.deploy.ssh import Worker
from pydantic import AfterValidator, Field, model_validator

from nrrn_pipeline.cluster.base import (
    DASHBOARD_PORT,
    DASK_CONFIG,
    Cluster,
    ClusterSettings,
    free_port,
    process_environment,
)
from nrrn_pipeline.cluster.jobqueue_settings import Word
from nrrn_pipeline.cluster.keys import HOST_NAME, security_from
from nrrn_pipeline.errors import InputError

CONNECT_S = 30
ANSWER_S = 60
START_S = 180  # of all workers: the first on a machine reads its libraries from a cold disk


def _host(name: str) -> str:
    if not HOST_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no host: give names or addresses, such as gpu7.lab.org or 10.0.0.7")
    return name


class SshSettings(ClusterSettings):
    """Workers on machines that ssh reaches, each a process that Dask starts again if it dies.

    hosts: their names or addresses. keys: a folder that `nrrn cluster keys` made, at the same path on this machine and
    on all hosts, which holds Dask's certificates, not those of ssh. workers: on each host. gpus: that each host has,
    one a worker; 0: none. cores: of each worker. python: on the hosts, with this package; None is this one's path.
    interface: of this machine, towards the hosts; None: that of the machine's name. user, port, identity (a file with a
    private key), known_hosts (a file): of ssh; None is what ssh would take.
    """

    kind: Literal["ssh"] = "ssh"
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], Field(min_length=1)]
    keys: str
    workers: Annotated[int, Field(ge=1)] = 1
    cores: Annotated[int, Field(ge=1)]
    gpus: Annotated[int, Field(ge=0)] = 0
    python: Word | None = None
    interface: Word | None = None
    user: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    identity: str | None = None
    known_hosts: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> SshSettings:
        if self.gpus and self.gpus != self.workers:
            raise ValueError(f"workers {self.workers}, gpus {self.gpus}: a worker uses one GPU; give as many of both")
        return self


@contextmanager
def ssh_cluster(settings: SshSettings, slabs_each: int) -> Iterator[Cluster]:
    """A cluster of workers on all hosts, with `slabs_each` slabs in flight each; gone when the block ends.

    The scheduler is in this process, and whoever speaks to it needs the keys. Hosts that are lost in mid-run are not
    replaced: the run goes on with the others.

    Raises InputError if keys, interface or asyncssh are missing, or a host does not let us in or start its workers.
    """
    security = security_from(settings.keys)
    if settings.interface is not None and settings.interface not in (known := psutil.net_if_addrs()):
        raise InputError(f"this machine has no interface {settings.interface!r}: it has {', '.join(known)}")
    try:
        import asyncssh  # noqa: F401  (Dask imports it when it starts a worker)
    except ImportError as error:
        raise InputError("clusters of kind ssh need asyncssh: pip install nrrn-pipeline[ssh]") from error
    scheduler = {
        "protocol": "tls://",
        "security": security,
        "interface": settings.interface,
        "dashboard_address": f"127.0.0.1:{free_port(DASHBOARD_PORT)}",
    }
    with (
        dask.config.set(_configuration(settings, security)),
        SpecCluster(
            scheduler={"cls": Scheduler, "options": scheduler}, security=security, silence_logs=logging.CRITICAL
        ) as cluster,
    ):
        _start_workers(cluster, settings, slabs_each)
        with Client(cluster) as client:
            _wait_for_all(client, len(settings.hosts) * settings.workers)
            dashboard = f"http://127.0.0.1:{cluster.scheduler_info['services']['dashboard']}/status"
            noun = "host" if len(settings.hosts) == 1 else "hosts"
            yield Cluster(client, f"{len(settings.hosts)} {noun} over ssh, dashboard {dashboard}")


def _configuration(settings: SshSettings, security: Security) -> dict[str, Any]:
    """Of Dask, here and, as SSHCluster's workers take it along, on the hosts."""
    tls = security.get_tls_config_for_role("worker")
    return {
        **DASK_CONFIG,
        "distributed.comm.require-encryption": True,
        "distributed.comm.default-scheme": "tls",
        "distributed.comm.tls.ca-file": tls["ca_file"],
        "distributed.comm.tls.worker": {"cert": tls["cert"], "key": tls["key"]},
        "distributed.nanny.pre-spawn-environ": process_environment(settings.cores),
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.preload": ["nrrn_pipeline.cluster.worker"],
        "distributed.deploy.lost-worker-timeout": "365 days",
    }


class _Worker(Worker):
    """Dask's, which would wait for ever for a host that says nothing."""

    async def start(self) -> None:
        try:
            await asyncio.wait_for(super().start(), START_S)  # type: ignore[no-untyped-call]
        except TimeoutError as error:
            raise TimeoutError(f"nothing for {START_S} s") from error


def _start_workers(cluster: SpecCluster, settings: SshSettings, slabs_each: int) -> None:
    """On every host. Raises InputError, naming the hosts that failed."""

    async def start() -> None:
        for host in settings.hosts:
            for number in range(settings.workers):
                options = _worker_options(settings, host, number, slabs_each)
                cluster.worker_spec[f"{host}-{number}"] = {"cls": _Worker, "options": options}
        await cluster

    async def forget() -> set[str]:
        failed = {name: worker for name, worker in cluster.workers.items() if worker.status == Status.created}
        for name, worker in failed.items():
            del cluster.worker_spec[name], cluster.workers[name]
            await worker.close()
        return {name.rpartition("-")[0] for name in failed}

    try:
        cluster.sync(start)
    except Exception as error:  # asyncssh has many, and Dask's own is a bare one
        failed = ", ".join(sorted(cluster.sync(forget)))
        raise InputError(
            f"no worker starts on {failed} ({error}): `ssh` there must work without a password, and python there must "
            "have this package and, at the same path, the keys"
        ) from error


def _wait_for_all(client: Client, workers: int) -> None:
    try:
        client.wait_for_workers(workers, timeout=ANSWER_S)
    except TimeoutError as error:
        raise InputError(
            f"of {workers} workers on the hosts some do not reach the scheduler on this machine: let them through its "
            "firewall, or set interface to the network that they share with this machine"
        ) from error


def _worker_options(settings: SshSettings, host: str, number: int, slabs_each: int) -> dict[str, Any]:
    known = {
        "username": settings.user,
        "client_keys": settings.identity,
        "known_hosts": settings.known_hosts,  # never None: that would be to trust anybody
    }
    words: dict[str, Any] = {
        "name": f"{host}-{number}",
        "nthreads": slabs_each,
        "memory_limit": 0,  # the plan bounds memory before the run; nothing here can be spilled
        "dashboard_address": "127.0.0.1:0",
    }
    if settings.gpus:
        words |= {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": str(number)}}
    return {
        "address": host,
        "connect_options": {name: value for name, value in known.items() if value is not None}
        | {"port": settings.port, "connect_timeout": CONNECT_S},
        "kwargs": words,
        "worker_class": "distributed.Nanny",
        "remote_python": settings.python,
    }
