"""From what users ask for to a plan: the volume is opened, and weights or a filter are found for it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

from nrrn_pipeline.denoisers import Weights, filter_for
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS, Filter
from nrrn_pipeline.geometry import Shape
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.network import architecture_of, bytes_hash, choose_device, gpu_count, parse_header
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.planning import DenoisePlan, Layout, Method, plan_denoise
from nrrn_pipeline.shipped import located, read_weights
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
    layout = _as_begun(options, Ledger(f"{url}/0"))
    denoiser = _denoiser_for(volume, weights, options.method)
    return plan_denoise(volume, url, denoiser, layout, options.roi, options.method)


def _as_begun(options: Options, begun: Ledger) -> Layout:
    """The layout asked for; what is left open as in an output that is begun, wherever and by whichever defaults.

    Else for a GPU slabs of several shards, as it denoises one in a moment.
    """
    layout = options.layout
    if begun.followed() or not options.overwrite:
        with suppress(InputError, LookupError, TypeError, ValueError):  # what is damaged is told, or mended, later
            if settings := begun.settings():
                slab, chunk, shard = (shape_of(settings[name]) for name in ("slab", "chunk", "shard"))
                tile = int(settings["tile"]) if layout.tile is None else layout.tile
                chunk, shard = layout.chunk or chunk, layout.shard or shard
                return replace(layout, slab=layout.slab or slab, chunk=chunk, shard=shard, tile=tile)
    return layout if layout.slab else replace(layout, gpus=_gpus(options))


def _gpus(options: Options) -> int:
    """That the options ask for; 0 where a GPU may be found by workers alone."""
    if options.here:
        return max(1, gpu_count()) if choose_device(options.device).type == "cuda" else 0
    settings = options.cluster_settings
    return int(getattr(settings, "gpus", 0)) * int(getattr(settings, "workers", 1))


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
