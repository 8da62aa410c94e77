"""Denoise a volume on a Dask cluster: python workflows/submit_to_dask.py SRC DST WEIGHTS CLUSTER

CLUSTER is the address of a scheduler (tls://host:8786, with the folder NRRN_KEYS), settings in a TOML file (such as
deploy/slurm/slurm.toml), or "local". Interrupted? Run it again.
"""

from __future__ import annotations

import os
import sys

from nrrn_pipeline import NrrnError, Options, RunWatch, denoise, plan, verify
from nrrn_pipeline.planning import DenoisePlan


class Say(RunWatch):
    """Tells where it runs."""

    def started(self, plan: DenoisePlan, where: str) -> None:
        """Workers are there."""
        print(f"{len(plan.slabs)} slabs on {where}", flush=True)


def main(source: str, output: str, weights: str, cluster: str) -> None:
    """Look at what it will take, do it, check it."""
    options = Options(cluster=cluster, keys=os.environ.get("NRRN_KEYS"))
    forecast = plan(source, output, weights, options)
    gigabytes = forecast.cost.read_bytes / 1e9
    print(
        f"{forecast.cost.slabs} slabs, {gigabytes:.2f} GB to read, {forecast.cost.worker_bytes / 1e9:.2f} GB a worker"
    )
    summary = denoise(source, output, weights, options, Say())
    print(f"{output}: {summary.done} slabs in {summary.seconds:.0f} s, {summary.resumed} were done before")
    if problems := verify(output):
        sys.exit("\n".join(problems))


if __name__ == "__main__":  # as all that starts processes
    try:
        main(*sys.argv[1:])
    except NrrnError as error:
        sys.exit(f"{error}")
