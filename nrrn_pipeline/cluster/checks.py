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
from nrrn_pipeline.denoisers import Denoiser, Weights
from nrrn_pipeline.errors import InputError, NrrnError
from nrrn_pipeline.machine import cores, free_memory_bytes, refuse_other_versions, versions
from nrrn_pipeline.network import choose_device, device_text
from nrrn_pipeline.places import adopt_options, options_text
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.retrying import reason_of
from nrrn_pipeline.slab import read_weights_of
from nrrn_pipeline.volume import Volume, open_volume

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

    settings: the denoiser's, as the driver finds them. token: a file and its content.
    """

    versions: dict[str, str]
    options: str
    device: str
    source: Volume
    denoiser: Denoiser
    settings: dict[str, Any]
    token: tuple[str, bytes]


def refuse_unfit_workers(client: Client, plans: Sequence[DenoisePlan], device: str) -> None:
    """Ask every worker there is. Raises InputError, naming workers and what they lack; outputs stay as they were.

    Of several plans one that can be done is enough: the others will say for themselves what is wrong.
    """
    refusals = []
    for plan in plans[:MOST_SHOWN]:
        content = uuid.uuid4().bytes
        with storage.probe(plan.group_url, content) as token:
            probe = token, content
            demand = Demand(
                versions(), options_text(), device, plan.source, plan.denoiser, plan.denoiser.settings, probe
            )
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
    try:
        seen = open_volume(demand.source.url)
    except InputError as error:
        raise InputError(f"the source is not there: {error}{_hint(demand.source.url)}") from error
    if seen.shape[1:] != demand.source.shape[1:]:
        raise InputError(f"{demand.source.url} is another volume there: {seen.shape}, not {demand.source.shape}")
    if isinstance(demand.denoiser, Weights):
        try:
            read_weights_of(demand.denoiser)
        except InputError as error:
            raise InputError(f"the weights are not there: {error}{_hint(demand.denoiser.path)}") from error
    if (found := demand.denoiser.settings) != demand.settings:  # also raises if a filter's package is missing
        raise InputError(f"the method is another one there: {found}, not {demand.settings}; install the same packages")
    folder = url.rpartition("/")[0]
    for pause in LOOKS_S:
        if storage.read_file(url) == content:
            break
        time.sleep(pause)  # disks that machines share may show a new file late
    else:
        raise InputError(f"the output {folder} is another folder there, or none{_hint(url)}")
    storage.write_file(f"{url}.{uuid.uuid4().hex}.probe", b"")


def _hint(url: str) -> str:
    return "" if "://" in url else "; use a path that all machines share, or object storage"


def _said(answer: Any) -> str:
    if not isinstance(answer, BaseException):
        return str(answer)
    said = reason_of(answer)
    return f"nrrn_pipeline is not installed there ({said})" if "ModuleNotFoundError" in said else said
