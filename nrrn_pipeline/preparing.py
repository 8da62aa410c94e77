"""From what users ask for to a plan: the volume is opened, and weights or a filter are found for it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from uuid import uuid4

from nrrn_pipeline.cost import worker_bytes
from nrrn_pipeline.denoisers import Weights, filter_for
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS, Filter
from nrrn_pipeline.geometry import Shape
from nrrn_pipeline.keeping import Keeping
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.machine import free_memory_bytes, threads_each
from nrrn_pipeline.network import CPU_LANES, architecture_of, bytes_hash, choose_device, parse_header
from nrrn_pipeline.noise import Noise
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.planning import DenoisePlan, Method, plan_denoise
from nrrn_pipeline.run import resumable
from nrrn_pipeline.shipped import located, read_weights
from nrrn_pipeline.slabs import Layout, Plan
from nrrn_pipeline.volume import Volume, open_volume

Location = str | os.PathLike[str]


def describe_weights(path: Location) -> Weights:
    """What a plan needs to know of a weights file, or of shipped weights by their name."""
    url = located(path)
    try:
        data = read_weights(url)
    except OSError as error:
        raise InputError(f"the weights {url} cannot be read: {error.strerror or error}") from error
    found = architecture_of(parse_header(data, url))
    return Weights(url, bytes_hash(data), found.units, found.channels, found.kind, found.inputs)


def make_plan(source: Location, output: Location, weights: Location | Weights | None, options: Options) -> DenoisePlan:
    """The plan of what denoise would do with the same arguments. Raises InputError where it would."""
    if options.here:
        choose_device(options.device)
    volume = open_volume(source, options.level)
    return plan_for(volume, output, weights, options)


def plan_for(volume: Volume, output: Location, weights: Location | Weights | None, options: Options) -> DenoisePlan:
    """The plan of what denoise would do with a volume. Raises InputError where it would."""
    url = absolute(output)
    begun, denoiser = Ledger(f"{url}/0"), _denoiser_for(volume, weights, options.method)
    plan = partial(plan_denoise, volume, url, denoiser, roi=options.roi, method=options.method)
    if not options.overwrite or begun.followed():
        return plan(layout=_as_begun(options.layout, begun))
    with suppress(InputError):
        if resumable(made := plan(layout=_as_begun(options.layout, begun))):
            return made  # which overwriting keeps
    return plan(layout=options.layout)


def _as_begun(layout: Layout, begun: Ledger) -> Layout:
    """The layout with what is left open as in an output that is begun, wherever and by whichever defaults."""
    with suppress(InputError, LookupError, TypeError, ValueError, OverflowError):  # what is damaged is told later
        if settings := begun.settings():
            slab, chunk, shard = (shape_of(settings[name]) for name in ("slab", "chunk", "shard"))
            tile, halo = (
                int(settings[name]) if asked is None else asked
                for name, asked in (("tile", layout.tile), ("halo", layout.halo))
            )
            chunk, shard = layout.chunk or chunk, layout.shard or shard
            return replace(layout, slab=layout.slab or slab, chunk=chunk, shard=shard, tile=tile, halo=halo)
    return layout


def _denoiser_for(volume: Volume, weights: Location | Weights | None, method: Method) -> Weights | Filter:
    """The weights, or a filter set for the volume. Raises InputError if they and the method do not go together."""
    if method.filter:
        if weights is not None:
            raise InputError(f"the filter {method.name} needs no weights: leave them out")
        return filter_for(method.name or "", volume, method.statistics)
    if weights is None:
        raise InputError(f"there are no weights: give a file with --weights, or a --method of {', '.join(FILTERS)}")
    found = weights if isinstance(weights, Weights) else describe_weights(weights)
    if method.name not in (None, found.kind):
        raise InputError(f"{found.path} holds a {found.kind}, not a {method.name}: give other weights, or no method")
    found.architecture.refuse_images(method.images)
    return found


def shape_of(sizes: list[int]) -> Shape:
    """Three sizes as they stand in JSON."""
    z, y, x = (int(size) for size in sizes)
    return z, y, x


def keeping_for(made: Plan, options: Options, workers: int) -> Keeping | None:
    """For one run on so many workers: they keep what was asked for, or half of what memory leaves if that is known."""
    if not options.keep_gb or not isinstance(made, DenoisePlan) or isinstance(made.denoiser, Noise):
        return None
    beside = worker_bytes(made, options.slabs_each, threads_each(workers) if options.here else CPU_LANES)
    settings = options.cluster_settings
    most_bytes, each = int(options.keep_gb * 1e9), settings.memory_bytes if settings else None
    if options.here:
        each = free_memory_bytes() // workers
    if each is not None:
        most_bytes = max(0, min(most_bytes, (each - beside) // 2))
    return Keeping(uuid4().hex, most_bytes, beside)
