"""Processes that share a run, killed or told to end, whenever: together they leave the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from nrrn_pipeline import Options, denoise, storage, verify
from nrrn_pipeline.ledger import Ledger
from tests.faults.drivers import Driver, nursery
from tests.faults.test_kills import LAYOUT, SLABS, Undisturbed, done_again, records, wait_for_records
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

KILLS = int(os.environ.get("NRRN_KILLS", "6"))  # random ones, in each place
MEMBERS = 3
IN_FLIGHT = 2  # slabs of one member: one computes, one is read or written
BUCKET = "shared-kills"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("shared-kills")
    bare_zarr(folder / "in.zarr", image_like((40, 100, 200)), chunks=(8, 64, 64))
    tiny_weights(folder / "w.safetensors", units=1, channels=8)
    options = Options(layout=LAYOUT, cluster="serial", device="cpu")
    denoise(folder / "in.zarr", folder / "whole.zarr", folder / "w.safetensors", options)
    with nursery(tmp_path_factory.mktemp("drivers")) as drivers:
        yield Undisturbed(folder, stored_chunks(folder / "whole.zarr/0"), drivers)


def files_of(output: str | Path, folder: str) -> set[str]:
    return set(storage.list_sizes(f"{output}/0/nrrn/{folder}"))


def assert_nobody_left_anything(output: str | Path) -> None:
    for folder in ("members", "claims", "measured", "failed"):
        assert files_of(output, folder) == set(), folder
    assert not [name for name in storage.list_tree(str(output), partials=True) if name.endswith(".partial")]


@dataclass
class Shared:
    """A run of MEMBERS processes, of which any that has ended can be started again."""

    undisturbed: Undisturbed
    output: str
    environment: dict[str, str] | None

    def __post_init__(self) -> None:
        self.drivers = [self.started(number) for number in range(MEMBERS)]

    def started(self, number: int) -> Driver:
        share = ("--shard-of", f"{number}/{MEMBERS}")
        return self.undisturbed.start(self.output, *share, environment=self.environment)

    def kill_one(self, rng: random.Random) -> str:
        """At a random moment; it is started again, or not yet, by chance."""
        number = rng.randrange(MEMBERS)
        if self.drivers[number].poll() is not None:
            self.drivers[number] = self.started(number)
        done, moment = len(Ledger(f"{self.output}/0").done()), rng.choice(["start", "measured", "records", "records"])
        if moment == "records":
            wait_for_records(self.drivers[number], self.output, done + rng.randrange(1, 8))
        while moment == "measured" and self.drivers[number].poll() is None and not files_of(self.output, "measured"):
            if records(self.output):
                break  # that is long over
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5 if moment == "start" else 0.05))
        self.drivers[number].kill()
        if rng.random() < 0.5:
            self.drivers[number] = self.started(number)
        return f"{number} at {moment}, {done} slabs done"


@pytest.mark.parametrize("place", ["path", "s3"])
def test_random_kills_of_members_cost_no_more_than_what_was_in_flight_and_never_a_byte(
    undisturbed: Undisturbed, place: str, request: pytest.FixtureRequest
) -> None:
    rng, kills, round_ = random.Random(place), KILLS, 0
    with ExitStack() as stack:
        store: ObjectStore | None = None
        if place == "s3":
            store = stack.enter_context(request.getfixturevalue("seaweed").in_use())
            store.make_bucket(BUCKET)
        while kills > 0:
            round_ += 1
            name = f"random-{round_}.zarr"
            url = f"s3://{BUCKET}/{name}" if store else str(undisturbed.folder / name)
            run, killed, before = Shared(undisturbed, url, store.environment if store else None), [], records(url)
            for _ in range(min(kills, rng.randrange(2, 5))):
                killed.append(run.kill_one(rng))
                kills -= 1
                now = records(url)
                assert len(done_again(before, now)) <= IN_FLIGHT, killed
                before = now
            last = [driver if driver.poll() is None else run.started(n) for n, driver in enumerate(run.drivers)]
            for driver in last:
                assert driver.wait() == 0, (killed, driver.err)
            assert len(done_again(before, records(url))) <= IN_FLIGHT * len(killed), killed
            objects = store.listing(BUCKET, f"{name}/0") if store else stored_chunks(Path(url) / "0")
            assert {key: data for key, data in objects.items() if key.startswith("c/")} == undisturbed.chunks, killed
            assert verify(url, deep=True) == []
            assert_nobody_left_anything(url)


def test_members_that_start_at_the_same_moment_begin_one_run(undisturbed: Undisturbed) -> None:
    for attempt in range(4):
        run = Shared(undisturbed, str(undisturbed.folder / f"at once {attempt}.zarr"), None)
        for driver in run.drivers:
            undisturbed.assert_ends_whole(driver, Path(run.output))
        assert_nobody_left_anything(run.output)


def test_what_a_killed_member_held_is_done_by_the_others_at_once(undisturbed: Undisturbed) -> None:
    run = Shared(undisturbed, str(undisturbed.folder / "taken over.zarr"), None)
    wait_for_records(run.drivers[0], run.output, 4)
    run.drivers[0].kill()
    for driver in run.drivers[1:]:  # on one machine nobody waits a minute for its sign of life
        undisturbed.assert_ends_whole(driver, Path(run.output))
    assert_nobody_left_anything(run.output)


@pytest.mark.parametrize("whom", ["driver", "all"])
@pytest.mark.parametrize("words", [("--cluster", "serial"), ("--workers", "2"), ("--shard-of", "0/1")])
def test_sigterm_ends_a_run_in_order_and_the_same_command_goes_on(
    undisturbed: Undisturbed, words: tuple[str, ...], whom: str
) -> None:
    output = undisturbed.folder / f"sigterm {words[1].replace('/', ' ')} {whom}.zarr"
    driver = undisturbed.start(str(output), *words)
    wait_for_records(driver, output, 3)
    assert driver.poll() is None
    (os.kill if whom == "driver" else os.killpg)(driver.pid, signal.SIGTERM)  # some systems tell all, some the first
    assert driver.wait() == 143, driver.err
    assert "Traceback" not in driver.err
    assert "interrupted; what is done is kept: run the same command again to go on" in driver.err
    for folder in ("members", "claims"):
        assert files_of(output, folder) == set(), folder
    kept = records(output)
    assert 3 <= len(kept) < SLABS
    again = undisturbed.start(str(output), "--cluster", "serial")
    undisturbed.assert_ends_whole(again, output)
    assert f"{len(kept)} of them done before" in again.out
    assert "waiting for another driver" not in again.err
    assert not done_again(kept, records(output))


def test_sigterm_again_and_again_does_not_break_off_the_cleaning_up(undisturbed: Undisturbed) -> None:
    output = undisturbed.folder / "impatient.zarr"
    driver = undisturbed.start(str(output), "--shard-of", "0/1")
    wait_for_records(driver, output, 3)
    while driver.poll() is None:
        os.kill(driver.pid, signal.SIGTERM)
        time.sleep(0.002)
    assert driver.status == 143, driver.err
    assert "Traceback" not in driver.err
    assert files_of(output, "members") | files_of(output, "claims") == set()


def test_ctrl_c_keeps_its_exit_status(undisturbed: Undisturbed) -> None:
    output = undisturbed.folder / "ctrl c.zarr"
    driver = undisturbed.start(str(output), "--shard-of", "0/1")
    wait_for_records(driver, output, 3)
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait() == 130, driver.err
    assert files_of(output, "members") | files_of(output, "claims") == set()


def the_first_at_work(run: Shared) -> Driver:
    """Any member that has recorded a slab: one that starts late may find nothing left to do."""
    while True:
        found = b"".join(record or b"" for record in records(run.output).values())
        for driver in run.drivers:
            if f':{driver.pid}"'.encode() in found:
                return driver
            assert driver.poll() is None, driver.err
        time.sleep(0.005)


def test_a_member_that_is_told_to_end_leaves_its_share_to_the_others(undisturbed: Undisturbed) -> None:
    run = Shared(undisturbed, str(undisturbed.folder / "left.zarr"), None)
    first = the_first_at_work(run)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 143, first.err
    kept = records(run.output)
    for driver in run.drivers:
        if driver is not first:
            undisturbed.assert_ends_whole(driver, Path(run.output))
    assert not done_again(kept, records(run.output))
    assert_nobody_left_anything(run.output)
