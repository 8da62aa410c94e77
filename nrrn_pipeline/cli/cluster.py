"""nrrn cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from nrrn_pipeline.cli.options import Device, StorageOptions
from nrrn_pipeline.cli.terminal import err, out, print_rows
from nrrn_pipeline.cluster import load_settings, make_keys
from nrrn_pipeline.cost import counted
from nrrn_pipeline.trial import rows_of, try_cluster

cluster_app = typer.Typer(no_args_is_help=True, help="Dask clusters.")


@cluster_app.command("check")
def cluster_check(
    settings: Annotated[str, typer.Argument(metavar="FILE", help="Settings of a cluster, TOML.")],
    folder: Annotated[str, typer.Option("--at", help="Where to denoise a trial slab: a path or URL as of your runs.")],
    device: Device = "auto",
    storage_options: StorageOptions = None,  # noqa: ARG001
) -> None:
    """Start one worker, denoise one small slab on it, and say what was found. Leaves nothing behind.

    Example: nrrn cluster check slurm.toml --at /shared/lab
    """
    found = try_cluster(load_settings(settings), folder, device)
    print_rows(rows_of(found))
    if found.difference > 1:
        err.print(f"nrrn: the worker's voxels are {found.difference} grey levels off: do not use it")
        raise typer.Exit(1)


@cluster_app.command("keys")
def cluster_keys(
    folder: Annotated[str, typer.Argument(help="Folder to make.")],
    host: Annotated[list[str] | None, typer.Option(help="Hosts that the certificate names; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="Days that the certificates hold.")] = 365,
) -> None:
    """Make the certificates that a Dask cluster on other machines needs: without them whoever reaches it runs code.

    Copy FOLDER to every machine, readable by you alone. Start scheduler and workers with DASK_CONFIG=FOLDER, and
    denoise with --cluster tls://HOST:8786 --keys FOLDER.

    Example: nrrn cluster keys keys --host gpu1.lab --host gpu2.lab
    """
    made = make_keys(folder, host or (), days)
    out.print(f"{made}: certificates for {counted(days, 'day')}; start dask with DASK_CONFIG={made}")
