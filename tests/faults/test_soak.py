"""Ten thousand slabs: the driver's memory is flat, the scheduler forgets, and each slab costs the same few requests."""

from __future__ import annotations

import gc
import sys
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

from nrrn_pipeline import Layout, slab
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.ledger import Ledger, Record
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner
from nrrn_pipeline.slabs import slab_key
from nrrn_pipeline.volume import open_volume
from tests.support import Passing, bare_zarr, tiny_weights

SLABS, WARM = 10_000, 2_000
DEPTH = 100  # slices of a source chunk
THREADS = 2


class Sizes(AbstractFileSystem):  # type: ignore[misc]
    """An object store that counts requests, and keeps of slabs' voxels and records the sizes alone."""

    protocol = "sizes"
    cachable = False
    objects: dict[str, bytes | int] = {}  # noqa: RUF012  (one for all instances, as a store is)
    requests: Counter[str] = Counter()  # noqa: RUF012

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


KINDS = {"/out.zarr/0/c/": "voxels", "/nrrn/slabs/": "record", "/nrrn/drivers": "lease", "/in.zarr/c/": "source"}


def _kind(path: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in path), path.rpartition("/")[2])


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DenoisePlan]:
    """Of a network that does nothing, and 10,000 slabs of 64 voxels that nobody keeps."""
    fsspec.register_implementation("sizes", Sizes, clobber=True)
    monkeypatch.setattr(slab, "load_network", lambda *_: (Passing(), ""))
    noise = np.random.default_rng(0).integers(0, 256, (SLABS, 8, 8), dtype=np.uint8)
    stored = bare_zarr(tmp_path / "in.zarr", noise, chunks=(DEPTH, 8, 8))
    for file in filter(Path.is_file, stored.rglob("*")):
        Sizes.objects[f"soak/in.zarr/{file.relative_to(stored)}"] = file.read_bytes()
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    layout = Layout(chunk=(1, 8, 8), shard=(1, 8, 8), tile=64)
    yield plan_denoise(open_volume("sizes://soak/in.zarr"), "sizes://soak/out.zarr", weights, layout)
    Sizes.objects.clear()
    Sizes.requests.clear()


def megabytes() -> float:
    """What this process holds, less what stands for the store."""
    gc.collect()
    kept = sum(sys.getsizeof(name) + sys.getsizeof(held) for name, held in Sizes.objects.items())
    return (psutil.Process().memory_info().rss - kept - sys.getsizeof(Sizes.objects)) / 1e6


@pytest.mark.timeout(1200)
def test_of_ten_thousand_slabs_each_costs_the_same_requests_and_the_driver_keeps_none(plan: DenoisePlan) -> None:
    done, tasks, memory, requests = 0, [0], {}, {}
    with (
        LocalCluster(
            processes=False, n_workers=1, threads_per_worker=THREADS, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        for progress in run_plan(plan, DaskRunner(client), "cpu"):
            if progress.record is None:
                continue
            done += 1
            tasks.append(len(cluster.scheduler.tasks))
            if done in (WARM, SLABS):
                memory[done], requests[done] = megabytes(), Sizes.requests.copy()
            if done == 1:
                started = time.perf_counter()
            if done == SLABS:
                seconds = time.perf_counter() - started
    print(f"{1000 * seconds / SLABS:.1f} ms a slab; MB after so many slabs: {memory}; at the end {Sizes.requests}")
    assert done == SLABS
    assert max(tasks) <= 2 * THREADS + 2  # in flight, and those that are being forgotten
    assert memory[SLABS] <= 1.05 * memory[WARM]
    found = Sizes.requests
    # a chunk of the source for each slab and for each one beside a chunk's end; and as many to measure them
    assert found["read source"] == SLABS + 2 * (SLABS // DEPTH - 1) + SLABS // DEPTH
    assert found["read plan.json"] == SLABS + 4  # before it was begun, and above it, there was none
    assert found["write voxels"] == found["write record"] == SLABS
    of_the_run = {"lease"}  # renewed every so many seconds
    others = {what: n for what, n in found.items() if n < SLABS and what.split()[1] not in of_the_run}
    assert sum(others.values()) < 60, others
    lists = [sum(n for what, n in at.items() if what.startswith("list")) for at in requests.values()]
    assert lists[1] - lists[0] <= seconds  # those of the lease: none for a slab


def test_what_is_whole_is_told_in_time_that_grows_with_its_slabs_and_no_faster(
    plan: DenoisePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, keeps = Ledger(plan.target.url), [slab.keep for slab in plan.slabs[:1000]]
    for keep in keeps:
        ledger.put(Record(slab_key(keep), keep.size, 1, 1, "", 1, {"c": (64, "")}))
    units, stored = {slab_key(keep): {keep} for keep in keeps}, dict.fromkeys(keeps, 64)
    hashed = Counter[int]()
    real = Box.__hash__

    def counting(box: Box) -> int:
        hashed[0] += 1
        return real(box)

    monkeypatch.setattr(Box, "__hash__", counting)
    assert ledger.torn(ledger.done(), units.items(), stored) == {}
    assert hashed[0] <= 10 * len(keeps)
