"""nrrn weights."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline import api
from nrrn_pipeline.cli.terminal import network_text, out
from nrrn_pipeline.cli.training import write_page
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import architecture_of, parse_header
from nrrn_pipeline.shipped import SHIPPED, model_card, read_weights

weights_app = typer.Typer(no_args_is_help=True, help="Weights files.")


@weights_app.command("list")
def list_weights() -> None:
    """The weights that are shipped, to be given by name, as in --weights nrrn-fast.

    Example: nrrn weights list
    """
    for name in SHIPPED:
        header = parse_header(read_weights(name), name)
        out.print(f"{name}: {network_text(architecture_of(header))}; {header['training']['note']}")


@weights_app.command("card")
def show_card(name: Annotated[str, typer.Argument(help="Of shipped weights.")]) -> None:
    """What shipped weights were made from, how, how well they do, and what they are not for.

    Example: nrrn weights card nrrn-fast
    """
    if name not in SHIPPED:
        raise InputError(f"no weights {name!r} are shipped: use {', '.join(SHIPPED)}")
    out.print(model_card(name))


weights_app.command("page")(write_page)


@weights_app.command("import")
def import_weights(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of vEMden (.pt).")],
    weights: Annotated[str, typer.Argument(help="Weights file to write (.safetensors).")],
) -> None:
    """Turn a checkpoint of the authors' tool into a weights file; nothing in it is executed.

    Example: nrrn weights import vemden.pt lab.safetensors
    """
    network = api.import_weights(checkpoint, weights)
    out.print(f"{weights}: {network_text(network.architecture)}")
