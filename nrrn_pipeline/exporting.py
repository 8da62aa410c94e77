"""From a volume to a file, a folder of slices or an older kind of Zarr, for other tools."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from nrrn_pipeline.api import RunWatch, Summary, run_planned
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.export_plan import plan_export
from nrrn_pipeline.formats.writers import Written, writer_for
from nrrn_pipeline.geometry import Box, cells_along
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.volume import Volume, count_levels, open_volume, read_ahead, read_box

BAND_BYTES = 2**28  # of slices that are read at a time


def export_zarr(
    source: Location, output: Location, options: Options | None = None, watch: RunWatch | None = None
) -> Summary:
    """Copy a volume, or its part `options.roi`, into a new OME-Zarr 0.4 group, for tools that know no Zarr 3 or shards.

    Called again after any interruption, it goes on. Levels below the one that is copied are made anew, and are made
    with `options.pyramid` if there are none. Of options, method, device, and the layout's shard, tile and halo do not
    count; `layout.chunk` is what the copy is stored in.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError if that cannot be, with nothing written; RunError or SlabsFailedError if it broke off, and what is
    done is kept.
    """
    options = options or Options()
    made = plan_export(open_volume(source, options.level), str(output), options.layout, options.roi)
    levels = options.pyramid or count_levels(source) > options.level + 1
    return run_planned(made, replace(options, pyramid=levels), watch or RunWatch())


def export(
    source: Location,
    output: Location,
    level: int = 0,
    roi: Box | None = None,
    progressed: Callable[[int, int], None] | None = None,
) -> None:
    """Write a volume, or its part `roi`, as TIFF (ImageJ's; OME's if .ome.tif or large), MRC, HDF5, .npy, or a folder.

    By the output's name: .tif, .mrc, .h5, .npy; without a suffix a folder of TIFF slices. It appears once it is whole.
    progressed: is told how many slices are written, of how many.

    Raises InputError if that cannot be, or there is something at `output`; RunError if it broke off, with nothing left.
    """
    volume = open_volume(source, level)
    box = roi or volume.box
    refuse_outside(box, volume.box)
    path = absolute(output)
    if "://" in path:
        raise InputError(f"{path}: files of other formats are written to paths; copy them from there")
    if path.endswith(".zarr"):
        raise InputError(f"{path}: a Zarr is written by export_zarr")
    write = writer_for(path)
    if os.path.lexists(path):
        raise InputError(f"{path} exists: choose another output, or delete it")
    what = Written(box.shape, volume.dtype, volume.voxel_nm)
    stem, dot, suffix = os.path.basename(path).partition(".")
    unfinished = os.path.join(os.path.dirname(path), f".{stem}.{os.getpid()}.partial{dot}{suffix}")
    try:
        write(unfinished, what, _planes(volume, box, progressed))
        os.rename(unfinished, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            os.unlink(unfinished)


def _planes(volume: Volume, box: Box, progressed: Callable[[int, int], None] | None) -> Iterator[NDArray[Any]]:
    """Slice after slice; while one band of them is written, the next is read."""
    height, width = box.shape[1:]
    fitting = max(1, BAND_BYTES // (height * width * volume.itemsize))
    depth = min(volume.chunk[0], fitting)
    bands = (Box(span, box.y, box.x) for span in cells_along(box.z, depth))  # so that no chunk is read twice
    done = 0
    for voxels in read_ahead(partial(read_box, volume), bands):
        for plane in voxels:
            yield plane
            done += 1
            if progressed is not None:
                progressed(done, len(box.z))
