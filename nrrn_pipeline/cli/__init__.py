"""The command line: one subcommand a user goal, no logic of its own."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NoReturn

from nrrn_pipeline.cli.commands import app
from nrrn_pipeline.cli.submit import submit_app
from nrrn_pipeline.cli.terminal import err
from nrrn_pipeline.errors import LostError, NrrnError
from nrrn_pipeline.training.processes import say_once

__all__ = ["app", "main"]

app.add_typer(submit_app, name="submit")

INTERRUPTED, TERMINATED = (128 + number for number in (signal.SIGINT, signal.SIGTERM))  # what a shell calls them


def main() -> None:
    """Run the command line; errors that a user can mend are one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show ends no run
    try:
        with _sigterm_like_ctrl_c():
            app()
    except (NrrnError, OSError) as error:
        text = f"nrrn: {error}"
        say_once(lambda: err.print(text), lost=isinstance(error, LostError))
        sys.exit(error.exit_status if isinstance(error, NrrnError) else 1)


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
