"""Denoise every volume below a prefix on object storage: python workflows/batch_on_s3.py VOLUMES INTO WEIGHTS

VOLUMES is such as s3://lab/raw/, INTO such as s3://lab/clean/.

Credentials come from the environment. One bad volume does not stop the rest; run it again, and only what is not done is
tried. Any number of volumes, one cluster: set NRRN_CLUSTER to an address or a TOML file, else it is this machine.
"""

from __future__ import annotations

import os
import sys

from nrrn_pipeline import NrrnError, Options, read_manifest, run_batch


def main(volumes: str, into: str, weights: str) -> int:
    """The number of volumes that are not done."""
    jobs = read_manifest(volumes, weights, into)
    results = run_batch(jobs, Options(cluster=os.environ.get("NRRN_CLUSTER", "local")))
    for result in results:
        print(
            f"{result.state:12}  {result.slabs:6} slabs  {result.seconds:8.1f} s  {result.job.source}  {result.reason}"
        )
    return sum(result.state not in ("done", "done before") for result in results)


if __name__ == "__main__":  # as all that starts processes
    try:
        sys.exit(1 if main(*sys.argv[1:]) else 0)
    except NrrnError as error:
        sys.exit(f"{error}")
