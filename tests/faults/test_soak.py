"""Ten thousand slabs: the driver's memory is flat, the scheduler forgets, and each slab costs the same few requests."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster
from fsspec.spec import AbstractFileSystem
from numpy.typing import NDArray

from nrrn_pipeline import Layout, api, verify
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner
from nrrn_pipeline.volume import open_volume
from tests.support import bare_zarr, image_like, tiny_weights

SLABS, WARM = 10_000, 2_000
DEPTH = 100  # slices of a source chunk
THREADS = 2


class Sizes(AbstractFileSystem):  # type: ignore[misc]
    """An object store that counts requests, and keeps of slabs' voxels and records the sizes alone."""

    protocol = "sizes"
    cachable = False
    objects: dict[str, bytes | int] = {}  # noqa: RUF012  (one for all instances, as a store is)
    requests: Counter[str] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("sizes://").rstrip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._count("write", path)
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = len(value) if _kind(path) in ("voxels", "record") else value

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._count("read", path)
        found = self.objects.get(path)
        if found is None:
            raise FileNotFoundError(path)
        assert isinstance(found, bytes), f"{path} was read back"
        return found[start:end]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._count("list", path)
        return self._below(path, deep=False)

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
        self._count("list", path)
        return {entry["name"]: entry for entry in self._below(path, deep=True)}

    def isfile(self, path: str) -> bool:
        self._count("list", path)
        return path in self.objects

    def rm_file(self, path: str) -> None:
        self._count("delete", path)
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._count("delete", path)
        for name in [name for name in self.objects if name == path or name.startswith(f"{path}/")]:
            del self.objects[name]

    def _below(self, path: str, deep: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, held in self.objects.items():
            if name.startswith(f"{path}/"):
                inner = name.removeprefix(f"{path}/").partition("/")
                if inner[1] and not deep:
                    found[inner[0]] = {"name": f"{path}/{inner[0]}", "size": 0, "type": "directory"}
                else:
                    size = held if isinstance(held, int) else len(held)
                    found[name] = {"name": name, "size": size, "type": "file"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values())

    def _count(self, what: str, path: str) -> None:
        self.requests[f"{what} {_kind(path)}"] += 1


def _kind(path: str) -> str:
    for part, kind in {
        "/0/c/": "voxels",
        "/nrrn/slabs/": "record",
        "/nrrn/drivers": "lease",
        "/in.zarr/c/": "source",
    }.items():
        if part in path:
            return kind
    return path.rpartition("/")[2]
