"""What paper_tables.py works with: how much is done at each scale, and the folder in which it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from nrrn_pipeline import (
    Box,
    Layout,
    Method,
    Noise,
    Options,
    TrainingVolume,
    TrainSettings,
    Yardstick,
    add_noise,
    candidates,
    compare,
    open_volume,
    train,
    write_results,
)
from nrrn_pipeline.geometry import Span, boxes_of
from nrrn_pipeline.training.fit import PUBLISHED
from nrrn_pipeline.volume import read_box

FIB25, EPFL = "flyem_fib25_training_sample1_250.npz", "epfl_ca1_dev_z000-079_y0800-1503_x0160-0863.npz"
FILTERS = "mean,gaussian-avg,median-avg,nlm,nlm-avg,bm3d,bm3d-avg,bm4d"
PAPERS, WHOLE = Method(), Layout()  # three images, cropped; default tiles
SEEDS = {"train": 25, "test": 2026}
STRENGTHS = {f"gaussian {sigma}": Noise(sigma=sigma) for sigma in (10, 25, 50, 75)}
STRENGTHS |= {f"poisson {peak}": Noise(peak=peak) for peak in (30, 8, 1)}
SHIPPED = "nrrn-fast=nrrn-fast"  # trained by shipped_weights.py on other slices of FIB-25
USUAL = TrainSettings(units=2, channels=16, seed=1)  # what `nrrn train` does, and so at every scale


@dataclass(frozen=True)
class Scale:
    """How much is done. Networks are (units, channels); test: the shape of what is measured; filters: which.

    settings: of the paper's losses. own: of ours, which is chosen by the noise. wide: side of the slices that edges are
    looked for in. tuned, anew: steps of training from other weights, and from none. fresh: shape of a volume that
    nothing was learnt from yet; fresh_steps: as many steps are taken there; fresh_own: by these settings.
    """

    nrrn: tuple[int, int]
    denoisenet: tuple[int, int]
    unet: tuple[int, int]
    units: tuple[int, ...]
    settings: TrainSettings
    own: TrainSettings
    test: tuple[int, int, int]
    filters: str = FILTERS
    strengths: tuple[str, ...] = tuple(STRENGTHS)
    wide: int = 704
    tuned: tuple[int, ...] = (100, 400)
    anew: tuple[int, ...] = (100, 400, 800)
    fresh: tuple[int, int, int] = (80, 704, 704)
    fresh_steps: tuple[int, ...] = (50, 100, 200, 400, 800)
    fresh_own: TrainSettings = USUAL


FAST = TrainSettings(
    steps=500, batch=8, crop=48, learning_rate=2e-3, halve_every=125, seed=1, loss="adjacent", hold_out=0
)
TINY = {"steps": 2, "batch": 2, "crop": 32}
SCALES = {
    "test": Scale(
        *((1, 4), (3, 4), (1, 4), (1, 2), replace(FAST, **TINY), replace(USUAL, **TINY), (3, 48, 48)),
        filters="mean,nlm-avg",
        strengths=("gaussian 25", "poisson 30"),
        wide=96,
        tuned=(1, 2),
        anew=(1, 2),
        fresh=(12, 120, 110),
        fresh_steps=(1, 2),
        fresh_own=replace(USUAL, units=1, channels=4, batch=2, crop=32),
    ),
    "small": Scale((2, 16), (6, 16), (2, 16), (1, 2, 3), FAST, USUAL, (8, 250, 250), wide=500),
    "full": Scale(
        *((4, 64), (20, 64), (4, 64), (1, 2, 3, 4, 5)),
        *(replace(PUBLISHED, steps=20000, hold_out=0), replace(USUAL, steps=20000, batch=16), (32, 250, 250)),
    ),
}


class Bench:
    """One run of it all, in one folder."""

    def __init__(self, data: Path, out: Path, scale: Scale) -> None:
        self.data, self.out, self.scale = data, out, scale
        self.filters = scale.filters.split(",")
        self.options = Options(cluster="local" if scale.test[0] > 3 else "serial")
        self.lines: list[str] = []  # of the section at hand
        self.results: dict[str, Any] = {}
        self.trainings: list[str] = []  # done, not found

    @cached_property
    def usual(self) -> dict[str, Path]:
        """FIB-25 with noise as in the demo."""
        return self.volumes(FIB25, "fib25", Noise(sigma=30))

    def slices(self, source: str, name: str) -> dict[str, Path]:
        """Paths of slices as they are: to train on and, none of them the same, to measure."""
        depth, height, width = self.scale.test
        return {
            "train": self.stored(source, f"{name}-train", lambda volume: volume[: len(volume) - depth - 10]),
            "test": self.stored(source, f"{name}-test", lambda volume: volume[-depth:, :height, :width]),
        }

    def lacks(self, source: str, title: str) -> bool:
        """Whether a volume is not there; if so, the section says it."""
        if (self.data / source).exists():
            return False
        self.lines += [f"## {title}", "", f"Left out: {source} is not there.", ""]
        return True

    def stored(self, source: str, name: str, part: Callable[[NDArray[Any]], NDArray[Any]]) -> Path:
        """What `part` makes of a volume, kept as NAME.zarr."""
        path = self.out / f"{name}.zarr"
        if not path.exists():
            zarr.create_array(path, data=part(np.load(self.data / source)["volume"]), chunks=(8, 128, 128))
        return path

    def volumes(self, source: str, name: str, noise: Noise) -> dict[str, Path]:
        """The same slices clean, and with noise."""
        paths = {}
        for part, clean in self.slices(source, name).items():
            paths |= {f"clean {part}": clean, part: self.noisy(clean, replace(noise, seed=SEEDS[part]))}
        return paths

    def noisy(self, clean: Path, noise: Noise) -> Path:
        """The same slices with noise."""
        noisy = self.out / f"{clean.stem}-{noise.sigma:g}-{noise.peak or 0:g}.zarr"
        add_noise(clean, noisy, noise, self.options)
        return noisy

    def trained(self, name: str, volumes: dict[str, Path], **how: Any) -> str:
        """NAME=FILE with weights, trained unless they are there; those named `own` by our settings."""
        kind = how.get("network", "nrrn")
        units, channels = getattr(self.scale, kind)
        base = self.scale.own if name.startswith("own") else self.scale.settings
        settings = replace(base, **{"units": units, "channels": channels, **how})
        weights = self.out / "weights" / f"{volumes['train'].stem}-{name}-{settings.units}.safetensors"
        weights.parent.mkdir(exist_ok=True)
        if not weights.exists():
            started = time.monotonic()
            clean = volumes["clean train"] if settings.loss == "clean" else None
            resumed = weights.with_name(f"{weights.name}.checkpoint").exists()
            train(TrainingVolume(volumes["train"], clean), weights, settings)
            seconds = time.monotonic() - started
            if not resumed:  # else nobody knows how long it took
                took_file(weights).write_text(f"{seconds:.1f}\n")
            self.trainings.append(weights.stem)
            print(f"trained {weights.stem} in {seconds:.0f} s", flush=True)
        return f"{name}={weights}"

    def compared(
        self,
        name: str,
        volumes: dict[str, Path],
        methods: list[str],
        method: Method = PAPERS,
        layout: Layout = WHOLE,
    ) -> dict[str, Any]:
        """Measures by method; against clean slices, if there are any."""
        options = replace(self.options, method=method, layout=layout)
        folder = self.out / name
        clean = volumes.get("clean test")
        yardstick = Yardstick(clean, flattest(clean)) if clean else Yardstick()
        comparison = compare(volumes["test"], str(folder), candidates(",".join(methods), []), options, yardstick)
        write_results(comparison, str(folder), {"source": volumes["test"].name})
        self.results[name] = {found.name: found.measures for found in comparison.compared}
        return self.results[name]

    def table(self, title: str, header: str, rows: list[list[str]]) -> None:
        """Into the section."""
        names = header.split(",")
        self.lines += [f"## {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        self.lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]


def took_file(weights: Path) -> Path:
    """It says how many seconds their training took, from volume to weights, measuring the noise included."""
    return weights.with_suffix(".seconds")


def flattest(path: Path, side: int = 24) -> Box:
    """The square of the middle slice whose clean signal varies least."""
    volume = open_volume(path)
    z = volume.shape[0] // 2
    middle = Box(Span(z, z + 1), volume.box.y, volume.box.x)
    whole = (box for box in boxes_of(middle, (1, side, side)) if box.size == side**2)
    return min(whole, key=lambda box: float(read_box(volume, box).std()))
