"""Which volumes to denoise, into what and how: from a CSV, a TOML, a glob or a folder, refused as a whole or right."""

from __future__ import annotations

import csv
import io
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from nrrn_pipeline import storage
from nrrn_pipeline.cluster.kinds import wrong_keys
from nrrn_pipeline.cost import counted
from nrrn_pipeline.errors import InputError, few
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute, can_list
from nrrn_pipeline.planning import Method
from nrrn_pipeline.preparing import Location, describe_weights
from nrrn_pipeline.shipped import SHIPPED
from nrrn_pipeline.volume import is_zarr

MAX_BYTES = 4 * 2**20  # of a manifest: some 40,000 volumes
MOST_PROBLEMS = 5  # named in one message
_WILD = re.compile(r"[*?\[]")


def _whole(value: object) -> int:
    """A number from 0 up, of a TOML or of a CSV's text."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{value!r:.60} is no whole number from 0 up")


def _size(value: object) -> Shape:
    """[64, 512, 512], or the text 64,512,512."""
    sizes = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    try:
        z, y, x = (_whole(size) for size in sizes)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"{value!r:.60} is not understood: expected three sizes Z,Y,X such as 64,512,512") from None
    return z, y, x


def _region(value: object) -> Box:
    try:
        return Box.parse(value)  # type: ignore[arg-type]
    except (AttributeError, ValueError):
        expected = "Z0:Z1,Y0:Y1,X0:X1 such as 0:16,0:512,0:512"
        raise ValueError(f"{value!r:.60} is not understood: expected {expected}") from None


Text = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, PlainValidator(_whole)]
Size = Annotated[Shape, PlainValidator(_size)]
Region = Annotated[Box, PlainValidator(_region)]


class Settings(BaseModel):
    """What a manifest says of how to denoise a volume; None: as the whole batch is denoised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Text | None = None
    level: Whole | None = None
    roi: Region | None = None
    slab: Size | None = None
    chunk: Size | None = None
    shard: Size | None = None
    tile: Whole | None = None
    halo: Whole | None = None
    images: Whole | None = None
    stats: Text | None = None
    method: Text | None = None
    stitch: Text | None = None

    def over(self, common: Options) -> Options:
        """The common options, but for what is set here. Raises InputError for what cannot be."""

        def given(**names: str) -> dict[str, Any]:
            return {name: value for name, own in names.items() if (value := getattr(self, own)) is not None}

        layout = replace(common.layout, **given(slab="slab", chunk="chunk", shard="shard", tile="tile", halo="halo"))
        method = replace(common.method, **given(images="images", statistics="stats", name="method", stitch="stitch"))
        return replace(common, layout=layout, method=method, **given(level="level", roi="roi"))


class Entry(Settings):
    """One volume, as a manifest gives it."""

    source: Text
    output: Text


@dataclass(frozen=True)
class Job:
    """One volume to denoise: URLs or absolute paths, and the settings of its own. `place` is its place in the manifest.

    weights: None for a filter. Two jobs are the same if all but their places is.
    """

    source: str
    output: str
    weights: str | None
    settings: Settings = field(default_factory=Settings)
    place: str = field(default="", compare=False)


def read_manifest(
    manifest: Location,
    weights: Location | None = None,
    into: Location | None = None,
    empty: bool = False,
    method: str | None = None,
) -> list[Job]:
    """The volumes that a manifest names, in its order.

    A manifest is a CSV (.csv: columns source, output, and any settings), a TOML (.toml: [[volume]] tables with the same
    keys, and [defaults]), a glob such as s3://lab/raw/*.zarr, or a folder with / at its end, for every Zarr right below
    it; the last two need `into`, the folder for outputs of the same names. What is relative in a file is relative to
    its folder. `weights` and `method` are those of volumes that name none. `empty`: a glob or folder may hold no volume
    yet.

    Raises InputError, naming lines or entries, if any of it cannot be used.
    """
    text = os.fspath(manifest)
    filtered = Method(name=method).filter
    if filtered and weights is not None:
        raise InputError(f"the filter {method} needs no weights: leave them out")
    common = None if weights is None else describe_weights(weights).path
    if text.endswith((".csv", ".toml")):
        if into is not None:
            raise InputError(f"--into is for globs and folders: {text} names its outputs itself")
        jobs, problems = _jobs_in_file(absolute(text), common, method)
    elif _WILD.search(text) or text.endswith("/"):
        if into is None or (common is None and not filtered):
            missing = "--into, the folder for its outputs" if into is None else "--weights, or a filter as --method"
            raise InputError(f"{text} names volumes alone: give {missing}")
        settings = Settings(method=method) if filtered else Settings()
        jobs, problems = [replace(job, settings=settings) for job in _jobs_found(text, absolute(into), common)], []
        if not jobs and not empty:
            raise InputError(f"no volume at {text}: give a glob that matches some, or a folder of Zarr volumes")
    else:
        raise InputError(
            f"{text!r} is no manifest: give a .csv or .toml file, a glob such as 's3://lab/raw/*.zarr', or a folder "
            "with / at its end; nrrn denoise takes a single volume"
        )
    problems += _clashes(jobs)
    if problems:
        raise InputError(f"{text} cannot be used: {few(problems, MOST_PROBLEMS, '; ')}")
    return jobs


def _jobs_in_file(url: str, weights: str | None, method: str | None) -> tuple[list[Job], list[str]]:
    """Jobs, and what is wrong with the others."""
    text, rows = _text_of(url), _csv_rows if url.endswith(".csv") else _toml_rows
    jobs, problems = [], []
    try:
        for place, row in rows(text):
            try:
                entry = _entry(row)
                if entry.method is None and method in FILTERS:
                    entry = entry.model_copy(update={"method": method})
                folder = url.rpartition("/")[0]
                source, output = (_beside(folder, location) for location in (entry.source, entry.output))
                jobs.append(Job(source, output, _weights_for(entry, folder, weights), entry, place))
            except InputError as error:
                problems.append(f"{place}: {error}")
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{url} cannot be used: {error}") from error
    if not jobs and not problems:
        raise InputError(f"{url} names no volume: give each a line with source and output, or a [[volume]] table")
    return jobs, problems


def _text_of(url: str) -> str:
    try:
        data = storage.read_agreed(url, MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"the manifest {url} cannot be read: {error.strerror or error}") from error
    if data is None:
        raise InputError(f"there is no manifest at {url}")
    if len(data) > MAX_BYTES:
        raise InputError(f"{url} holds more than {MAX_BYTES} bytes, which is no manifest: make several of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{url} is no text in UTF-8: save it as such, as CSV with commas or as TOML")
    return text


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each line's place and cells by column, without empty ones. Raises ValueError for what concerns the whole file."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _refuse_columns(header)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if len(cells) != len(header) and any(cells):
                raise ValueError(
                    f"line {reader.line_num} has {counted(len(cells), 'field')}, the header {len(header)}: put in "
                    'quotes what holds commas, as in "16,256,256"'
                )
            if any(cells):
                named = zip(header, cells, strict=True)
                yield f"line {reader.line_num}", {name: cell for name, cell in named if cell}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _refuse_columns(header: list[str]) -> None:
    known = list(Entry.model_fields)
    if missing := [name for name in ("source", "output") if name not in header]:
        raise ValueError(
            f"its first line names no column {' and no '.join(missing)}: it must name the columns, separated by "
            f"commas; it is {','.join(header)!r:.100}"
        )
    if unknown := [name for name in header if name not in known]:
        names = ", ".join(f"{name!r:.40}" for name in unknown[:MOST_PROBLEMS])
        raise ValueError(f"line 1: column {names} is unknown: use {', '.join(sorted(known))}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"line 1: column {', '.join(twice)} is there twice")


def _toml_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry's place and keys with the defaults. Raises ValueError for what concerns the whole file."""
    table = tomllib.loads(text)
    defaults, volumes = table.pop("defaults", {}), table.pop("volume", [])
    if table:
        raise ValueError(f"key {next(iter(table))!r:.60} is unknown: use [defaults] and [[volume]]")
    if not isinstance(defaults, dict) or not isinstance(volumes, list):
        raise ValueError("write [defaults] once, and [[volume]] in double brackets for each volume")
    try:
        Settings.model_validate(defaults)
    except ValidationError as error:
        raise ValueError(f"defaults: {wrong_keys(error)}") from None
    for number, volume in enumerate(volumes, start=1):
        if not isinstance(volume, dict):
            raise ValueError(f"volume {number} is no table: write [[volume]]")
        merged = defaults | volume
        if str(volume.get("method")) in FILTERS and "weights" not in volume:
            merged.pop("weights", None)  # they are for the networks
        yield f"volume {number}", merged


def _entry(row: Mapping[str, Any]) -> Entry:
    """Raises InputError, saying what is wrong."""
    try:
        return Entry.model_validate(row)
    except ValidationError as error:
        raise InputError(wrong_keys(error)) from None


def _weights_for(entry: Entry, folder: str, weights: str | None) -> str | None:
    """Its own, or the common ones; None for a filter. Raises InputError if its settings cannot be, or lack weights."""
    method = entry.over(Options()).method
    if entry.weights is not None:
        if method.filter:
            raise InputError(f"the filter {method.name} needs no weights: leave them out, or name no filter")
        return entry.weights if entry.weights in SHIPPED else _beside(folder, entry.weights)
    if method.filter:
        return None
    if weights is None:
        raise InputError("it has no weights: name them there or give --weights, or name a filter as its method")
    return weights


def _beside(folder: str, location: str) -> str:
    """A URL or an absolute path; what is relative lies in the folder."""
    return absolute(location if "://" in location or location.startswith(("/", "~")) else f"{folder}/{location}")


def _jobs_found(pattern: str, into: str, weights: str | None) -> list[Job]:
    """A job for each volume that a glob matches, or that lies in a folder; none for what lies where outputs go."""
    url = absolute(pattern)
    if not can_list(url):
        raise InputError(f"{url} cannot be listed, as it is on a web server: name its volumes in a .csv or .toml file")
    try:
        found = _matching(url) if _WILD.search(url) else _zarrs_in(url)
    except OSError as error:
        raise InputError(f"{url} cannot be listed: {error.strerror or error}") from error
    jobs = []
    for name in found:
        source, output = absolute(name), absolute(f"{into}/{name.rpartition('/')[2]}")
        below = any(f"{url}/".startswith(f"{into}/") for url in (name, source))  # a link may lead elsewhere
        if not below and not into.startswith(f"{source}/"):
            jobs.append(Job(source, output, weights, place=name))
    return jobs


def _matching(pattern: str) -> list[str]:
    """All folders that match, in order; a wildcard stands for a part of a name, and for none that begins with a dot."""
    if "**" in pattern:
        raise InputError(f"{pattern} cannot be used: ** is not understood; write one * for each folder")
    scheme, mark, path = pattern.rpartition("://")
    first, *parts = path.split("/")
    places, wild = [f"{scheme}{mark}{first}"], False
    for part in parts:
        wild = wild or _WILD.search(part) is not None
        names = {place: _folders_in(place or "/") if wild else [part] for place in places}
        places = [f"{place}/{name}" for place in places for name in names[place] if not wild or _fits(name, part)]
    return places


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))


def _zarrs_in(folder: str) -> list[str]:
    if is_zarr(folder):
        raise InputError(f"{folder} is a Zarr itself, and no folder of volumes: nrrn denoise takes a single one")
    found = (f"{folder}/{name}" for name in _folders_in(folder) if not name.startswith("."))
    return [url for url in found if is_zarr(url)]


def _folders_in(url: str) -> list[str]:
    """Names in order. On a disk, links to folders are among them, which fsspec does not count as such."""
    if "://" in url:
        return sorted(storage.list_folders(url))
    names = os.listdir(url) if os.path.isdir(url) else []
    return sorted(name for name in names if os.path.isdir(f"{url}/{name}"))


def _clashes(jobs: list[Job]) -> list[str]:
    """Outputs that are, lie in, or hold another volume's output or any source."""
    read, written = {job.source: job for job in jobs}, dict[str, Job]()
    problems = [
        f"{job.place} and {other.place} have the same output {job.output}"
        for job in jobs
        if (other := written.setdefault(job.output, job)) is not job
    ]
    for job in jobs:
        around = _above(job.output)
        for what, urls, whose, there in (
            ("output", [job.output, *around], "source", read),
            ("output", around, "output", written),
            ("source", _above(job.source), "output", written),
        ):
            if holder := next((there[url] for url in urls if url in there), None):
                problems.append(f"the {what} of {job.place} lies in the {whose} of {holder.place}")
    return problems


def _above(url: str) -> list[str]:
    """The folders that hold it, from the inside out."""
    slashes = [at for at, character in enumerate(url) if character == "/"]
    return [url[:at] for at in reversed(slashes)]
