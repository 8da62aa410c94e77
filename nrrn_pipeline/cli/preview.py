"""nrrn preview: words in, one page out."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline import api, storage
from nrrn_pipeline.cli.options import WORDS, Source, parse_triple, takes_options
from nrrn_pipeline.cli.terminal import Watch, print_rows, progress_bar
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.previewing import REGIONS, rows_of, write_preview
from nrrn_pipeline.previewing import preview as make_preview


@takes_options(WORDS - {"keys", "keep", "overwrite", "pyramid", "shard_of"})
def preview(
    source: Source,
    options: api.Options,
    weights: Annotated[str | None, typer.Option(help="Weights from nrrn train or nrrn weights import.")] = None,
    page: Annotated[str, typer.Option("--out", metavar="FILE.html", help="The page to write.")] = "preview.html",
    regions: Annotated[int | None, typer.Option(help=f"How many places to pick ({REGIONS}).")] = None,
    places: Annotated[
        list[str] | None, typer.Option("--at", metavar="Z,Y,X", help="A place to show; may be repeated.")
    ] = None,
) -> None:
    """Denoise a few places of SRC as nrrn denoise will with the same words, and show them before and after.

    The places are those with most structure, one in each of as many parts along z, unless --at says where.

    Example: nrrn preview raw.zarr --weights lab.safetensors --out preview.html
    """
    if places and regions is not None:
        raise InputError("--regions are picked, and --at names them: give one of the two")
    named = [parsed for place in places or [] if (parsed := parse_triple("at", place))]
    storage.check_new_file(page)
    with progress_bar("nothing was written") as bar:
        bar.start()
        found = make_preview(source, weights, options, named, REGIONS if regions is None else regions, Watch(bar))
    write_preview(found, page)
    print_rows(rows_of(found) | {"page": page})
