"""Volumes in Zarr: OME-Zarr 0.5 and 0.4 groups and bare arrays, in z, y, x order. The only package that knows zarr."""

from nrrn_pipeline.volume.metadata import DTYPES, MAX_AXIS, Volume, refuse_unwritable
from nrrn_pipeline.volume.opening import (
    count_levels,
    create_volume,
    get_provenance,
    is_zarr,
    open_volume,
    set_level,
    set_provenance,
)
from nrrn_pipeline.volume.voxels import object_key, read_ahead, read_box, stored_units, write_box, written_slices

__all__ = [
    "DTYPES",
    "MAX_AXIS",
    "Volume",
    "count_levels",
    "create_volume",
    "get_provenance",
    "is_zarr",
    "object_key",
    "open_volume",
    "read_ahead",
    "read_box",
    "refuse_unwritable",
    "set_level",
    "set_provenance",
    "stored_units",
    "write_box",
    "written_slices",
]
