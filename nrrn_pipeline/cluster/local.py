"""Dask on this machine: one process a worker, one slab or a few at a time in each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import dask
from distributed import Client, LocalCluster
from pydantic import Field, model_validator

from nrrn_pipeline.cluster.base import DASHBOARD_PORT, DASK_CONFIG, ClusterSettings, free_port, process_environment
from nrrn_pipeline.cluster.worker import GPUS
from nrrn_pipeline.errors import RunError
from nrrn_pipeline.machine import threads_each


class LocalSettings(ClusterSettings):
    """Workers on this machine; `workers` None: as many as cores and memory carry, or one a GPU.

    processes: each a process of its own; else all of it is in threads of this one, which starts at once, and one slab
    computes at a time, with all cores.
    """

    kind: Literal["local"] = "local"
    workers: Annotated[int, Field(ge=1)] | None = None
    processes: bool = True

    @model_validator(mode="after")
    def _possible(self) -> LocalSettings:
        if not self.processes and (self.workers or 1) > 1:
            raise ValueError(f"workers {self.workers}: without processes there is one, which computes with all cores")
        return self


@contextmanager
def local_client(workers: int, slabs_each: int = 1, gpus: int = 0, processes: bool = True) -> Iterator[Client]:
    """A client of `workers` new processes that share the machine's cores and GPUs; gone when the block ends.

    Each has `slabs_each` slabs in flight: while one computes, the next is read. All of them listen on loopback alone,
    where other users of this machine can reach them. Without `processes` they are threads of this one.
    """
    environment = process_environment(threads_each(workers))
    settings = {
        **DASK_CONFIG,
        "distributed.worker.multiprocessing-method": "spawn",
        # else a worker that is being restarted just then is dropped, and with the last one the run would hang
        "distributed.deploy.lost-worker-timeout": "1 hour",
        "distributed.worker.preload": ["nrrn_pipeline.cluster.worker"] if processes else [],
        "distributed.nanny.pre-spawn-environ": environment,
    }
    with (
        dask.config.set(settings),
        _started(workers, slabs_each, gpus if processes else None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _started(workers: int, slabs_each: int, gpus: int | None) -> Iterator[LocalCluster]:
    try:
        with warnings.catch_warnings():
            # another process may take the port in between; where the dashboard is, is said in any case
            warnings.filterwarnings("ignore", "Port [0-9]+ is already in use")
            cluster = _local_cluster(workers, slabs_each, gpus)
    except RuntimeError as error:
        raise RunError(
            f"local workers could not start ({error}): run the same command again. In a script, call denoise under "
            '`if __name__ == "__main__":`, as workers begin by importing the script; or use the cluster serial'
        ) from error
    with cluster:
        yield cluster


def _local_cluster(workers: int, slabs_each: int, gpus: int | None) -> LocalCluster:
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=slabs_each,
        processes=gpus is not None,
        memory_limit=0,  # the plan bounds memory before the run; nothing here can be spilled
        host=None if gpus is None else "127.0.0.1",
        worker_dashboard_address="127.0.0.1:0",
        dashboard_address=f"127.0.0.1:{free_port(DASHBOARD_PORT)}",
        # not in the environment before they start, where Dask would keep it for the next
        **({} if gpus is None else {"env": {GPUS: str(gpus)}}),
        silence_logs=logging.CRITICAL,  # what goes wrong reaches the driver as a task's error, and is said once
    )
