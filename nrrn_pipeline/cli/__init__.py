"""The command line: one subcommand a user goal, no logic of its own."""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from nrrn_pipeline.cli.lazy import LazyGroup
from nrrn_pipeline.errors import LostError, NrrnError

__all__ = ["app", "main"]

FIRST_STEPS = """To begin with:

nrrn ingest slices/ raw.zarr --voxel-nm 5,5,5

nrrn denoise raw.zarr clean.zarr --weights nrrn-fast

nrrn report clean.zarr --out report.html"""

app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, epilog=FIRST_STEPS)


@app.callback()
def nrrn(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda asked: _say_version() if asked else None,
            help="Say which version this is.",
        ),
    ] = False,
) -> None:
    """Denoise FIB-SEM volumes with NRRN. Each command has --help, with an example."""


def _say_version() -> NoReturn:
    typer.echo(f"nrrn-pipeline {metadata.version('nrrn-pipeline')}")
    raise typer.Exit


INTERRUPTED, TERMINATED = (128 + number for number in (signal.SIGINT, signal.SIGTERM))  # what a shell calls them


def main() -> None:
    """Run the command line; errors that a user can mend are one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show ends no run
    try:
        with _sigterm_like_ctrl_c():
            app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            atexit.register(_end_in_silence)
        raise
    except (NrrnError, OSError) as error:
        from nrrn_pipeline.cli.terminal import err  # not sooner: help, completion and workers need no torch
        from nrrn_pipeline.training.processes import say_once

        text = f"nrrn: {error}"
        say_once(lambda: err.print(text), lost=isinstance(error, LostError))
        sys.exit(error.exit_status if isinstance(error, NrrnError) else 1)


def _end_in_silence() -> None:
    """Of what was amid a read when the user broke off, zarr's and Dask's threads would complain at length."""
    logging.disable()
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM, by which batch systems end a job, leaves all as Ctrl-C does; the exit status tells."""
    received = []

    def interrupt(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # batch systems send it again, which would break off the cleaning up
        logging.disable()  # workers that got it too are dying, of which Dask would tell at length
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except SystemExit as end:
        if received and end.code == INTERRUPTED:
            raise SystemExit(TERMINATED) from None
        raise
    finally:
        if not received:
            signal.signal(signal.SIGTERM, before)
