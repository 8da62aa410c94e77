"""Whether workers can do what a plan asks: the same versions, the same storage, a GPU. Asked before a run starts."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client

from nrrn_pipeline import storage
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError, NrrnError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.machine import cores, free_memory_bytes, refuse_other_versions, versions
from nrrn_pipeline.network import choose_device, device_text
from nrrn_pipeline.places import adopt_options, options_text
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.slab import read_weights_of
from nrrn_pipeline.slabs import CopyPlan, Plan, Slab
from nrrn_pipeline.volume import open_volume

MOST_SHOWN = 3
LOOKS_S = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Facts:
    """What a worker says of itself. `clock`: its seconds since 1970; gpu: None if it has none."""

    host: str
    cores: int
    free_memory_bytes: int
    gpu: str | None
    versions: dict[str, str]
    clock: float


@dataclass(frozen=True)
class Demand:
    """What each worker must find: the driver's versions, its storage, and a device.

    settings: the plan's, as the driver finds them. token: a file and its content.
    """

    versions: dict[str, str]
    options: str
    device: str
    plan: Plan
    settings: dict[str, Any]
    token: tuple[str, bytes]


def refuse_unfit_workers(client: Client, plans: Sequence[Plan], device: str) -> None:
    """Ask every worker there is. Raises InputError, naming workers and what they lack; outputs stay as they were.

    Of several plans one that can be done is enough: the others will say for themselves what is wrong.
    """
    refusals = []
    for plan in plans[:MOST_SHOWN]:
        content = uuid.uuid4().bytes
        with storage.probe(plan.group_url, content) as token:
            probe = token, content
            demand = Demand(versions(), options_text(), device, plan, plan.settings, probe)
            found = client.run(trouble_here, demand, on_error="return")
        troubled = {worker: _said(answer) for worker, answer in found.items() if answer}
        if not troubled:
            return
        shown = "; ".join(f"{worker}: {said}" for worker, said in sorted(troubled.items())[:MOST_SHOWN])
        refusals.append(f"{len(troubled)} of {len(found)} workers cannot do this run: {shown}")
    raise InputError(refusals[0])


def trouble_here(demand: Demand, dask_worker: Any = None) -> str:
    """What keeps this worker process from doing what is demanded; empty if nothing does. Dask gives `dask_worker`."""
    host = socket.gethostname()
    adopt_options(demand.options)
    try:
        refuse_other_versions(demand.versions)
        _refuse_no_gpu(demand.device, dask_worker.state.total_resources.get("GPU", 0) if dask_worker else 0)
        _refuse_unseen(demand)
    except NrrnError as error:
        return f"{host}: {error}"
    except Exception as error:  # of storage, of any kind
        return f"{host}: storage cannot be used from there ({reason_of(error)})"
    return ""


def facts_here() -> Facts:
    """Of this worker process."""
    return Facts(socket.gethostname(), cores(), free_memory_bytes(), device_text(), versions(), time.time())


def _refuse_no_gpu(device: str, given: float) -> None:
    """Raises InputError if a GPU is asked for, by the device or as `given` to the worker, and there is none."""
    if device == "cuda" or (device == "auto" and given):
        try:
            choose_device("cuda")
        except InputError as error:
            asked = "--device cuda" if device == "cuda" else f"its job has {given:g} GPU"
            raise InputError(f"no GPU there, but {asked}: {error}; or give --device cpu") from error


def _refuse_unseen(demand: Demand) -> None:
    """Raises InputError if source, weights or output are not the driver's under the same names."""
    url, content = demand.token
    if isinstance(demand.plan, DenoisePlan):
        _refuse_unseen_source(demand.plan)
    else:
        _refuse_unread_source(demand.plan)
    if (found := demand.plan.settings) != demand.settings:  # also raises if a filter's package is missing
        differing = [name for name in demand.settings if found.get(name) != demand.settings[name]]
        said = "; ".join(f"{name} {found.get(name)}, not {demand.settings[name]}" for name in differing)
        raise InputError(f"the method is another one there: {said}; install the same packages")
    folder = url.rpartition("/")[0]
    for pause in LOOKS_S:
        if storage.read_file(url) == content:
            break
        time.sleep(pause)  # disks that machines share may show a new file late
    else:
        raise InputError(f"the output {folder} is another folder there, or none{_hint(url)}")
    storage.write_file(f"{url}.{uuid.uuid4().hex}.probe", b"")


def _refuse_unseen_source(plan: DenoisePlan) -> None:
    """Raises InputError if the volume to denoise, or the weights for it, are not there."""
    try:
        seen = open_volume(plan.source.url)
    except InputError as error:
        raise InputError(f"the source is not there: {error}{_hint(plan.source.url)}") from error
    if seen.shape[1:] != plan.source.shape[1:]:
        raise InputError(f"{plan.source.url} is another volume there: {seen.shape}, not {plan.source.shape}")
    if isinstance(plan.denoiser, Weights):
        try:
            read_weights_of(plan.denoiser)
        except InputError as error:
            raise InputError(f"the weights are not there: {error}{_hint(plan.denoiser.path)}") from error


def _refuse_unread_source(plan: Plan) -> None:
    """Raises InputError if what is to be copied cannot be read: of its first slab, one voxel is."""
    assert isinstance(plan, CopyPlan)
    first = plan.slabs[0].keep
    one = Box(*(Span(span.start, span.start + 1) for span in first.spans))
    try:
        plan.voxels(Slab(one, one))
    except (OSError, InputError) as error:
        raise InputError(f"the source is not there: {reason_of(error)}{_hint(plan.source_url)}") from error


def _hint(url: str) -> str:
    return "" if "://" in url else "; use a path that all machines share, or object storage"


def _said(answer: Any) -> str:
    if not isinstance(answer, BaseException):
        return str(answer)
    said = reason_of(answer)
    return f"nrrn_pipeline is not installed there ({said})" if "ModuleNotFoundError" in said else said
