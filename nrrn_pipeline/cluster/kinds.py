"""All kinds of clusters: from a settings file, or a word, to a cluster that is running."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from nrrn_pipeline.cluster.address import AddressSettings, address_client
from nrrn_pipeline.cluster.base import Cluster, ClusterSettings
from nrrn_pipeline.cluster.jobqueue import jobqueue_cluster
from nrrn_pipeline.cluster.jobqueue_settings import (
    JobQueueSettings,
    LsfSettings,
    PbsSettings,
    SgeSettings,
    SlurmSettings,
)
from nrrn_pipeline.cluster.kubernetes import kubernetes_cluster
from nrrn_pipeline.cluster.kubernetes_settings import KubernetesSettings
from nrrn_pipeline.cluster.local import LocalSettings, local_client
from nrrn_pipeline.cluster.ssh import SshSettings, ssh_cluster
from nrrn_pipeline.errors import InputError

AnySettings = Annotated[
    LocalSettings
    | AddressSettings
    | SlurmSettings
    | PbsSettings
    | LsfSettings
    | SgeSettings
    | KubernetesSettings
    | SshSettings,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[ClusterSettings] = TypeAdapter(AnySettings)
MAX_BYTES = 2**20


def load_settings(path: str | os.PathLike[str]) -> ClusterSettings:
    """The cluster that a TOML file describes. Raises InputError, naming every wrong key, if it describes none."""
    try:
        with open(path, "rb") as file:
            table = tomllib.loads(file.read(MAX_BYTES).decode())
    except (OSError, ValueError) as error:
        raise InputError(f"the cluster settings {path} cannot be read ({error}): give a TOML file") from error
    return parse_settings(table, str(path))


def parse_settings(table: dict[str, Any], where: str) -> ClusterSettings:
    """The cluster that a table describes. Raises InputError, naming every wrong key, if it describes none."""
    try:
        return _ADAPTER.validate_python(table)
    except ValidationError as error:
        raise InputError(f"{where} describes no cluster: {wrong_keys(error)}") from error


def wrong_keys(error: ValidationError) -> str:
    """What pydantic found, key by key, without its addresses and types."""
    found = []
    for detail in error.errors(include_url=False, include_context=False):
        place = ".".join(map(str, detail["loc"][1:] if len(detail["loc"]) > 1 else detail["loc"]))
        said = detail["msg"].removeprefix("Value error, ")
        known = "it is unknown" if detail["type"] == "extra_forbidden" else said
        found.append(f"{place}: {known}" if place else known)
    return "; ".join(found)


@contextmanager
def started(settings: ClusterSettings, slabs_each: int) -> Iterator[Cluster]:
    """The cluster that the settings describe, gone when the block ends; one that was there already stays.

    Each of its workers has `slabs_each` slabs in flight. Raises InputError if it cannot be had as asked.
    """
    match settings:
        case LocalSettings():
            from nrrn_pipeline.network import gpu_count  # not sooner: workers that copy need no torch

            with local_client(settings.workers or 1, slabs_each, gpu_count(), settings.processes) as client:
                port = client.scheduler_info()["services"].get("dashboard")
                yield Cluster(client, f"this machine, dashboard http://127.0.0.1:{port}/status")
        case AddressSettings():
            with address_client(settings.address, settings.keys) as client:
                yield Cluster(client, f"{settings.address}, dashboard {client.dashboard_link}")
        case JobQueueSettings():
            with jobqueue_cluster(settings, slabs_each) as cluster:
                yield cluster
        case SshSettings():
            with ssh_cluster(settings, slabs_each) as cluster:
                yield cluster
        case KubernetesSettings():
            with kubernetes_cluster(settings, slabs_each) as cluster:
                yield cluster
        case _:
            raise AssertionError(f"unreachable: {type(settings)} is in AnySettings")
