"""The options that several commands share, how their texts are read, and what they make together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import wraps
from inspect import Parameter, Signature, signature
from math import inf
from typing import Annotated, Any

import typer

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.following import Following
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.keeping import KEEP_GB
from nrrn_pipeline.members import Share
from nrrn_pipeline.network import PRECISIONS
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import using_options
from nrrn_pipeline.planning import Method
from nrrn_pipeline.slabs import Layout


def _use_storage_options(context: typer.Context, text: str | None) -> str | None:
    """They hold until the command ends."""
    context.with_resource(using_options(text))
    return text


Source = Annotated[str, typer.Argument(metavar="SRC", help="Zarr volume: OME-Zarr 0.4 or 0.5, or a bare array.")]
Output = Annotated[str, typer.Argument(metavar="DST", help="OME-Zarr 0.5 to write.")]
Cluster = Annotated[str, typer.Option(help="local, serial, a Dask scheduler's address, or FILE.toml with settings.")]
Workers = Annotated[int | None, typer.Option(help="Local processes (default: what cores and memory carry).")]
Tile = Annotated[
    int | None, typer.Option(help="Side of the largest window the network sees (default: what is fast in 1 GiB).")
]
Halo = Annotated[int | None, typer.Option(help="Voxels read and discarded around a tile (default: the reach).")]
SlabSize = Annotated[str | None, typer.Option("--slab", metavar="Z,Y,X", help="Voxels of one task (default: a shard).")]
ChunkSize = Annotated[str | None, typer.Option("--chunk", metavar="Z,Y,X", help="Chunk of the output (16,256,256).")]
ShardSize = Annotated[str | None, typer.Option("--shard", metavar="Z,Y,X", help="Shard of the output (64,512,512).")]
BOX = "Z0:Z1,Y0:Y1,X0:X1"
Roi = Annotated[str | None, typer.Option(metavar=BOX, help="This part only.")]
LevelNumber = Annotated[int, typer.Option("--level", help="Pyramid level of SRC; 0 is full size.")]
Images = Annotated[int, typer.Option(help="Slices an estimate is made from: 3 (the paper's), 2 or 1.")]
Stats = Annotated[str, typer.Option(help="Normalise with each slice's own statistics or the volume's: slice, volume.")]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"Instead of weights, a filter: {', '.join(FILTERS)}. Or the kind of network that --weights must hold.",
    ),
]
Stitch = Annotated[str, typer.Option(help="crop tiles to what they keep (exact), or blend them where they overlap.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[
    str,
    typer.Option(help=f"Of the network: {', '.join(PRECISIONS)} (on a GPU a fast one that gives all but the same)."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Delete what is at DST first; an unfinished run with the same settings is resumed."
    ),
]
Pyramid = Annotated[bool, typer.Option("--pyramid", help="Levels of lower resolution too, for viewers.")]
ShardOf = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Be one of N processes that share the work without Dask, as in a job array; I: 0 to N-1.",
    ),
]
Follow = Annotated[
    bool, typer.Option("--follow", help="SRC still grows along z: denoise what there is, and more as it comes.")
]
Every = Annotated[
    float | None, typer.Option(metavar="S", help="With --follow: look every S seconds (60); 0: once, for nightly jobs.")
]
Settle = Annotated[
    float | None, typer.Option(metavar="S", help="With --follow: slices count when there for S seconds (60).")
]
Keys = Annotated[str | None, typer.Option(help="Folder with the cluster's certificates, by nrrn cluster keys.")]
Prefetch = Annotated[bool, typer.Option(help="Read the next slab, and write the last, while one computes.")]
Keep = Annotated[
    float,
    typer.Option(metavar="GB", help="What a worker keeps of SRC, at most, as its next slabs read the same chunks."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as one line of JSON, for scripts.")]
Made = Annotated[str, typer.Argument(metavar="DST", help="A volume that nrrn wrote, or writes.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        metavar="JSON|@FILE",
        callback=_use_storage_options,
        help='Of URLs, such as \'{"endpoint_url": "https://s3.lab"}\', or by what they begin with: '
        '\'{"s3://public/": {"anon": true}}\'. Credentials come from the environment or a profile.',
    ),
]


def parse_triple(name: str, text: str | None) -> Shape | None:
    """Sizes such as 64,512,512. Raises InputError for any other text."""
    if text is None:
        return None
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--{name} {text!r} is not understood: expected three numbers Z,Y,X such as 64,512,512"
        ) from None
    return z, y, x


def parse_numbers(name: str, text: str | None) -> tuple[float, float, float] | None:
    """Sizes such as 5,4.5,4.5. Raises InputError for any other text, and for what is no size."""
    if text is None:
        return None
    try:
        z, y, x = (float(part) for part in text.split(","))
        if not all(0 < size < inf for size in (z, y, x)):
            raise ValueError
    except ValueError:
        raise InputError(f"--{name} {text!r} is not understood: expected three sizes Z,Y,X such as 8,5,5") from None
    return z, y, x


def parse_following(follow: bool, every: float | None, settle: float | None) -> Following | None:
    """None without --follow. Raises InputError for times without it, or that cannot be."""
    if not follow and (every is not None or settle is not None):
        raise InputError("--every and --settle are for a volume that grows: give --follow too, or leave them out")
    return Following(60.0 if every is None else every, 60.0 if settle is None else settle) if follow else None


def parse_box(name: str, text: str | None) -> Box | None:
    """Raises InputError for a text that is no box."""
    if text is None:
        return None
    try:
        return Box.parse(text)
    except ValueError:
        raise InputError(f"--{name} {text!r} is not understood: expected {BOX} such as 0:16,0:512,0:512") from None


def parse_options(  # one parameter an option: that is how a command line is declared
    cluster: Cluster = "local",
    keys: Keys = None,
    workers: Workers = None,
    prefetch: Prefetch = True,
    keep: Keep = KEEP_GB,
    tile: Tile = None,
    halo: Halo = None,
    slab: SlabSize = None,
    chunk: ChunkSize = None,
    shard: ShardSize = None,
    roi: Roi = None,
    level: LevelNumber = 0,
    images: Images = 3,
    stats: Stats = "slice",
    method: MethodName = None,
    stitch: Stitch = "crop",
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: Overwrite = False,
    pyramid: Pyramid = False,
    shard_of: ShardOf = None,
    storage_options: StorageOptions = None,  # noqa: ARG001  (in force once it is parsed)
) -> Options:
    """How to denoise, by the words of a command line. Raises InputError for those that cannot be."""
    slab_chunk_shard = parse_triple("slab", slab), parse_triple("chunk", chunk), parse_triple("shard", shard)
    return Options(
        level=level,
        roi=parse_box("roi", roi),
        layout=Layout(*slab_chunk_shard, tile, halo),
        method=Method(images, stats, method, stitch, precision),
        device=device,
        cluster=cluster,
        keys=keys,
        workers=workers,
        prefetch=prefetch,
        keep_gb=keep,
        overwrite=overwrite,
        pyramid=pyramid,
        share=None if shard_of is None else Share.parse(shard_of),
    )


def names_a_part_alone(options: Options) -> bool:
    """Whether no word was given that is of a run: only which part of which level."""
    return options == Options(level=options.level, roi=options.roi)


WORDS = frozenset(signature(parse_options).parameters)
LAYOUT = frozenset({"slab", "chunk", "shard"})  # of the output
WHERE = frozenset({"cluster", "keys", "workers", "prefetch", "device"})  # a run is carried out


def takes_options(words: AbstractSet[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command whose parameter `options` is made of these words of parse_options, and of storage options."""
    return takes(parse_options, "options", words | {"storage_options"})


def takes(
    parse: Callable[..., Any], name: str, words: AbstractSet[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command whose parameter `name` is what `parse` makes of words of a command line: these of its own, or all.

    typer reads a command's signature: there, the words stand in the parameter's place.
    """
    known = signature(parse, eval_str=True).parameters.values()
    shared = [each for each in known if words is None or each.name in words]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            made = parse(**{each.name: given.pop(each.name) for each in shared})
            command(**given, **{name: made})

        own = [each for each in signature(command, eval_str=True).parameters.values() if each.name != name]
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
        called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate
