"""Commands whose modules are imported when they are called: help, completion and workers need none of them.

Once loaded, each gets what all have in common: --quiet, and its options in groups.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

COMMANDS = {  # name: module of this package, what to call there, a line of help
    "ingest": ("ingest", "ingest", "From the microscope's files to one OME-Zarr volume."),
    "info": ("volumes", "info", "Describe a volume or a weights file."),
    "noise": ("noise", "noise", "Measure the noise of a volume: how strong, where, and whether it is white."),
    "align": ("align", "align", "Measure how slices are shifted against each other, and move them back."),
    "train": ("training", "train", "Train on the noisy volume itself: no clean data is needed."),
    "preview": ("preview", "preview", "A few places before and after, as the full run will make them, on one page."),
    "plan": ("denoising", "plan", "What a run would do, and what it would take."),
    "denoise": ("denoising", "denoise", "Denoise a volume; run again, it goes on where it was."),
    "report": ("report", "report", "Show a run on one page: whether it is good, and what it did."),
    "view": ("view", "view", "Look at a volume: noisy, denoised and what was removed, side by side."),
    "pyramid": ("ingest", "pyramid", "Add levels of lower resolution, for viewers."),
    "export": ("ingest", "export", "Write a volume as TIFF, MRC, HDF5, .npy or Zarr 2, for other tools."),
    "status": ("volumes", "status", "How far a run is, wherever it is driven from."),
    "verify": ("volumes", "verify", "Whether an output is whole."),
    "repair": ("denoising", "repair", "Denoise again what of an output is damaged."),
    "batch": ("batch", "batch", "Denoise many volumes on one cluster."),
    "evaluate": ("evaluate", "evaluate", "Denoise by several methods, and measure each."),
    "ground-truth": ("ground_truth", "ground_truth", "A reference image out of repeated scans."),
    "add-noise": ("noise", "add_noise", "Add synthetic noise, to measure denoising where the truth is known."),
    "benchmark": ("benchmark", "benchmark", "Measure speed and memory here, beside other programs."),
    "submit": ("submit", "submit_app", "Runs as jobs of a batch system."),
    "weights": ("weights", "weights_app", "Weights files."),
    "cluster": ("cluster", "cluster_app", "Dask clusters."),
}


PANELS = {  # of help: the options that go together, by their parameters' names
    "Method": {"images", "stats", "method", "stitch", "precision"},
    "Layout of DST, and of the work": {"tile", "halo", "slab", "chunk", "shard"},
    "Volumes that still grow": {"follow", "every", "settle"},
    "Where and how it runs": {
        *("cluster", "keys", "workers", "prefetch", "keep", "device", "shard_of", "storage_options"),
    },
}


class LazyCommand(TyperCommand):
    """Stands for a command until it is called; shows its help line."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The command's own."""
        return loaded(self.name or "").make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    """All commands, in the order in which they are used."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update({name: LazyCommand(name, help=line) for name, (_, _, line) in COMMANDS.items()})


def loaded(name: str) -> Any:
    """The command itself."""
    module, attribute, _ = COMMANDS[name]
    found = getattr(import_module(f"nrrn_pipeline.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name)(found)
        found = app
    command = get_command(found)
    command.name = name
    _furnish(command)
    return command


def _furnish(command: Any) -> None:
    """Give a command, or those of a group, --quiet, and its options their places in help."""
    for each in getattr(command, "commands", {}).values():
        _furnish(each)
    if isinstance(command, TyperGroup):
        return
    for panel, names in PANELS.items():
        for option in command.params:
            if isinstance(option, TyperOption) and option.name in names:
                option.rich_help_panel = panel
    command.params.append(_quiet_option())


def _be_quiet(context: typer.Context, quiet: bool) -> None:
    """Until the command ends."""
    from nrrn_pipeline.cli.terminal import notes  # with all that the command has loaded already

    if quiet:
        notes.quiet = True
        context.call_on_close(lambda: setattr(notes, "quiet", False))


def _quiet_option() -> Any:
    """As typer makes it of a parameter."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def carrier(
        quiet: Annotated[
            bool,
            typer.Option(
                "--quiet",
                "-q",
                callback=_be_quiet,
                expose_value=False,
                help="No progress and no notes: results and errors only.",
            ),
        ] = False,
    ) -> None:
        """Of an option."""

    return get_command(app).params[0]
