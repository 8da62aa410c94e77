"""What all kinds of clusters have in common: settings that refuse what they do not know, and what a started one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distributed import Client
from pydantic import BaseModel, ConfigDict

from nrrn_pipeline.runners import PATIENCE_S


class ClusterSettings(BaseModel):
    """Of one kind of cluster; each kind adds `kind`, its name in a settings file, and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def leave_alone(done: int) -> None:
    """What a cluster needs done for it while a run goes on, if its workers do not end by themselves: nothing."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is running. `where` says where, in words.

    tend: called every few seconds while tasks run, with the number that are done: replaces workers that are gone, and
    raises RunError if that is no use any more. patience_s: how long a run may be without workers, as when jobs queue.
    """

    client: Client
    where: str
    tend: Callable[[int], None] = leave_alone
    patience_s: float = PATIENCE_S
