"""Volumes as microscopes and other tools leave them: TIFF, PNG, MRC, HDF5, N5, NumPy; and Zarr. One file a format."""

from nrrn_pipeline.formats.sources import Stack, find_stack

__all__ = ["Stack", "find_stack"]
