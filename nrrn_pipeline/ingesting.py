"""From the microscope's files to an OME-Zarr volume, in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nrrn_pipeline.api import RunWatch, Summary, run_planned
from nrrn_pipeline.formats import find_stack
from nrrn_pipeline.ingest_plan import IngestPlan, plan_ingest
from nrrn_pipeline.ome import Triple
from nrrn_pipeline.options import Options
from nrrn_pipeline.preparing import Location


@dataclass(frozen=True)
class Intake:
    """What to make of files. voxel_nm: z, y, x, if they do not say, or not rightly.

    dtype: uint8, uint16 or float32, which must hold every voxel (default: the files' own). dataset: of HDF5 and N5.
    lacking: what to do about slices that are missing, cut short or unlike the others: refuse, blank, skip.
    """

    voxel_nm: Triple | None = None
    dtype: str | None = None
    dataset: str | None = None
    lacking: str = "refuse"


def ingest(
    sources: Location | Sequence[Location],
    output: Location,
    intake: Intake = Intake(),
    options: Options | None = None,
    watch: RunWatch | None = None,
) -> Summary:
    """Bring slices or volumes into a new OME-Zarr 0.5 group; called again after any interruption, it goes on.

    sources: a folder of slices (TIFF, PNG), files of them, or a volume (TIFF, MRC, HDF5, N5, .npy, Zarr); several are
    taken one after the other, in natural order. Each slice's mean and std are kept with the output, and denoise reads
    it once less. Of options, method, device, roi, tile and halo do not count.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError, with nothing written, naming files that do not fit together; RunError or SlabsFailedError if a
    file cannot be read, and what is done is kept.
    """
    options = options or Options()
    return run_planned(planned(sources, output, intake, options), options, watch or RunWatch())


def planned(sources: Location | Sequence[Location], output: Location, intake: Intake, options: Options) -> IngestPlan:
    """The plan of what ingest would do. Raises InputError where it would."""
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    stack = find_stack(several, intake.dataset, intake.lacking, options.level)
    return plan_ingest(stack, str(output), intake.voxel_nm, intake.dtype, options.layout)
