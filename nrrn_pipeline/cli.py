"""The command line: one subcommand a user goal, no logic of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nrrn_pipeline import api
from nrrn_pipeline.checking import check
from nrrn_pipeline.cost import bytes_text, counted
from nrrn_pipeline.errors import GO_ON, InputError, NrrnError
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.network import read_header, weights_hash
from nrrn_pipeline.planning import DenoisePlan, Layout, Method
from nrrn_pipeline.run import Progress as RunProgress
from nrrn_pipeline.training.fit import TrainSettings
from nrrn_pipeline.volume import get_provenance, open_volume

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Denoise FIB-SEM volumes with NRRN."
)
weights_app = typer.Typer(no_args_is_help=True, help="Weights files.")
app.add_typer(weights_app, name="weights")
out, err = (Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False) for stderr in (False, True))

Source = Annotated[str, typer.Argument(metavar="SRC", help="Zarr volume: OME-Zarr 0.4 or 0.5, or a bare array.")]
Output = Annotated[str, typer.Argument(metavar="DST", help="OME-Zarr 0.5 to write.")]
Cluster = Annotated[str, typer.Option(help="local, serial, or a Dask scheduler's address.")]
Workers = Annotated[int | None, typer.Option(help="Local processes [default: what cores and memory carry].")]
Tile = Annotated[int, typer.Option(help="Largest window the network sees, in voxels.")]
Halo = Annotated[int | None, typer.Option(help="Voxels read and discarded around a tile [default: the reach].")]
SlabSize = Annotated[str | None, typer.Option("--slab", metavar="Z,Y,X", help="Voxels of one task [default: a shard].")]
ChunkSize = Annotated[str | None, typer.Option("--chunk", metavar="Z,Y,X", help="Chunk of the output [16,256,256].")]
ShardSize = Annotated[str | None, typer.Option("--shard", metavar="Z,Y,X", help="Shard of the output [64,512,512].")]
Roi = Annotated[str | None, typer.Option(metavar="Z0:Z1,Y0:Y1,X0:X1", help="Denoise this part only.")]
LevelNumber = Annotated[int, typer.Option("--level", help="Pyramid level of SRC; 0 is full size.")]
Images = Annotated[int, typer.Option(help="Slices an estimate is made from: 3 (the paper's), 2 or 1.")]
Stats = Annotated[str, typer.Option(help="Normalise with each slice's own statistics or the volume's: slice, volume.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Delete what is at DST first; an unfinished run with the same settings is resumed."
    ),
]


@app.command()
def denoise(  # one parameter an option: that is how the command line is declared
    source: Source,
    output: Output,
    weights: Annotated[str, typer.Option(help="Weights from nrrn train or nrrn weights import.")],
    cluster: Cluster = "local",
    workers: Workers = None,
    tile: Tile = 256,
    halo: Halo = None,
    slab: SlabSize = None,
    chunk: ChunkSize = None,
    shard: ShardSize = None,
    roi: Roi = None,
    level: LevelNumber = 0,
    images: Images = 3,
    stats: Stats = "slice",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Denoise SRC into DST. Interrupted? Run the same command again: it goes on where it was.

    Example: nrrn denoise raw.zarr clean.zarr --weights lab.safetensors
    """
    options = api.Options(
        level=level,
        roi=_roi(roi),
        layout=_layout(slab, chunk, shard, tile, halo),
        method=Method(images, stats),
        device=device,
        cluster=cluster,
        workers=workers,
        overwrite=overwrite,
    )
    with _bar(GO_ON) as bar:
        summary = api.denoise(source, output, weights, options, _Watch(bar))
    speed = summary.voxels / summary.seconds
    done = counted(summary.slabs, "slab") + (f", {summary.resumed} of them done before" if summary.resumed else "")
    out.print(f"{summary.plan.group_url}: complete, {done}")
    if summary.voxels:
        peak = bytes_text(summary.peak_memory_bytes)
        out.print(f"{summary.seconds:.1f} s, {speed / 1e6:.3f} million voxels/s, peak memory of a worker {peak}")


@app.command()
def plan(
    source: Source,
    output: Output,
    weights: Annotated[str | None, typer.Option(help="Weights [default: the paper's network is assumed].")] = None,
    cluster: Cluster = "local",
    workers: Workers = None,
    tile: Tile = 256,
    halo: Halo = None,
    slab: SlabSize = None,
    chunk: ChunkSize = None,
    shard: ShardSize = None,
    roi: Roi = None,
    level: LevelNumber = 0,
    images: Images = 3,
    stats: Stats = "slice",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Say what nrrn denoise would do with the same words, and what it would take. Writes nothing."""
    options = api.Options(
        level=level,
        roi=_roi(roi),
        layout=_layout(slab, chunk, shard, tile, halo),
        method=Method(images, stats),
        device=device,
        cluster=cluster,
        workers=workers,
        overwrite=overwrite,
    )
    forecast = api.plan(source, output, weights, options)
    made, cost = forecast.plan, forecast.cost
    network = _network(made.weights.units, made.weights.channels)
    rows = {
        "source": f"{made.source.url}, {_by(made.source.shape)} {made.source.dtype}",
        "output": f"{made.group_url}, {_by(made.target.shape)}, shards of {_by(made.target.write_unit)}",
        "network": network if weights else f"{network}: the paper's, as no --weights are given",
        "slabs": f"{cost.slabs} of {_by(made.slab)}, tile {made.tile}, halo {made.halo}",
        "tasks": f"{cost.tasks}: {cost.statistics_tasks} for statistics, {cost.slabs} to denoise",
        "reads": f"{bytes_text(cost.read_bytes)}; {bytes_text(cost.fetched_bytes)} in whole chunks of the source",
        "read amplification": f"{cost.read_amplification:.2f}; {cost.chunk_amplification:.2f} in whole chunks",
        "writes": f"{bytes_text(cost.written_bytes)} before compression",
        "arithmetic": f"{cost.flop / 1e12:.3g} TFLOP",
        "memory": f"{bytes_text(cost.worker_bytes)} a worker at its peak",
        "time": f"{_duration(forecast.seconds)} of the network with {counted(forecast.workers, 'worker')}, "
        "from one timed tile",
    }
    _print_rows(rows)


@app.command()
def info(path: Annotated[str, typer.Argument(help="A volume or a weights file.")]) -> None:
    """Describe a volume or a weights file."""
    if Path(path).is_file():
        header = read_header(path)
        record = header.get("training", {})
        rows = {"units": header["units"], "channels": header["channels"], "sha256": weights_hash(path)}
        _print_rows({key: str(value) for key, value in {**rows, **record}.items()})
        return
    volume = open_volume(path)
    rows = {
        "url": volume.url,
        "shape (z, y, x)": _by(volume.shape),
        "dtype": volume.dtype,
        "bytes": bytes_text(volume.box.size * volume.itemsize),
        "voxel size": f"{_by(volume.voxel_nm)} nm" if volume.voxel_nm else "unknown",
        "chunk": _by(volume.chunk),
        "shard": "none" if volume.chunk == volume.write_unit else _by(volume.write_unit),
        "axes": ",".join(volume.axes),
    }
    made = get_provenance(path)
    _print_rows(rows | ({"nrrn": json.dumps(made, indent=1)} if made else {}))


@app.command()
def verify(output: Annotated[str, typer.Argument(metavar="DST", help="An output of nrrn denoise.")]) -> None:
    """Check that every slab is recorded and every chunk is there and decodes; exit status 1 if not."""
    wrong = 0
    with _bar("nothing is changed by verifying") as bar:
        task = bar.add_task("verifying", total=None, speed="")
        for checked in check(output):
            bar.start()
            bar.update(task, completed=checked.done, total=checked.total)
            if checked.problem:
                wrong += 1
                out.print(checked.problem)
    if wrong:
        err.print(f"{output} is not whole: {counted(wrong, 'problem')}")
        raise typer.Exit(1)
    out.print(f"{output} is whole: every slab is recorded, every chunk is there and decodes")


@app.command()
def train(
    source: Source,
    weights: Annotated[str, typer.Option("--out", metavar="W", help="Weights file to write (.safetensors).")],
    units: Annotated[int, typer.Option(help="Building units.")] = 4,
    channels: Annotated[int, typer.Option(help="Feature maps.")] = 64,
    steps: Annotated[int, typer.Option(help="Weight updates.")] = 2000,
    batch: Annotated[int, typer.Option(help="Crops an update.")] = 16,
    crop: Annotated[int, typer.Option(help="Side of a crop in voxels.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Adam's.")] = 1e-4,
    halve_every: Annotated[int, typer.Option(help="Steps after which the rate is halved; 0: never.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, crops and flips.")] = 0,
    level: LevelNumber = 0,
    device: Device = "auto",
) -> None:
    """Train on SRC itself: no clean data is needed (the paper's loss on adjacent slices)."""
    settings = TrainSettings(
        units=units,
        channels=channels,
        steps=steps,
        batch=batch,
        crop=crop,
        learning_rate=learning_rate,
        halve_every=halve_every,
        seed=seed,
        device=device,
    )
    with _bar("no weights are written") as bar:
        task = bar.add_task("training", total=steps, speed="")

        def trained(step: int, loss: float) -> None:
            bar.start()
            bar.update(task, completed=step, speed=f"loss {loss:.4f}")

        record = api.train(
            source,
            weights,
            settings,
            level,
            trained,
        )
    out.print(
        f"{weights}: {_network(units, channels)}, mean loss of the last tenth {record['mean_loss_of_last_tenth']:.4f}"
    )


@weights_app.command("import")
def import_weights(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of vEMden (.pt).")],
    weights: Annotated[str, typer.Argument(help="Weights file to write (.safetensors).")],
) -> None:
    """Turn a checkpoint of the authors' tool into a weights file; nothing in it is executed."""
    network = api.import_weights(checkpoint, weights)
    out.print(f"{weights}: {_network(len(network.units), network.channels)}")


def main() -> None:
    """Run the command line; errors that a user can mend are one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show ends no run
    try:
        app()
    except NrrnError as error:
        err.print(f"nrrn: {error}")
        sys.exit(error.exit_status)
    except OSError as error:
        err.print(f"nrrn: {error}")
        sys.exit(1)


class _Watch(api.RunWatch):
    """Shows a run on a progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def started(self, plan: DenoisePlan, where: str) -> None:
        err.print(f"{counted(len(plan.slabs), 'slab')} on {where}")
        self.bar.start()

    def progressed(self, progress: RunProgress) -> None:
        if progress.stage not in self.tasks:
            self.tasks[progress.stage] = self.bar.add_task(progress.stage, total=progress.total, speed="")
        task = self.tasks[progress.stage]
        elapsed = self.bar.tasks[task].elapsed
        speed = f"{progress.voxels / elapsed / 1e6:.3f} million voxels/s" if progress.voxels and elapsed else ""
        self.bar.update(task, completed=progress.done, speed=speed)


@contextmanager
def _bar(when_interrupted: str) -> Iterator[Progress]:
    """A progress bar on standard error, shown once it is started, and a word on what Ctrl-C leaves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=err)

    def stop() -> None:
        if bar.live.is_started:
            bar.stop()

    try:
        yield bar
    except KeyboardInterrupt:
        stop()
        err.print(f"nrrn: interrupted; {when_interrupted}")
        raise
    finally:
        stop()


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        out.print(f"{name:{width}}  {value}")  # never cut: scripts read it too


def _network(units: int, channels: int) -> str:
    return f"{counted(units, 'unit')}, {counted(channels, 'channel')}"


def _by(values: tuple[Any, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _triple(name: str, text: str | None) -> Shape | None:
    if text is None:
        return None
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--{name} {text!r} is not understood: expected three numbers Z,Y,X such as 64,512,512"
        ) from None
    return z, y, x


def _layout(slab: str | None, chunk: str | None, shard: str | None, tile: int, halo: int | None) -> Layout:
    return Layout(_triple("slab", slab), _triple("chunk", chunk), _triple("shard", shard), tile, halo)


def _roi(text: str | None) -> Box | None:
    if text is None:
        return None
    try:
        return Box.parse(text)
    except ValueError:
        raise InputError(
            f"--roi {text!r} is not understood: expected Z0:Z1,Y0:Y1,X0:X1 such as 0:16,0:512,0:512"
        ) from None


if __name__ == "__main__":
    main()
