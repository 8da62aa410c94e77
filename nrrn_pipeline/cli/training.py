"""nrrn train: a network for a volume, from the volume itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from nrrn_pipeline.cli.options import BOX, Device, LevelNumber, StorageOptions, parse_box, takes
from nrrn_pipeline.cli.terminal import Watch, network_text, out, progress_bar
from nrrn_pipeline.cost import counted
from nrrn_pipeline.errors import InputError, NrrnError, RunError
from nrrn_pipeline.network import KINDS, Architecture
from nrrn_pipeline.places import absolute
from nrrn_pipeline.report.scalars import Scalars
from nrrn_pipeline.training.fit import AUTO, LOSSES, PRECISIONS, TrainSettings, TrainWatch
from nrrn_pipeline.training.material import TrainingVolume
from nrrn_pipeline.training.processes import this_process
from nrrn_pipeline.training.train import CHOSEN, TRIED
from nrrn_pipeline.training.train import train as train_weights
from nrrn_pipeline.training_page import check_page, write_training_page

SAVED = "run the same command again to go on from the last checkpoint, of every five minutes, or trial of --units auto"


def parse_settings(  # one parameter an option: that is how a command line is declared
    network: Annotated[str, typer.Option(help=f"Kind of network: {', '.join(KINDS)}.")] = "nrrn",
    inputs: Annotated[str | None, typer.Option(help="Of a peer: single; channels (denoisenet) or mean (unet).")] = None,
    loss: Annotated[
        str, typer.Option(help=f"{', '.join(LOSSES)} (which needs --clean), or auto: what suits the noise.")
    ] = AUTO,
    units: Annotated[
        str | None,
        typer.Option(
            help="Building units (2; the paper's: 4), layers (20) or poolings (4); auto: as many units as help."
        ),
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Feature maps (16; the paper's, and its peers': 64).")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="W0", help="Weights to go on from, such as of another volume.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Weight updates.")] = TrainSettings.steps,
    batch: Annotated[int, typer.Option(help="Crops an update.")] = TrainSettings.batch,
    crop: Annotated[int, typer.Option(help="Side of a crop in voxels.")] = TrainSettings.crop,
    learning_rate: Annotated[
        float | None, typer.Option(help="Adam's, at its highest (0.02; of NRRN's peers 0.001; with --from a quarter).")
    ] = None,
    halve_every: Annotated[
        int | None,
        typer.Option(help="Steps after which the rate is halved; 0: never (default: it falls along a cosine)."),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(help="Share of the slices to validate on; the weights that do best there are written.")
    ] = TrainSettings.hold_out,
    patience: Annotated[
        int, typer.Option(help="Looks at these, of 20, that may find nothing better in a row; 0: any number.")
    ] = TrainSettings.patience,
    precision: Annotated[
        str,
        typer.Option(help=f"Of the network's arithmetic: {', '.join(PRECISIONS)} (bfloat16 where a GPU has it)."),
    ] = AUTO,
    seed: Annotated[int, typer.Option(help="Of weights, crops and flips.")] = 0,
    device: Device = "auto",
) -> TrainSettings:
    """How to train, by the words of a command line. Raises InputError for those that cannot be."""
    return TrainSettings(
        network=network,
        inputs=inputs,
        loss=loss,
        units=_parse_units(units),
        channels=channels,
        steps=steps,
        batch=batch,
        crop=crop,
        learning_rate=learning_rate,
        halve_every=halve_every,
        hold_out=hold_out,
        patience=patience,
        start=start,
        precision=precision,
        seed=seed,
        device=device,
    )


@takes(parse_settings, "settings")
def train(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Zarr volumes to learn from, one or more.")],
    weights: Annotated[str, typer.Option("--out", metavar="W", help="Weights file to write (.safetensors).")],
    settings: TrainSettings,
    clean: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Clean volume of the same voxels, for loss clean.")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="M", help="Volume that is not 0 where there is something to learn from.")
    ] = None,
    roi: Annotated[list[str] | None, typer.Option(metavar=BOX, help="Learn from this part only.")] = None,
    level: LevelNumber = 0,
    page: Annotated[
        str | None, typer.Option(metavar="HTML", help="Then write a page that shows how it went (nrrn weights page).")
    ] = None,
    tensorboard: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write losses and learning rate there, for TensorBoard.")
    ] = None,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Train on SRC itself: no clean data is needed.

    Its noise is looked at first, to choose the loss. The paper's is adjacent, which asks for the slices around. Of
    several volumes, --clean, --mask and --roi are given once for each, in the same order, or not at all.

    Several GPUs share each batch: torchrun --nproc-per-node N -m nrrn_pipeline.cli train ...

    Example: nrrn train raw.zarr --out lab.safetensors
    """
    beside = (_for_each(sources, name, given) for name, given in (("clean", clean), ("mask", mask), ("roi", roi)))
    volumes = [
        TrainingVolume(source, of_clean, of_mask, parse_box("roi", part), level)
        for source, of_clean, of_mask, part in zip(sources, *beside, strict=True)
    ]
    _refuse_taken(weights, page, tensorboard)
    if page is not None:
        check_page(page, [volume.opened().part for volume in volumes])
    record = _watched(volumes, weights, settings, tensorboard)
    if not this_process().is_first:
        return
    known = record["settings"]
    said = network_text(Architecture(known["network"], known["units"], known["channels"], known["inputs"]))
    if TRIED in record:
        said += f" (of {len(record[TRIED])} tried)"
    why = f", as {record[CHOSEN]}" if CHOSEN in record else ""
    out.print(f"{weights}: {said}, loss {known['loss']}{why}")
    if min(record["crop"]) < settings.crop:
        height, width = record["crop"]
        out.print(f"crops were of {height} x {width} voxels: the smallest part, or volume, has no more")
    out.print(_validation_text(record))
    if page is not None:
        _write_page_after(weights, page, settings.device)


def write_page(
    weights: Annotated[str, typer.Argument(metavar="W", help="Weights from nrrn train.")],
    page: Annotated[str, typer.Option("--out", metavar="HTML", help="The page to write.")],
    device: Device = "auto",
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Show on one page how W was trained, and what it does on slices held out from that.

    It reads, and denoises a part of, the volume that W was trained on, where it was then.

    Example: nrrn weights page lab.safetensors --out lab.html
    """
    with progress_bar("no page was written") as bar:
        write_training_page(weights, page, device, Watch(bar))
    out.print(f"{page}: how {weights} was trained")


def _write_page_after(weights: str, page: str, device: str) -> None:
    """Raises RunError if there is none, with how to make it later."""
    try:
        write_page(weights, page, device)
    except (NrrnError, OSError) as error:
        raise RunError(
            f"{weights} is whole, but there is no page of its training: {error}; once that is mended, make it by "
            f"nrrn weights page {weights} --out {page}"
        ) from error


def _watched(
    volumes: list[TrainingVolume], weights: str, settings: TrainSettings, tensorboard: str | None
) -> dict[str, Any]:
    """Train, on a progress bar and, if a folder is given, in TensorBoard; the record."""
    told = None if tensorboard is None else Scalars(tensorboard, settings)
    with progress_bar(SAVED) as bar:
        task = bar.add_task("training", total=settings.steps, speed="")
        latest: dict[str, float] = {}

        def show(step: int, **losses: float) -> None:
            latest.update(losses)
            bar.start()
            bar.update(task, completed=step, speed=", ".join(f"{of} {loss:.4f}" for of, loss in latest.items()))

        def stepped(step: int, loss: float) -> None:
            show(step, loss=loss)
            if told is not None:
                told.step(step, loss)

        def looked(step: int, loss: float) -> None:
            show(step, **{"held out": loss})
            if told is not None:
                told.look(step, loss)

        def tried(units: int, loss: float) -> None:
            bar.start()
            bar.update(task, speed=f"tried: {counted(units, 'unit')}, held out {loss:.4f}")

        return train_weights(volumes, weights, settings, TrainWatch(stepped, looked, tried))


def _refuse_taken(weights: str, page: str | None, tensorboard: str | None) -> None:
    """Raises InputError if one thing is to be written where another one is."""
    own = absolute(weights)
    taken = {own, f"{own}.checkpoint", f"{own}.trials"}
    for name, given in (("page", page), ("tensorboard", tensorboard)):
        if given is not None and absolute(given) in taken:
            raise InputError(f"--{name} {given} is where something else is to be written: choose another place")
        taken |= set() if given is None else {absolute(given)}


def _parse_units(text: str | None) -> int | Literal["auto"] | None:
    """Raises InputError for a text that is neither auto nor a number."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--units {text!r} is not possible: give a number, or auto") from None


def _for_each(sources: list[str], name: str, given: list[str] | None) -> list[str] | list[None]:
    """One for each volume. Raises InputError for another number of them."""
    if given and len(given) != len(sources):
        raise InputError(
            f"--{name} is given {counted(len(given), 'time')} for {counted(len(sources), 'volume')}: give it once for "
            "each, in the same order, or leave it out"
        )
    return given or [None] * len(sources)


def _validation_text(record: dict[str, Any]) -> str:
    """How training did on slices held out, as its record says."""
    settings, validation = record["settings"], record.get("validation")
    if validation is None:
        return "no slices were held out" + (": they are too few" if settings["hold_out"] else "")
    looks, at, taken = validation["step_and_loss"], validation["best_step"], record["steps_taken"]
    slices = {(volume["source"], z) for volume in record["volumes"] for z in volume["held_out"]}
    return (
        f"on {counted(len(slices), 'slice')} held out the loss fell from {looks[0][1]:.4f} to "
        f"{dict(looks)[at]:.4f} at step {at} of {taken}"
        + (", where it stopped early" if taken < settings["steps"] else "")
    )
