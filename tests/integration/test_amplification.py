"""What is read of the source, counted as storage gives it: each voxel once to measure, and as planned after."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from nrrn_pipeline import Layout, Method, Options, RunWatch, denoise, storage
from nrrn_pipeline.cost import cost_of
from nrrn_pipeline.keeping import Keeping
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import Runner, ThreadRunner, run_serially
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

SHAPE = (24, 128, 128)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of chunks, by what a run is at."""
    counted, original = Counter[str](), storage.read_file

    def read_file(url: str, start: int = 0, stop: int | None = None) -> bytes | None:
        data = original(url, start, stop)
        if "/raw.zarr/c/" in url and data is not None:
            counted["now"] += len(data)
        return data

    monkeypatch.setattr("nrrn_pipeline.storage.read_file", read_file)
    return counted


@pytest.mark.parametrize("chunks", [(4, 32, 32), (1, 128, 128), (8, 64, 128)])
def test_bytes_read_are_those_of_the_plan(chunks: tuple[int, int, int], tmp_path: Path, read: Counter[str]) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE), chunks, compressors=None)
    layout = Layout(chunk=(4, 32, 32), shard=(8, 64, 64))
    options = Options(layout=layout, device="cpu", cluster="serial")
    plan = make_plan(source, tmp_path / "out.zarr", tiny_weights(tmp_path / "w.safetensors"), options)
    voxels = SHAPE[0] * SHAPE[1] * SHAPE[2]
    for progress in run_plan(plan, run_serially, "cpu"):
        if progress.stage == "denoising" and progress.done == 0:
            read["measured"], read["now"] = read["now"], 0
    assert read["measured"] == voxels, "each voxel once"
    assert read["now"] == round(cost_of(plan).chunk_amplification * voxels)


@pytest.mark.parametrize("chunks", [(4, 32, 32), (1, 128, 128), (8, 64, 128), (16, 48, 40)])
@pytest.mark.parametrize("runner", [run_serially, ThreadRunner(2)], ids=["serial", "prefetching"])
def test_a_worker_reads_each_chunk_once_to_measure_and_once_to_denoise(
    chunks: tuple[int, int, int], runner: Runner, tmp_path: Path, read: Counter[str]
) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE), chunks, compressors=None, fill_value=255)
    options = Options(layout=Layout(chunk=(4, 32, 32), shard=(8, 64, 64)), device="cpu", cluster="serial")
    plan = make_plan(source, tmp_path / "out.zarr", tiny_weights(tmp_path / "w.safetensors"), options)
    whole = prod(-(-length // chunk) * chunk for length, chunk in zip(SHAPE, chunks, strict=True))
    for progress in run_plan(plan, runner, "cpu", keeping=Keeping(uuid4().hex, 10**9)):
        if progress.stage == "denoising" and progress.done == 0:
            read["measured"], read["now"] = read["now"], 0
    assert (read["measured"], read["now"]) == (whole, whole)
    assert round(cost_of(plan, keep_bytes=10**9).chunk_amplification * plan.source.box.size) == plan.source.box.size
    list(run_plan(make_plan(source, tmp_path / "alone.zarr", tmp_path / "w.safetensors", options), run_serially, "cpu"))
    assert stored_chunks(tmp_path / "out.zarr/0") == stored_chunks(tmp_path / "alone.zarr/0")


def test_the_default_settings_read_a_volume_of_ours_once(tmp_path: Path, read: Counter[str]) -> None:
    """Eight slabs, that read for themselves, would read it 3.9 times."""

    class Beginning(RunWatch):
        def progressed(self, progress: Progress) -> None:
            if progress.stage == "denoising" and progress.done == 0:
                read.clear()

    noise = np.random.default_rng(0).integers(0, 256, (80, 600, 600), np.uint8)
    source = bare_zarr(tmp_path / "raw.zarr", noise, (16, 256, 256), compressors=None)
    options = Options(method=Method(name="gaussian-avg"), cluster="serial")
    for keep_gb, times in ((0.0, 3.89), (options.keep_gb, 1.0)):
        denoise(source, tmp_path / f"{keep_gb}.zarr", None, replace(options, keep_gb=keep_gb), Beginning())
        assert round(read["now"] / (80 * 768 * 768), 2) == times


def test_a_run_that_goes_on_measures_one_slice_again(tmp_path: Path, read: Counter[str]) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE), (1, 128, 128), compressors=None)
    options = Options(layout=Layout(chunk=(4, 32, 32), shard=(8, 64, 64)), device="cpu", cluster="serial")
    plan = make_plan(source, tmp_path / "out.zarr", tiny_weights(tmp_path / "w.safetensors"), options)
    list(run_plan(plan, run_serially, "cpu"))
    read.clear()
    list(run_plan(plan, run_serially, "cpu"))
    assert read["now"] == SHAPE[1] * SHAPE[2]
