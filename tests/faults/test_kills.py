"""Whatever is killed, whenever: the same command again ends in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest

from nrrn_pipeline import Layout, Options, denoise, storage, verify
from nrrn_pipeline.ledger import Ledger
from tests.faults.drivers import Driver, Nursery, nursery
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 64, 64), shard=(4, 64, 128), tile=64)
WORDS = ("--chunk", "4,64,64", "--shard", "4,64,128", "--tile", "64", "--device", "cpu", "--weights", "w.safetensors")
SLABS = 40
KILLS = int(os.environ.get("NRRN_KILLS", "6"))  # random ones, in all
CASES = [("serial", "path"), ("serial", "s3"), ("local", "path"), ("local", "s3")]
BUCKET = "kills"


@dataclass(frozen=True)
class Undisturbed:
    """A folder with a volume and weights; what a run that nothing happened to makes of them; and the means to start."""

    folder: Path
    chunks: dict[str, bytes]
    nursery: Nursery

    def start(self, output: str, *options: str, environment: dict[str, str] | None = None) -> Driver:
        return self.nursery.start(self.folder, "denoise", "in.zarr", output, *WORDS, *options, environment=environment)

    def assert_ends_whole(self, driver: Driver, output: Path) -> None:
        assert driver.wait() == 0, driver.err
        assert stored_chunks(output / "0") == self.chunks
        assert verify(output, deep=True) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("kills")
    bare_zarr(folder / "in.zarr", image_like((40, 100, 200)), chunks=(8, 64, 64))
    tiny_weights(folder / "w.safetensors", units=1, channels=8)
    options = Options(layout=LAYOUT, cluster="serial", device="cpu")
    summary = denoise(folder / "in.zarr", folder / "whole.zarr", folder / "w.safetensors", options)
    assert summary.slabs == SLABS
    with nursery(tmp_path_factory.mktemp("drivers")) as drivers:
        yield Undisturbed(folder, stored_chunks(folder / "whole.zarr/0"), drivers)


def records(output: str | Path) -> dict[str, bytes | None]:
    """What is in every record, by its name; a slab that was done again has another time in it."""
    folder = f"{output}/0/nrrn/slabs"
    return {name: storage.read_file(f"{folder}/{name}") for name in storage.list_sizes(folder)}


def done_again(before: dict[str, bytes | None], now: dict[str, bytes | None]) -> set[str]:
    """Keys of the slabs whose records are others than they were, or gone."""
    kept = before.items() & now.items()
    keys = {name.partition(".")[0] for name, _ in before.items()}
    changed = {name.partition(".")[0] for name, _ in (before.items() | now.items()) - kept}
    return keys & changed


def wait_for_records(driver: Driver, output: str | Path, count: int) -> None:
    ledger = Ledger(f"{output}/0")
    while driver.poll() is None and len(ledger.done()) < count:
        time.sleep(0.01)


def workers_of(driver: Driver) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(driver.pid).children(recursive=True)
        return [child for child in children if any("spawn_main" in word for word in child.cmdline())]
    return []


@dataclass
class Killer:
    """Kills a driver, or one of its workers, at a random moment of its life."""

    rng: random.Random
    output: str
    killed: list[str] = field(default_factory=list)

    def strike(self, driver: Driver, workers: bool) -> None:
        done = len(Ledger(f"{self.output}/0").done())
        moment = self.rng.choice(["start", "plan", "records", "records"])
        if moment == "plan":
            while driver.poll() is None and not Ledger(f"{self.output}/0").begun():
                time.sleep(0.002)
        elif moment == "records":
            wait_for_records(driver, self.output, done + self.rng.randrange(1, 8))
        time.sleep(self.rng.uniform(0, 0.5 if moment == "start" else 0.05))
        victim = "worker" if workers and self.rng.random() < 0.5 else "driver"
        while victim == "worker" and driver.poll() is None:
            if found := workers_of(driver):
                self.rng.choice(found).kill()
                break
            time.sleep(0.01)
        else:
            driver.kill()
        self.killed.append(f"{victim} at {moment}, {done} slabs done")


@pytest.mark.parametrize(("cluster", "place"), CASES)
def test_random_kills_cost_no_more_than_what_was_in_flight_and_never_a_byte(
    undisturbed: Undisturbed, cluster: str, place: str, request: pytest.FixtureRequest
) -> None:
    index = CASES.index((cluster, place))
    kills = KILLS // len(CASES) + (index < KILLS % len(CASES))
    in_flight = {"serial": 0, "local": 2 * 2}[cluster]  # a serial run leaves nobody behind who goes on
    round_, rng = 0, random.Random(f"{cluster} {place}")
    with ExitStack() as stack:
        store: ObjectStore | None = None
        if place == "s3":
            store = stack.enter_context(request.getfixturevalue("seaweed").in_use())
            store.make_bucket(f"{BUCKET}-{cluster}")
        while kills > 0:
            round_ += 1
            name = f"random-{cluster}-{round_}.zarr"
            url = f"s3://{BUCKET}-{cluster}/{name}" if store else str(undisturbed.folder / name)
            killer = Killer(rng, url)
            environment = store.environment if store else None
            start = partial(undisturbed.start, url, "--cluster", cluster, "--workers", "2", environment=environment)
            driver, before = start(), records(url)
            for _ in range(min(kills, rng.randrange(2, 6))):
                if driver.poll() is not None:
                    driver = start()
                killer.strike(driver, workers=cluster == "local")
                kills -= 1
                now = records(url)
                assert len(done_again(before, now)) <= in_flight, killer.killed
                before = now
            if driver.poll() is None:  # of it only workers were killed
                began = (
                    driver.wait() == 0 or "local workers could not start" in driver.err
                )  # one was killed at its birth
                assert began, (killer.killed, driver.err)
                now = records(url)
                assert len(done_again(before, now)) <= in_flight, killer.killed
                before = now
            last = start()
            assert last.wait() == 0, (killer.killed, last.err)
            assert len(done_again(before, records(url))) <= in_flight, killer.killed
            objects = store.listing(f"{BUCKET}-{cluster}", f"{name}/0") if store else stored_chunks(Path(url) / "0")
            found = {key: data for key, data in objects.items() if key.startswith("c/")}
            assert found == undisturbed.chunks, killer.killed
            assert verify(url, deep=True) == []


@pytest.mark.parametrize("marker", ["0/nrrn/plan.json", "0/nrrn/statistics.json", "0/nrrn/drivers", "0/zarr.json"])
def test_killed_before_the_first_slab_leaves_an_output_that_can_be_resumed(
    undisturbed: Undisturbed, marker: str
) -> None:
    output = undisturbed.folder / f"early {marker.replace('/', ' ')}.zarr"
    driver = undisturbed.start(str(output), "--cluster", "serial")
    while driver.poll() is None and not (output / marker).exists():
        time.sleep(0.001)
    driver.kill()
    assert not records(output)
    undisturbed.assert_ends_whole(undisturbed.start(str(output), "--cluster", "serial"), output)


def test_a_killed_driver_takes_its_workers_along_and_the_next_goes_on_at_once(undisturbed: Undisturbed) -> None:
    output = undisturbed.folder / "driver.zarr"
    driver = undisturbed.start(str(output), "--workers", "2")
    wait_for_records(driver, output, 3)
    workers = psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) >= 2
    driver.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    kept = len(Ledger(f"{output}/0").done())
    again = undisturbed.start(str(output), "--cluster", "serial")
    undisturbed.assert_ends_whole(again, output)
    assert "waiting for another driver" not in again.err
    assert f"{kept} of them done before" in again.out


def test_a_killed_worker_is_replaced_and_the_run_ends_whole(undisturbed: Undisturbed) -> None:
    output = undisturbed.folder / "worker.zarr"
    driver = undisturbed.start(str(output), "--workers", "2")
    wait_for_records(driver, output, 2)
    workers_of(driver)[0].kill()
    undisturbed.assert_ends_whole(driver, output)


@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_ctrl_c_stops_at_once_and_leaves_a_resumable_output(undisturbed: Undisturbed, cluster: str) -> None:
    output = undisturbed.folder / f"interrupted_{cluster}.zarr"
    driver = undisturbed.start(str(output), "--cluster", cluster, "--workers", "2")
    wait_for_records(driver, output, 3)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the driver and all of its workers
    assert driver.wait() == 130
    assert "Traceback" not in driver.err
    assert "interrupted; what is done is kept: run the same command again to go on" in driver.err
    kept = records(output)
    assert 3 <= len(kept) < SLABS
    again = undisturbed.start(str(output), "--cluster", "serial")
    undisturbed.assert_ends_whole(again, output)
    assert f"{len(kept)} of them done before" in again.out
    assert not done_again(kept, records(output))


def test_a_shard_torn_by_the_system_does_not_fail_the_retry(undisturbed: Undisturbed) -> None:
    output = undisturbed.folder / "torn.zarr"
    driver = undisturbed.start(str(output), "--cluster", "serial")
    wait_for_records(driver, output, 2)
    driver.kill()
    for shard in [file for file in (output / "0/c").rglob("*") if file.is_file()]:
        shard.write_bytes(shard.read_bytes()[:40])
    for record in (output / "0/nrrn/slabs").glob("*.json"):
        record.unlink()
    undisturbed.assert_ends_whole(undisturbed.start(str(output), "--cluster", "serial"), output)
