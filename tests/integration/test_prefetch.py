"""Two slabs in flight in a worker: one computes, the other is read or written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from nrrn_pipeline import Layout, api, slab, writing
from nrrn_pipeline.cost import worker_bytes
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner, run_serially
from nrrn_pipeline.volume import open_volume
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

SLABS = 8


def planned(folder: Path, output: str) -> DenoisePlan:
    source = folder / "in.zarr"
    if not source.exists():
        bare_zarr(source, image_like((4 * SLABS, 32, 32)))
        tiny_weights(folder / "w.safetensors")
    layout = Layout(chunk=(4, 32, 32), shard=(4, 32, 32))
    return plan_denoise(open_volume(source), str(folder / output), describe_weights(folder / "w.safetensors"), layout)


class Witness:
    """Sees what begins and ends; a slab that computes waits until another has been read, as long as there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patient: bool) -> None:
        self.events: list[str] = []
        self.read, self.patient = threading.Semaphore(0), patient
        self.compute, self.read_box, self.write_box = slab.denoise_voxels, slab.read_box, writing.write_box
        monkeypatch.setattr(slab, "read_box", self.seen("read_box"))
        monkeypatch.setattr(writing, "write_box", self.seen("write_box"))
        monkeypatch.setattr(slab, "denoise_voxels", self.computed)

    def seen(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            result = getattr(self, name)(*arguments)
            self.events.append(name)
            if name == "read_box":
                self.read.release()
            return result

        return call

    def computed(self, *arguments: Any) -> Any:
        self.events.append("begin")
        if self.patient and self.events.count("begin") < SLABS:
            self.read.acquire(timeout=30)  # its own
            assert self.read.acquire(timeout=30), "no other slab was read meanwhile"
            self.read.release()
        result = self.compute(*arguments)
        self.events.append("end")
        return result


def test_the_next_slab_is_read_while_one_computes_and_never_two_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(run_plan(planned(tmp_path, "serial.zarr"), run_serially, "cpu"))
    witness = Witness(monkeypatch, patient=True)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        list(run_plan(planned(tmp_path, "dask.zarr"), DaskRunner(client), "cpu"))
    computing = [event for event in witness.events if event in ("begin", "end")]
    assert computing == ["begin", "end"] * SLABS
    assert stored_chunks(tmp_path / "dask.zarr/0") == stored_chunks(tmp_path / "serial.zarr/0")


def test_without_prefetch_one_slab_is_done_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch, patient=False)
    list(run_plan(planned(tmp_path, "serial.zarr"), run_serially, "cpu"))
    assert witness.events == ["read_box", "begin", "end", "write_box"] * SLABS


def test_the_plan_counts_the_slab_that_is_on_its_way(tmp_path: Path) -> None:
    plan = planned(tmp_path, "out.zarr")
    voxels = plan.slabs[1].read.size + plan.slabs[1].keep.size
    assert worker_bytes(plan, 2) >= worker_bytes(plan, 1) + voxels
    assert api.Options().slabs_each == 2
    assert api.Options(prefetch=False).slabs_each == api.Options(cluster="serial").slabs_each == 1
