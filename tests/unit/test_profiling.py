"""What a run's profile says, and which bottleneck it names."""

from __future__ import annotations

import pytest

from nrrn_pipeline.ledger import Record
from nrrn_pipeline.profiling import STAGES, Profile
from nrrn_pipeline.progress import Progress


def record(worker: str = "a:1", **spent: float) -> Record:
    return Record("z0-y0-x0", 8, sum(spent.values()), 0.0, worker, 1, {}, spent, "float16; 0.01")


def profile_of(*records: Record, seconds: float = 10.0) -> Profile:
    """Of a run that measured statistics for 2 s, and then denoised so long."""
    profile = Profile()
    profile.add(Progress("statistics", 1, 1), 2.0)
    profile.add(Progress("denoising", 0, len(records)), 2.5)
    for number, each in enumerate(records, start=1):
        progress = Progress("denoising", number, len(records), record=each)
        profile.add(progress, 2.5 + seconds * number / len(records))
    return profile


def test_seconds_are_summed_by_stage_and_shared_by_workers() -> None:
    profile = profile_of(record(network=4, fetch=1), record("b:2", network=3.5, decode=0.5))
    assert profile.spent == {"network": 7.5, "fetch": 1, "decode": 0.5}
    assert (profile.statistics_s, profile.slabs_s) == (2.5, 10.0)
    assert profile.computing == pytest.approx(7.5 / 20)
    rows = profile.rows()
    assert rows["statistics and start"] == "2.5 s"
    assert rows["denoising"] == "10.0 s of 2 workers, together 20.0 s; of these, in part side by side"
    assert rows["  network"].split()[:3] == ["7.5", "s", "37.5%"]
    assert [row for row in rows if row.startswith("  ")] == ["  fetch", "  decode", "  network"]
    facts = profile.facts()
    assert (facts["workers"], facts["spent_s"], facts["arithmetic"]) == (2, profile.spent, ["float16; 0.01"])


@pytest.mark.parametrize(
    ("spent", "bottleneck"),
    [
        ({"network": 9.0, "wait": 30.0}, "network: workers compute 90% of the time"),
        ({"network": 4.0, "prepare": 5.0}, "prepare: workers compute 90% of the time"),
        (
            {"network": 4.0, "fetch": 5.0, "decode": 1.0},
            "fetch: waiting for storage to give voxels; workers compute only 40%",
        ),
        (
            {"network": 4.0, "store": 2.0, "encode": 4.0, "wait": 9.0},
            "encode: encoding chunks; workers compute only 40%",
        ),
        ({"network": 5.0, "fetch": 0.1}, "none in a slab: workers compute 50% of the time, and have too few slabs"),
    ],
)
def test_the_bottleneck_is_named(spent: dict[str, float], bottleneck: str) -> None:
    assert profile_of(record(**spent)).bottleneck().startswith(bottleneck)


def test_a_run_that_did_nothing_has_no_bottleneck() -> None:
    profile = Profile()
    profile.add(Progress("denoising", 5, 5), 0.1)
    assert profile.bottleneck() == "none: no slab was done"
    assert profile.rows()["bottleneck"] == profile.bottleneck()
    assert profile.computing == 0


def test_noise_and_filters_have_no_network() -> None:
    assert profile_of(record(prepare=1.0, fetch=8.0)).bottleneck().startswith("fetch: ")


def test_every_stage_of_a_slab_has_words() -> None:
    assert {"load", "fetch", "decode", "wait", "network", "prepare", "encode", "store"} == STAGES.keys()
