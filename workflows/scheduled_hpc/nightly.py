"""What a scheduled job runs each night of an acquisition: python workflows/scheduled_hpc/nightly.py SRC DST WEIGHTS

Denoises what has arrived of a volume that grows since the last night, and checks the output; costs what is new. With
--last, after the last slice, it does the rest and reads every byte once more. For cron, as one line, on a login node:

    0 20 * * *  sbatch --job-name=nrrn-nightly --dependency=singleton --gres=gpu:1 --cpus-per-task=8 --mem=32G
                --time=11:00:00 --wrap "/lab/venv/bin/python /lab/nightly.py SRC DST WEIGHTS"

A night that follows too soon waits for the one before. NRRN_CLUSTER: a file with settings of a cluster, or its address.
"""

from __future__ import annotations

import argparse
import os
import sys

from nrrn_pipeline import Following, NrrnError, Options, denoise, follow, verify


def main() -> None:
    """Follow once, or finish, and verify."""
    words = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "output", "weights"):
        words.add_argument(name)
    words.add_argument("--last", action="store_true", help="the volume is whole now")
    words.add_argument("--settle", type=float, default=60.0, help="slices count when there for so many seconds")
    given = words.parse_args()
    options = Options(cluster=os.environ.get("NRRN_CLUSTER", "local"))
    if given.last:
        summary = denoise(given.source, given.output, given.weights, options)
    else:
        tonight = Following(every_s=0, settle_s=given.settle)
        summary = follow(given.source, given.output, given.weights, options, tonight)
    if summary is None:
        print("no slab is whole yet")
        return
    print(f"{summary.plan.box.z.stop} slices are denoised; {summary.done} slabs tonight, {summary.seconds:.0f} s")
    if problems := verify(given.output, deep=given.last):
        sys.exit("\n".join(problems))


if __name__ == "__main__":  # as all that starts processes
    try:
        main()
    except NrrnError as error:
        sys.exit(f"{error}")
