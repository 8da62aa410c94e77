"""nrrn report: one page that shows what a run did."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline.cli.options import StorageOptions
from nrrn_pipeline.cli.terminal import out
from nrrn_pipeline.places import absolute
from nrrn_pipeline.run_page import write_report


def report(
    output: Annotated[str, typer.Argument(metavar="DST", help="An output of nrrn denoise, complete or not.")],
    page: Annotated[
        str | None, typer.Option("--out", metavar="HTML", help="The page to write (default: DST's name, here).")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="SRC", help="The volume that was denoised, if it was moved.")
    ] = None,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Show on one page whether DST is good: before and after, noise, what was removed, slices that look wrong.

    Example: nrrn report clean.zarr --out clean.html
    """
    name = absolute(output).rstrip("/").rpartition("/")[2].removesuffix(".zarr").removesuffix(".ome")
    page = f"{name}.html" if page is None else page
    write_report(output, page, source)
    out.print(f"{page}: a report of {output}")
