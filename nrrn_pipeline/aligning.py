"""How a volume's slices drift, and a volume whose slices do not, in one call each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from nrrn_pipeline.align_plan import AlignPlan, Moves, parse_moves, plan_align
from nrrn_pipeline.api import RunWatch, Summary, run_planned
from nrrn_pipeline.drift import Drift
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.options import Options
from nrrn_pipeline.places import absolute
from nrrn_pipeline.preparing import Location
from nrrn_pipeline.run import check_output
from nrrn_pipeline.slabs import refuse_outside
from nrrn_pipeline.volume import Volume, open_volume
from nrrn_pipeline.volume_drift import measure_volume_drift

Measure = Callable[[Volume, Box], Drift]


def measure_drift(source: Location, level: int = 0, roi: Box | None = None) -> Drift:
    """How the slices of a volume, or its part `roi`, are shifted against each other, in voxels along y and x.

    Reads four crops of 512 x 512 voxels of each slice. Raises InputError for a single slice, or too small ones.
    """
    return measure_volume_drift(open_volume(source, level), roi)


def align(
    source: Location,
    output: Location,
    undo_trend: bool = False,
    options: Options | None = None,
    watch: RunWatch | None = None,
) -> Summary:
    """A volume whose slices are moved back by whole voxels, cut to what all of them have; called again, it goes on.

    Jitter and jumps are undone. The trend is kept, as structure that slants looks just like slow drift and would be
    straightened; `undo_trend` undoes it too. Voxels are copied, none is interpolated: noise stays white. On resume the
    moves are those that the output was begun with. Of options, method, device, tile, halo and share do not count.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Raises InputError, with nothing written, if drift cannot be measured, or less than half of a slice would be left;
    RunError or SlabsFailedError if it broke off, and what is done is kept.
    """
    options = options or Options()
    return run_planned(planned(source, output, undo_trend, options), options, watch or RunWatch())


def planned(
    source: Location, output: Location, undo_trend: bool, options: Options, measure: Measure = measure_volume_drift
) -> AlignPlan:
    """The plan of what align would do; measures drift unless the output is begun. Raises InputError where it would."""
    volume, url = open_volume(source, options.level), absolute(output)
    part = options.roi or volume.box
    refuse_outside(part, volume.box)
    plan = partial(plan_align, volume, url, part, undo_trend=undo_trend, layout=options.layout)
    moves = None if options.overwrite else _begun_moves(url, len(part.z))
    if moves is None:
        check_output(plan(moves=((0, 0),) * len(part.z)), options.overwrite)  # before it takes long
        moves = moves_of(measure(volume, part), volume.url, undo_trend)
    return plan(moves=moves)


def moves_of(drift: Drift, url: str, undo_trend: bool = False) -> Moves:
    """Whole voxels by which each slice is moved back. Raises InputError if nothing is known of most slices."""
    if not drift.told:
        raise InputError(
            f"{url} cannot be aligned: most slices share no structure with the two before them that noise does not hide"
        )
    return tuple((int(y), int(x)) for y, x in drift.moves(undo_trend))


def _begun_moves(url: str, slices: int) -> Moves | None:
    """Those that an output was begun with: measured anew on another processor, one might be rounded otherwise."""
    with suppress(InputError, LookupError, TypeError, ValueError, OverflowError, AttributeError):  # told later
        return parse_moves((Ledger(f"{url}/0").settings() or {})["moves"], slices)
    return None
