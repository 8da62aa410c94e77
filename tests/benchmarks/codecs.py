"""MB/s of a shard of noise, read and written: by ours, by zarr's own codec pipeline, by zarrs' where it is installed.

    PYTHONPATH=. python tests/benchmarks/codecs.py      # for the last: pip install zarrs==0.2.3

The best of five. Prints; gates nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import zarr
from zarr.registry import register_pipeline

from nrrn_pipeline.benchmark import make_volume
from nrrn_pipeline.volume import read_box, write_box


def rate(work: Callable[[], object], megabytes: float) -> float:
    best = float("inf")
    for _ in range(6):
        started = perf_counter()
        work()
        best = min(best, perf_counter() - started)
    return megabytes / best


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        volume = make_volume(Path(temporary) / "noise.ome.zarr", (64, 512, 512))
        voxels = read_box(volume, volume.box)
        size = voxels.nbytes / 1e6
        read = rate(partial(read_box, volume, volume.box), size)
        written = rate(partial(write_box, volume, volume.box, voxels), size)
        print(f"ours: {read:.0f} MB/s read, {written:.0f} written", flush=True)
        for name in ("zarr", "zarrs"):
            if find_spec(name) is None:
                print(f"{name} is not installed")
                continue
            if name == "zarrs":
                from zarrs import ZarrsCodecPipeline

                register_pipeline(ZarrsCodecPipeline)
                zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
            array = zarr.open_array(volume.url, mode="r+")
            read = rate(partial(array.__getitem__, ...), size)
            written = rate(partial(array.__setitem__, ..., voxels), size)
            print(f"{name}: {read:.0f} MB/s read, {written:.0f} written", flush=True)


if __name__ == "__main__":
    main()
