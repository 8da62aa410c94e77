"""One slab on one worker of a cluster: what a user wants to know before the long run is queued."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from distributed import Client

from nrrn_pipeline import storage
from nrrn_pipeline.cluster import ClusterSettings, started
from nrrn_pipeline.cluster.checks import Facts, facts_here, refuse_unfit_workers
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.ledger import Record
from nrrn_pipeline.network import NRRN, weights_bytes
from nrrn_pipeline.places import absolute
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner, run_serially
from nrrn_pipeline.volume import Volume, create_volume, open_volume, read_box, write_box

SHAPE = (4, 256, 256)
CLOCKS_S = 5.0  # further apart than this, times in logs and nrrn status mislead


@dataclass(frozen=True)
class Found:
    """What a trial found. Seconds: until the first worker was there, of the whole trial slab, and between the clocks.

    difference: of the worker's output from this machine's, in grey levels of 8 bits; rounding gives 1 at most.
    """

    where: str
    facts: Facts
    seconds_to_start: float
    seconds_of_slab: float
    clock_skew_s: float
    difference: int
    record: Record


def try_cluster(settings: ClusterSettings, folder: str, device: str = "auto") -> Found:
    """Start one worker, and denoise one slab below `folder`, a path or URL that it must see; all is deleted after.

    Raises InputError if the cluster cannot be had, or the worker lacks versions, storage or a GPU; RunError if the slab
    fails there.
    """
    if "workers" in type(settings).model_fields:
        settings = settings.model_copy(update={"workers": 1})
    with _trial_plans(absolute(folder)) as (there, here):
        began = time.monotonic()
        with started(settings, slabs_each=1) as cluster:
            started_s = time.monotonic() - began
            refuse_unfit_workers(cluster.client, [there], device)
            facts, skew_s = _ask(cluster.client)
            began = time.monotonic()
            runner = DaskRunner(cluster.client, cluster.tend, cluster.patience_s)
            steps = list(run_plan(there, runner, device))
            slab_s = time.monotonic() - began
            where = cluster.where
        record = next((step.record for step in steps if step.record is not None), None)
        if record is None:
            raise RunError("the trial's slab was not denoised: run the check again")
        list(run_plan(here, run_serially, "cpu"))
        levels = [read_box(plan.target, plan.target.box).astype(int) for plan in (there, here)]
        difference = int(np.abs(levels[0] - levels[1]).max())
    return Found(where, facts, started_s, slab_s, skew_s, difference, record)


@contextmanager
def _trial_plans(folder: str) -> Iterator[tuple[DenoisePlan, DenoisePlan]]:
    """The same slab of noise into two outputs, for the cluster and for this process; nothing is left of it."""
    try:
        storage.check_writable(folder)
    except OSError as error:
        raise InputError(f"no trial can be written to {folder}: {error.strerror or error}; choose another") from error
    place = f"{folder}/nrrn-trial-{uuid.uuid4().hex[:8]}"
    with storage.probe(folder):  # also of the folder, if it is new
        try:
            storage.write_file(f"{place}/weights.safetensors", weights_bytes(NRRN(1, 4), {"note": "random"}))
            source = Volume(f"{place}/raw.zarr/0", SHAPE, "uint8", SHAPE, SHAPE, level_path="0")
            create_volume(source, {})
            write_box(source, source.box, np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8))
            weights, opened = describe_weights(f"{place}/weights.safetensors"), open_volume(f"{place}/raw.zarr")
            yield plan_denoise(opened, f"{place}/a.zarr", weights), plan_denoise(opened, f"{place}/b.zarr", weights)
        finally:
            storage.remove_tree(place)


def _ask(client: Client) -> tuple[Facts, float]:
    """What one worker says of itself, and how far its clock is ahead of ours, in s."""
    before = time.time()
    facts: Facts = next(iter(client.run(facts_here).values()))
    after = time.time()
    return facts, facts.clock - (before + after) / 2


def rows_of(found: Found) -> dict[str, str]:
    """For people: what was found, a line each, with what to mend."""
    facts = found.facts
    skew = f"{found.clock_skew_s:+.2f} s"
    alike = "as on this machine" if found.difference == 0 else f"within {found.difference} grey levels of here"
    return {
        "cluster": found.where,
        "worker": f"{facts.host}, {facts.cores} cores",
        "memory": f"{facts.free_memory_bytes / 2**30:.1f} GiB free",
        "GPU": facts.gpu or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()) + ": the same here",
        "clock": skew if abs(found.clock_skew_s) < CLOCKS_S else f"{skew}: set the machines' clocks",
        "started in": f"{found.seconds_to_start:.1f} s",
        "one slab": f"{found.seconds_of_slab:.1f} s, {alike}",
    }
