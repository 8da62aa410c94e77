"""What is read of the source, counted as storage gives it: each voxel once to measure, and as planned after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nrrn_pipeline import Layout, Options, storage
from nrrn_pipeline.cost import cost_of
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import run_serially
from tests.support import bare_zarr, image_like, tiny_weights

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


def test_a_run_that_goes_on_measures_one_slice_again(tmp_path: Path, read: Counter[str]) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", image_like(SHAPE), (1, 128, 128), compressors=None)
    options = Options(layout=Layout(chunk=(4, 32, 32), shard=(8, 64, 64)), device="cpu", cluster="serial")
    plan = make_plan(source, tmp_path / "out.zarr", tiny_weights(tmp_path / "w.safetensors"), options)
    list(run_plan(plan, run_serially, "cpu"))
    read.clear()
    list(run_plan(plan, run_serially, "cpu"))
    assert read["now"] == SHAPE[1] * SHAPE[2]
