"""How Neuroglancer shows layers: its state, as JSON, and links that hold one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.places import options_of
from nrrn_pipeline.viewing.layers import Layer
from nrrn_pipeline.volume import Volume, open_volume

Source = str | dict[str, Any]  # as the client takes it

CLIENT = "https://neuroglancer-demo.appspot.com/"
VOXELS_A_PIXEL = 4  # at most, of the coarsest level: a slice without coarse levels is not read whole at the start
WINDOW = (1300, 600)  # pixels, x and y, that the panels have on a small laptop
SHADER = "#uicontrol invlerp contrast\nvoid main() {\n  emitGrayscale(contrast());\n}\n"


def viewer_state(layers: Sequence[Layer], sources: Sequence[Source]) -> dict[str, Any]:
    """One panel a layer in a row, all at the middle of the last one's middle slice; one source a layer.

    The slice fits, unless that would read more than a few voxels for each pixel.
    """
    whole, shown = layers[0].volume, layers[-1].volume
    steps = [at / size for at, size in zip(shown.origin, whole.voxel_size, strict=True)]
    middle = [step + length // 2 for step, length in zip(steps, shown.shape, strict=True)]
    panels = [{"type": "viewer", "layers": [layer.name], "layout": "xy"} for layer in layers]
    return {
        "title": f"nrrn: {shown.group_url.rpartition('/')[2]}",
        "dimensions": {axis: _unit(whole, axis) for axis in "xyz"},
        "position": middle[::-1],
        "crossSectionScale": _zoom(layers[-1], len(layers)),
        "layers": [_layer(layer, source) for layer, source in zip(layers, sources, strict=True)],
        "selectedLayer": {"layer": layers[0].name, "visible": False},
        "showAxisLines": False,
        "showDefaultAnnotations": False,  # the frame around the volume
        "crossSectionBackgroundColor": "#202020",
        "layout": {"type": "row", "children": panels} if len(panels) > 1 else panels[0],
    }


def fragment(state: dict[str, Any]) -> str:
    """What stands behind a client's address to show a state."""
    return "#!" + quote(json.dumps(state, separators=(",", ":")), safe="!*'():,/")


def public_url(layers: Sequence[Layer]) -> str:
    """A link to the public client, which reads the volumes where they are; without what was removed, which nobody has.

    Raises InputError if one is where no web page can read it, or the client would not lay them over each other.
    """
    stored = [layer for layer in layers if layer.levels[0].whole is None]
    for layer in stored[1:]:
        if open_volume(layer.volume.group_url) != layer.volume:
            raise InputError(
                f"{layer.volume.group_url} says another voxel size than {stored[0].volume.group_url}: leave --url out "
                "to view them here"
            )
    return CLIENT + fragment(viewer_state(stored, [_public_source(layer.volume) for layer in stored]))


def _public_source(volume: Volume) -> Source:
    """Where the client finds a volume. Raises InputError if it cannot."""
    scheme, _, rest = volume.group_url.partition("://")
    advice = "leave --url out to view it here, or copy it to public storage: s3://, gs:// or https://"
    if scheme not in ("s3", "gs", "gcs", "https"):
        raise InputError(f"{volume.group_url} cannot be read by web pages: {advice}")
    if scheme == "s3" and not {"endpoint_url", "client_kwargs"}.isdisjoint(options_of(volume.group_url)):
        raise InputError(f"{volume.group_url} is at an endpoint of its own: give its https:// address, or {advice}")
    kind = f"zarr{json.loads(volume.metadata)['zarr_format']}"
    place = quote(rest, safe="/:%" if scheme == "https" else "/")  # that is one already, with its port
    source: dict[str, Any] = {"url": f"{scheme.replace('gcs', 'gs')}://{place}/|{kind}:"}
    if not volume.level_path:  # a bare array: of such the client knows no axes, and takes voxel 0 to begin at 0
        axes = [f"{axis}'" if axis == "c" else axis for axis in volume.axes]
        shift = [-0.5 if axis in "zyx" else 0 for axis in axes]  # in OME-Zarr its middle is there
        matrix = [[int(row == column) for column in range(len(axes))] + [by] for row, by in enumerate(shift)]
        source["transform"] = {"outputDimensions": {axis: [1, ""] for axis in axes}, "matrix": matrix}
    return source


def _unit(volume: Volume, axis: str) -> list[Any]:
    size = volume.voxel_size["zyx".index(axis)]
    return [float(f"{size * 1e-9:.12g}"), "m"] if volume.in_nm else [size, ""]


def _zoom(layer: Layer, panels: int) -> float:
    """Voxels, as long as the shortest side of one, to a pixel."""
    volume, coarsest = layer.volume, layer.levels[-1].volume
    _, height, width = (length * size for length, size in zip(volume.shape, volume.voxel_size, strict=True))
    fitting = max(width * panels / WINDOW[0], height / WINDOW[1])
    return min(fitting, VOXELS_A_PIXEL * max(coarsest.voxel_size[1:])) / min(volume.voxel_size)


def _layer(layer: Layer, source: Source) -> dict[str, Any]:
    return {
        "type": "image",
        "name": layer.name,
        "source": source,
        "tab": "rendering",
        "opacity": 1,
        "shader": SHADER,
        "shaderControls": {"contrast": {"range": list(layer.contrast)}},
    }
