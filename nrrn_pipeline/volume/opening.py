"""Opening and creating volumes: small metadata documents in, small metadata documents out; no voxels."""

from __future__ import annotations

import json
import os
from typing import Any

from nrrn_pipeline import ome, storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.places import absolute, can_list
from nrrn_pipeline.volume.metadata import (
    DTYPES,
    MAX_METADATA_BYTES,
    METADATA_FILE,
    Volume,
    describe,
    name_of,
    new_metadata,
)

Node = dict[str, Any]  # Zarr metadata of an array or a group, with its attributes


def open_volume(url: str | os.PathLike[str], level: int = 0, dtypes: tuple[str, ...] = DTYPES) -> Volume:
    """Describe the volume at a path or URL: level `level` of an OME-Zarr image, or a bare Zarr array.

    Raises InputError if nothing is there, it cannot be reached, is no Zarr, has no such level, or is no single-channel
    3-D volume of one of the dtypes.
    """
    url = absolute(url)
    node = _open_node(url)
    if _is_array(node):
        if level != 0:
            raise InputError(f"{url} has no level {level}: it is a bare array, not an OME-Zarr image with levels")
        return describe(node, url, None, dtypes)
    try:
        levels = ome.read_levels(node["attributes"])
    except InputError as error:
        raise InputError(f"{url} cannot be used: {error}") from error
    if not levels:
        arrays = ", ".join(_arrays_in(url)) or "none"
        raise InputError(
            f"{url} is a Zarr group without OME-Zarr multiscales metadata: name one of its arrays ({arrays})"
        )
    if not 0 <= level < len(levels):
        raise InputError(f"{url} has no level {level}: its levels are 0 to {len(levels) - 1}")
    chosen = levels[level]
    inner = f"{url}/{chosen.path}"
    if "://" not in url and not os.path.realpath(inner).startswith(f"{url}/"):
        raise InputError(f"{inner}, level {level} of {url}, is a link out of it: give the volume that it leads to")
    array = _open_node(inner)
    if not _is_array(array):
        raise InputError(f"{inner} is named as level {level} of {url} but is no array")
    return describe(array, inner, chosen, dtypes)


def count_levels(url: str | os.PathLike[str]) -> int:
    """How many levels a group's metadata name; of a bare array 1."""
    node = _open_node(absolute(url))
    return 1 if _is_array(node) else max(1, len(ome.read_levels(node["attributes"])))


def create_volume(volume: Volume, provenance: dict[str, Any]) -> None:
    """Create the OME-Zarr 0.5 group, or 0.4 if its Zarr is of format 2, and the array of `volume`; no voxels yet.

    What exists stays as it is, but an array of fewer slices grows. Raises InputError if what exists is something else.
    """
    group_url = volume.group_url
    if _node(group_url) is None:
        named = ome.image_attributes(name_of(group_url), _level(volume), volume.zarr_format)
        _create_group(group_url, volume.zarr_format, {**named, "nrrn": provenance})
    if volume.zarr_format == 2:  # where xarray looks for the axes' names
        storage.write_new_file(f"{volume.url}/.zattrs", _json_bytes({"_ARRAY_DIMENSIONS": volume.axes}))
    url, wanted = f"{volume.url}/{METADATA_FILE[volume.zarr_format]}", new_metadata(volume)
    if not storage.write_new_file(url, wanted.encode()):
        found, z = _read_json(url), volume.lead_axes
        # a level's attributes tell how it was made
        attributes = {"attributes": found["attributes"]} if found and "attributes" in found else {}
        if found != json.loads(wanted) | attributes:
            if _with_slices(found, z, volume.shape[0]) != json.loads(wanted) | attributes:
                raise InputError(f"{url} was changed since it was begun: start again with --overwrite")
            storage.write_file(url, json.dumps(json.loads(wanted) | attributes).encode())


def _create_group(url: str, zarr_format: int, attributes: Node) -> None:
    """Unless others do the same just now."""
    if zarr_format == 3:
        node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        storage.write_new_file(f"{url}/zarr.json", _json_bytes(node))
    else:
        storage.write_new_file(f"{url}/.zattrs", _json_bytes(attributes))
        storage.write_new_file(f"{url}/.zgroup", _json_bytes({"zarr_format": 2}))  # last: there is no group without it


def _level(volume: Volume) -> ome.Level:
    return ome.Level(volume.level_path, volume.axes, volume.voxel_size, volume.origin, volume.in_nm)


def _with_slices(array: Node | None, z: int, slices: int) -> Node | None:
    """An array's metadata, grown along its axis `z`."""
    shape = list((array or {}).get("shape") or ())
    if array is None or len(shape) <= z or not isinstance(shape[z], int) or shape[z] > slices:
        return None
    shape[z] = slices
    return array | {"shape": shape}


def set_level(volume: Volume, there: bool = True) -> None:
    """Let the group's metadata name the volume as one of its levels, or no more.

    Raises InputError if there is no OME-Zarr group.
    """
    group = _node(volume.group_url)
    try:
        if group is None:
            raise LookupError("no group")
        attributes = group["attributes"]
        image = attributes.get("ome", attributes)["multiscales"][0]
        others = [dataset for dataset in image["datasets"] if dataset["path"] != volume.level_path]
    except (LookupError, TypeError) as error:
        raise InputError(f"{volume.group_url} is no OME-Zarr image to add a level to ({error})") from error
    own = [ome.dataset_of(_level(volume))] if there else []
    image["datasets"] = sorted([*others, *own], key=_finest_first)
    _write_attributes(volume.group_url, group)


def _finest_first(dataset: dict[str, Any]) -> tuple[float, ...]:
    return tuple(dataset["coordinateTransformations"][0]["scale"])


def set_provenance(group_url: str, provenance: dict[str, Any]) -> None:
    """Store under the attribute `nrrn` of a group, or an array, how its voxels came to be."""
    node = _node(group_url)
    if node is None:
        raise InputError(f"{group_url} was deleted or moved under the run")
    node["attributes"]["nrrn"] = provenance
    _write_attributes(group_url, node)


def get_provenance(group_url: str) -> dict[str, Any] | None:
    """What set_provenance stored; None for other groups."""
    found = _open_node(absolute(group_url))["attributes"].get("nrrn")
    return found if isinstance(found, dict) else None


def is_zarr(url: str) -> bool:
    """Whether a Zarr group or array is at the URL."""
    try:
        return _node(url) is not None
    except InputError:
        return True  # a damaged one


def _write_attributes(url: str, node: Node) -> None:
    """Those of a group, or an array, that was read."""
    if node["zarr_format"] == 3:
        storage.write_file(f"{url}/zarr.json", _json_bytes(node))
    else:
        storage.write_file(f"{url}/.zattrs", _json_bytes(node["attributes"]))


def _json_bytes(node: Node) -> bytes:
    return json.dumps(node, indent=2).encode()


def _open_node(url: str) -> Node:
    """The Zarr array or group there, or an InputError that says why there is none."""
    try:
        node = _node(url)
        if node is None and can_list(url) and not storage.exists(url):
            raise InputError(f"no volume at {url}: there is nothing there")
    except OSError as error:
        raise InputError(f"{url} cannot be read: {error}. Check the address, and your credentials for it") from error
    if node is None:
        raise InputError(f"{url} is not a Zarr volume: expected a Zarr array or an OME-Zarr group")
    return node


def _node(url: str) -> Node | None:
    """Zarr metadata, version 3 or 2, and its attributes; None if there are none."""
    node = _read_json(f"{url}/zarr.json")
    if node is None:
        node = _read_json(f"{url}/.zarray") or _read_json(f"{url}/.zgroup")
        if node is not None:
            node["attributes"] = _read_json(f"{url}/.zattrs") or {}
    if node is None:
        return None
    node.setdefault("attributes", {})
    array_of_3 = node.get("node_type") == "array"
    if node.get("zarr_format") not in (2, 3) or not isinstance(node["attributes"], dict):
        raise InputError(f"{url} is a damaged Zarr: its metadata cannot be read (zarr_format, attributes)")
    if node["zarr_format"] == 3 and not array_of_3 and node.get("node_type") != "group":
        raise InputError(f"{url} is a damaged Zarr: its metadata cannot be read (node_type)")
    return node


def _is_array(node: Node) -> bool:
    return node.get("node_type") == "array" or (node["zarr_format"] == 2 and "shape" in node)


def _read_json(url: str) -> Node | None:
    data = storage.read_agreed(url, MAX_METADATA_BYTES)
    if data is None:
        return None
    if len(data) == MAX_METADATA_BYTES:
        raise InputError(f"{url} is refused: metadata of {MAX_METADATA_BYTES} bytes or more are no volume's")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url} is damaged: it cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise InputError(f"{url} is damaged: it holds no table")
    return document


def _arrays_in(url: str) -> list[str]:
    """Names of the arrays right below a group."""
    names = storage.list_folders(url)
    nodes = {name: _node(f"{url}/{name}") for name in sorted(names)[:100]}
    return [name for name, node in nodes.items() if node is not None and _is_array(node)]
