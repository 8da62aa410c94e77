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
    """Memory that is free, and within what this process may take at all."""
    return min(int(psutil.virtual_memory().available), memory_limit_bytes())


@cache
def memory_limit_bytes() -> int:
    """What this process may take: the machine's, or what its control groups, or its Slurm job, allow."""
    limits = [int(distributed.system.MEMORY_LIMIT), *group_limits()]
    if (megabytes := os.environ.get("SLURM_MEM_PER_NODE", "")).isdecimal():
        limits.append(int(megabytes) * 2**20)
    return min(limit for limit in limits if limit > 0)


def group_limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes of memory that each of this process's control groups on Linux allows, of those that set a limit.

    A batch system sets them some levels below the root, where Dask does not look.
    """
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if kinds else (groups, "memory.max")
        inner = root / place.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root) and (folder / name).exists():
                limit = (folder / name).read_text().strip()
                found += [int(limit)] if limit.isdecimal() else []  # "max": none
    return found


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
