"""nrrn view: volumes in a browser, side by side."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from typing import Annotated

import typer

from nrrn_pipeline.cli.options import LevelNumber, Source, StorageOptions
from nrrn_pipeline.cli.terminal import err, out
from nrrn_pipeline.errors import InputError, readable
from nrrn_pipeline.viewing import find_layers, public_url, serving
from nrrn_pipeline.volume import get_provenance


def view(
    source: Source,
    output: Annotated[str | None, typer.Argument(metavar="DST", help="What SRC was denoised to, or a part.")] = None,
    level: LevelNumber = 0,
    url: Annotated[
        bool, typer.Option("--url", help="Print a link to Neuroglancer's public client, for volumes on public storage.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On which to serve; 0: any that is free.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Show SRC, DST and what was removed side by side in Neuroglancer; a volume alone, or an output beside its source.

    Voxels are read as the browser asks for them. Nothing is written, and other machines see nothing.

    Example: nrrn view raw.zarr denoised.ome.zarr
    """
    if url and port:
        raise InputError("--port and --url exclude each other: with --url nothing is served")
    layers = find_layers(source, output, level)
    last = layers[-1].volume.group_url
    if (get_provenance(last) or {}).get("state") == "unfinished":
        err.print(f"{readable(last)} is unfinished: what is not there yet is black, and seems removed as a whole")
    if url:
        out.print(public_url(layers))
        err.print("it shows what can be read without credentials, from storage that lets web pages read it (CORS)")
        return
    try:
        with serving(layers, port, lambda reason: err.print(f"nrrn: {readable(reason)}")) as address:
            err.print(f"showing {', '.join(readable(layer.name) for layer in layers)}; Ctrl-C ends it")
            out.print(address)
            if browser and _has_screen():
                webbrowser.open(address)
            threading.Event().wait()
    except KeyboardInterrupt:
        err.print("nrrn: the viewer has ended; nothing was changed")


def _has_screen() -> bool:
    """Else a browser would be one for terminals, which cannot show it."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
