"""The command line: one subcommand a user goal, no logic of its own."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from nrrn_pipeline.cli.commands import app
from nrrn_pipeline.cli.terminal import err
from nrrn_pipeline.errors import NrrnError

__all__ = ["app", "main"]


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
