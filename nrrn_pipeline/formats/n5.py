"""N5, as of Fiji and BigDataViewer: one dataset of a container on disk, by tensorstore."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.formats.parts import Found, Part, refuse_unfit
from nrrn_pipeline.geometry import Box, Shape
from nrrn_pipeline.ome import Triple, nm_of


@dataclass(frozen=True)
class Blocks(Part):
    """A dataset of an N5 container. Its own axes are x, y, z; a block that is absent is blank, as N5 means it."""

    url: str
    shape: Shape
    dtype: str
    chunk: Shape

    @property
    def unit(self) -> Shape:
        """A block."""
        return self.chunk

    def read(self, box: Box) -> NDArray[Any]:
        """Whole blocks. Raises StorageError for those that cannot be decoded."""
        found = open_n5(self.url)
        z, y, x = (slice(span.start, span.stop) for span in box.spans)
        lead = (0,) * (found.rank - 3)
        try:
            voxels = found[(x, y, z, *lead)].read().result()
        except ValueError as error:
            raise StorageError(f"{self.url}, voxels {box}: cannot be read ({error})") from error
        return np.ascontiguousarray(voxels.T, self.dtype)


def find_n5(url: str, dataset: str | None) -> Found:
    """What is in a dataset of an N5 container, or in the dataset at `url`. Raises InputError."""
    url = f"{url}/{dataset.strip('/')}" if dataset else url
    if "://" in url:
        raise InputError(f"{url}: N5 is read from paths only; copy it to a disk first")
    attributes = _attributes(url)
    if "dimensions" not in attributes:
        inside = ", ".join(sorted(storage.list_folders(url))[:10]) or "nothing"
        raise InputError(f"{url} is no dataset of N5: give its --dataset; there are {inside}")
    try:
        found = open_n5(url)
    except ValueError as error:
        raise InputError(f"{url} is a damaged N5 dataset: {error}") from error
    shape = refuse_unfit(url, found.shape[::-1], "its shape")
    chunk = found.chunk_layout.read_chunk.shape[::-1][-3:]
    unit = (int(chunk[0]), int(chunk[1]), int(chunk[2]))
    return Found(Blocks(url, shape, found.dtype.name, unit), _voxel_nm(attributes))


def open_n5(url: str) -> Any:
    """The open dataset, x, y, z. Raises ValueError for a damaged one, InputError without tensorstore."""
    try:
        import tensorstore
    except ImportError as error:
        raise InputError("N5 needs a package that is not installed: pip install nrrn-pipeline[n5]") from error
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{url}/"}}
    return tensorstore.open(spec, open=True, read=True).result()


def is_n5(url: str) -> bool:
    """Whether a container or dataset is there."""
    return storage.exists(f"{url}/attributes.json")


def _attributes(url: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_file(f"{url}/attributes.json") or b"{}")
    except ValueError as error:
        raise InputError(f"{url}/attributes.json is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _voxel_nm(attributes: dict[str, Any]) -> Triple | None:
    """By BigDataViewer's pixelResolution, or n5-viewer's resolution and units; both x, y, z."""
    told = attributes.get("pixelResolution")
    if isinstance(told, dict):
        factors = attributes.get("downsamplingFactors") or [1, 1, 1]
        sizes: Any = [size * factor for size, factor in zip(told.get("dimensions") or (), factors, strict=False)]
        units = [told.get("unit")] * 3
    else:
        sizes, units = told or attributes.get("resolution"), attributes.get("units") or ["um" if told else "nm"] * 3
    if not isinstance(sizes, list) or not isinstance(units, list) or len(sizes) < 3 or len(units) < 3:
        return None
    try:
        return nm_of(sizes[2::-1], units[2::-1])
    except (TypeError, ValueError):
        return None
