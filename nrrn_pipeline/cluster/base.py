"""What all kinds of clusters have in common: settings that refuse what they do not know, and what a started one is."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from distributed import Client
from pydantic import BaseModel, ConfigDict

from nrrn_pipeline.runners import PATIENCE_S

DASHBOARD_PORT = 8787
# of Dask, for schedulers and workers of every kind of cluster
DASK_CONFIG = {
    "distributed.scheduler.allowed-failures": 1,  # deaths of workers an attempt; the runner makes three
    # it would sample all stacks 100 times a second, and keep 1000 s of them: 130 MB of each worker, in no plan
    "distributed.worker.profile.enabled": False,
}


class ClusterSettings(BaseModel):
    """Of one kind of cluster; each kind adds `kind`, its name in a settings file, and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def memory_bytes(self) -> int | None:
        """What a worker may take; None: it is not told."""
        return None


def leave_alone(done: int) -> None:
    """What a cluster needs done for it while a run goes on, if its workers do not end by themselves: nothing."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is running. `where` says where, in words.

    tend: called every few seconds while tasks run, with the number that are done: replaces workers that are gone, and
    raises RunError if that is no use any more. patience_s: how long a run may be without workers, as when jobs queue.
    """

    client: Client
    where: str
    tend: Callable[[int], None] = leave_alone
    patience_s: float = PATIENCE_S


def process_environment(threads: int) -> dict[str, str]:
    """What torch and the C library read once, when a worker process of so many computing threads starts.

    Dask's own allocator settings give every tensor's memory back at once; the page faults of taking it again made one
    thread up to twice as slow. These keep up to 256 MiB, in one arena, in huge pages where the system has them.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**28),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def free_port(wanted: int) -> int:
    """The wanted port of loopback, or 0 (any) if something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return 0
    return wanted
