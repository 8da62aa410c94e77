"""What this process may use of the machine it is on, and what it has used."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dask.system
import distributed.system
import psutil

from nrrn_pipeline.errors import InputError

PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "zarr", "dask", "distributed")  # what changes voxels, or speaks


def cores() -> int:
    """Cores that this process may use: a batch job's share, by affinity and control group, not the whole node."""
    return int(dask.system.cpu_count())


def threads_each(workers: int) -> int:
    """Threads for each of several local workers, so that together they use every core once."""
    return max(1, cores() // workers)


def free_memory_bytes() -> int:
    """Memory that is free, and within the limit of this process's control group."""
    return int(min(psutil.virtual_memory().available, distributed.system.MEMORY_LIMIT))


def memory_share_bytes() -> int:
    """This process's part of that: as large as its part of the cores, if it was started beside others to share them."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    part = min(1.0, int(threads) / cores()) if threads.isdecimal() else 1.0
    return int(part * free_memory_bytes())


def peak_memory_bytes() -> int:
    """The most memory that this process has held at any time.

    On Linux from its own status file: getrusage also counts what the parent held before it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on every system, and needed on those without /proc only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def versions() -> dict[str, str]:
    """Of what driver and workers must have alike: Python's, and packages', without the build of one."""
    packages = {name: version(name).partition("+")[0] for name in ("nrrn-pipeline", *PACKAGES)}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **packages}


def refuse_other_versions(wanted: dict[str, str]) -> None:
    """Raises InputError, naming them, if this process has other versions than `wanted`."""
    own = versions()
    if other := [
        f"{name} {own.get(name)} instead of {wanted[name]}" for name in wanted if own.get(name) != wanted[name]
    ]:
        raise InputError(f"it has {', '.join(other)}: install the driver's versions there, or run the driver with its")
