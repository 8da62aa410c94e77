"""What a cluster's workers lack is named before a run starts, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from nrrn_pipeline import InputError, Layout, Options, api, denoise, runners, verify
from nrrn_pipeline.cluster import AddressSettings, LocalSettings, checks
from nrrn_pipeline.cluster.checks import refuse_unfit_workers
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.runners import DaskRunner
from nrrn_pipeline.trial import rows_of, try_cluster
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(2, 32, 32), shard=(2, 32, 32), tile=32)
HIDDEN = "import sys; sys.modules['nrrn_pipeline'] = None; from dask.__main__ import main; main()"


@contextmanager
def running(folder: Path, *command: str) -> Iterator[None]:
    environment = {**os.environ, "DASK_TEMPORARY_DIRECTORY": str(folder)}
    with open(folder / f"{time.monotonic_ns()}.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("scheduler")
    told = folder / "scheduler.json"
    words = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(told))
    with running(folder, sys.executable, "-m", "dask", "scheduler", *words):
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text().endswith("}")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield str(json.loads(told.read_text())["address"])


@contextmanager
def worker(scheduler: str, folder: Path, *words: str, before: tuple[str, ...] = (), code: str = "") -> Iterator[None]:
    """A worker of its own, started through `before`; gone at the end, and forgotten by the scheduler."""
    python = [sys.executable, "-c", code] if code else [sys.executable, "-m", "dask"]
    common = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--no-nanny", "--death-timeout", "60")
    with Client(scheduler) as client:
        others = len(client.scheduler_info(n_workers=-1)["workers"])
        with running(folder, *before, *python, "worker", scheduler, *common, *words):
            client.wait_for_workers(others + 1, timeout=60)
            yield
        while len(client.scheduler_info(n_workers=-1)["workers"]) > others:
            time.sleep(0.05)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    bare_zarr(tmp_path / "raw.zarr", image_like((4, 32, 32)))
    tiny_weights(tmp_path / "w.safetensors")
    return tmp_path


def run(lab: Path, cluster: str, device: str = "cpu", output: Path | None = None) -> api.Summary:
    options = Options(cluster=cluster, layout=LAYOUT, device=device)
    return denoise(lab / "raw.zarr", output or lab / "out.zarr", lab / "w.safetensors", options)


def refused(lab: Path, cluster: str, device: str = "cpu") -> str:
    before = sorted(lab.rglob("*"))
    with pytest.raises(InputError) as error:
        run(lab, cluster, device)
    assert not (lab / "out.zarr").exists()
    assert sorted(path for path in lab.rglob("*") if path.suffix != ".log") == [p for p in before if p.suffix != ".log"]
    return str(error.value)


def test_a_worker_that_lacks_nothing_is_used(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    with worker(scheduler, tmp_path_factory.mktemp("worker")):
        run(lab, scheduler)
        assert verify(lab / "out.zarr") == []
        assert not list(lab.rglob("*.probe*"))


def test_a_gpu_that_is_asked_for_and_is_not_there_is_named(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    with worker(scheduler, tmp_path_factory.mktemp("worker"), "--resources", "GPU=1"):
        assert "no GPU there, but --device cuda" in refused(lab, scheduler, "cuda")
        assert "no GPU there, but its job has 1 GPU" in refused(lab, scheduler, "auto")
        run(lab, scheduler, "cpu")


@pytest.mark.parametrize(("hidden", "named"), [("raw.zarr", "the source is not there"), ("", "")])
def test_storage_that_a_worker_does_not_see_is_named(
    lab: Path, scheduler: str, tmp_path_factory: Any, hidden: str, named: str
) -> None:
    """On its own machine the folder is another, as /tmp is on each."""
    shadow = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {lab / hidden}; exec "$@"', "sh")
    with worker(scheduler, tmp_path_factory.mktemp("worker"), before=shadow):
        said = refused(lab, scheduler)
    assert "1 of 1 workers cannot do this run" in said
    assert named or "the source is not there" in said
    assert "use a path that all machines share, or object storage" in said


def test_an_output_folder_that_is_another_one_there_is_named(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    outputs = lab / "outputs"
    outputs.mkdir()
    shadow = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {outputs}; exec "$@"', "sh")
    with (
        worker(scheduler, tmp_path_factory.mktemp("worker"), before=shadow),
        pytest.raises(InputError, match=r"the output .*outputs.* is another folder there, or none"),
    ):
        run(lab, scheduler, output=outputs / "out.zarr")
    assert list(outputs.iterdir()) == []


def test_a_worker_without_the_package_is_named(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    with worker(scheduler, tmp_path_factory.mktemp("worker"), code=HIDDEN):
        assert "nrrn_pipeline is not installed there" in refused(lab, scheduler)


def test_other_versions_are_named_before_the_run(
    lab: Path, scheduler: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**runners.versions(), "zarr": "3.0.0"}
    monkeypatch.setattr(checks, "versions", lambda: other)
    with worker(scheduler, tmp_path_factory.mktemp("worker")):
        said = refused(lab, scheduler)
    assert re.search(r"it has zarr \S+ instead of 3\.0\.0: install the driver's versions there", said)


def test_a_worker_of_other_versions_that_comes_later_ends_the_run_with_a_word(
    scheduler: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = runners.versions()
    monkeypatch.setattr(runners, "versions", lambda: {**own, "torch": "1.0"})
    with (
        worker(scheduler, tmp_path_factory.mktemp("worker")),
        Client(scheduler) as client,
        pytest.raises(InputError, match=r"it has torch \S+ instead of 1\.0"),
    ):
        list(DaskRunner(client)(abs, [1]))


def test_a_trial_says_what_was_found_and_leaves_nothing(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    before = sorted(lab.rglob("*"))
    with ExitStack() as stack:
        stack.enter_context(worker(scheduler, tmp_path_factory.mktemp("worker")))
        found = try_cluster(AddressSettings(address=scheduler), str(lab), "cpu")
    assert sorted(lab.rglob("*")) == before
    assert found.difference == 0
    assert abs(found.clock_skew_s) < 1
    rows = rows_of(found)
    assert rows["GPU"] == "none"
    assert "the same here" in rows["versions"]


def test_a_trial_on_local_workers_starts_one(lab: Path) -> None:
    found = try_cluster(LocalSettings(workers=2), str(lab), "cpu")
    assert found.record.worker
    assert found.difference <= 1


def test_a_clock_that_is_off_is_pointed_at(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr("nrrn_pipeline.trial.time.time", lambda: now() + 3600)
    found = try_cluster(LocalSettings(workers=1), str(lab), "cpu")
    assert rows_of(found)["clock"].endswith("set the machines' clocks")


def test_a_trial_where_nothing_can_be_written_is_refused(lab: Path) -> None:
    with pytest.raises(InputError, match=r"^no trial can be written to .*w\.safetensors: Not a directory; choose an"):
        try_cluster(LocalSettings(workers=1), str(lab / "w.safetensors"), "cpu")


def test_a_trial_in_a_folder_that_is_new_takes_it_away_again(lab: Path) -> None:
    try_cluster(LocalSettings(workers=1), str(lab / "new/folder"), "cpu")
    assert not (lab / "new").exists()


def test_bytes_are_those_of_a_serial_run(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    with worker(scheduler, tmp_path_factory.mktemp("worker")):
        run(lab, scheduler)
    options = Options(cluster="serial", layout=LAYOUT, device="cpu")
    denoise(lab / "raw.zarr", lab / "serial.zarr", lab / "w.safetensors", options)
    assert stored_chunks(lab / "out.zarr/0") == stored_chunks(lab / "serial.zarr/0")


def test_all_workers_are_asked(lab: Path, scheduler: str, tmp_path_factory: Any) -> None:
    plan = make_plan(lab / "raw.zarr", lab / "out.zarr", lab / "w.safetensors", Options(layout=LAYOUT))
    with (
        worker(scheduler, tmp_path_factory.mktemp("worker")),
        worker(scheduler, tmp_path_factory.mktemp("worker"), code=HIDDEN),
        Client(scheduler) as client,
        pytest.raises(InputError, match="1 of 2 workers cannot do this run"),
    ):
        refuse_unfit_workers(client, [plan], "cpu")
