"""Workers on this machine: processes that share its GPUs, or threads."""

from __future__ import annotations

import os
from pathlib import Path

import dask
import pytest
from distributed import Client

from nrrn_pipeline import InputError, Layout, Options, denoise
from nrrn_pipeline.cluster import load_settings, local_client
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(2, 32, 32), shard=(2, 32, 32), tile=32)


def gpus_of(client: Client) -> list[str | None]:
    return sorted(client.run(lambda: os.environ.get("CUDA_VISIBLE_DEVICES")).values(), key=str)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("4,GPU-7", ["4", "GPU-7", "4"])])
def test_each_worker_sees_one_gpu(visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with local_client(3, gpus=2) as client:
        assert gpus_of(client) == sorted(expected)


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_single_gpu_is_left_as_it_is(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with local_client(1, gpus=gpus) as client:
        assert gpus_of(client) == [None]


def test_workers_and_their_scheduler_keep_no_profiles_which_no_plan_counts() -> None:
    with local_client(2) as client:
        assert not any(client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks).values())
        assert not client.run_on_scheduler(dask.config.get, "distributed.worker.profile.enabled")


def test_threads_give_the_bytes_of_processes(tmp_path: Path) -> None:
    bare_zarr(tmp_path / "raw.zarr", image_like((6, 40, 40)))
    weights = tiny_weights(tmp_path / "w.safetensors")
    (tmp_path / "threads.toml").write_text('kind = "local"\nprocesses = false\n')
    for name, cluster in (("threads", str(tmp_path / "threads.toml")), ("serial", "serial")):
        options = Options(cluster=cluster, layout=LAYOUT, device="cpu")
        denoise(tmp_path / "raw.zarr", tmp_path / f"{name}.zarr", weights, options)
    assert stored_chunks(tmp_path / "threads.zarr/0") == stored_chunks(tmp_path / "serial.zarr/0")


def test_several_workers_without_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('kind = "local"\nprocesses = false\nworkers = 2\n')
    with pytest.raises(InputError, match="without processes there is one, which computes with all cores"):
        load_settings(tmp_path / "c.toml")
