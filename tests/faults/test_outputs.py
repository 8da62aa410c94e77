"""Outputs, sources and clusters that change under a run."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from nrrn_pipeline import InputError, Layout, Options, RunError, StorageError, api, denoise, presence, storage, verify
from nrrn_pipeline.geometry import boxes_of
from nrrn_pipeline.lease import Lease
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import DenoisePlan, plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner, run_serially
from nrrn_pipeline.slab import SlabTask, denoise_slab
from nrrn_pipeline.volume import get_provenance, open_volume, stored_units
from tests.support import bare_zarr, image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(2, 32, 32), shard=(4, 32, 64), tile=40)


@pytest.fixture
def plan(tmp_path: Path) -> DenoisePlan:
    source = bare_zarr(tmp_path / "in.zarr", image_like((12, 60, 100)))
    weights = describe_weights(tiny_weights(tmp_path / "w.safetensors"))
    return plan_denoise(open_volume(source), str(tmp_path / "out.zarr"), weights, LAYOUT)


def with_other_weights(plan: DenoisePlan, folder: Path) -> DenoisePlan:
    return replace(plan, denoiser=describe_weights(tiny_weights(folder / "other.safetensors", seed=9)))


def slabs_done_by(plan: DenoisePlan, overwrite: bool = False) -> int:
    """Runs a plan; how many slabs that took."""
    return sum(progress.record is not None for progress in run_plan(plan, run_serially, "cpu", overwrite))


def interrupted(plan: DenoisePlan, slabs: int) -> None:
    """Runs a plan until some slabs are done."""
    run = run_plan(plan, run_serially, "cpu")
    while slabs:
        slabs -= next(run).record is not None
    run.close()


def test_of_two_drivers_with_other_settings_the_later_is_refused(plan: DenoisePlan, tmp_path: Path) -> None:
    first, second = (run_plan(p, run_serially, "cpu") for p in (plan, with_other_weights(plan, tmp_path)))
    next(first), next(second)  # both have found the output free, and measure now
    while (progress := next(first)).record is None:
        assert progress.stage in ("statistics", "denoising")
    with pytest.raises(InputError, match="begun with other settings: weights sha256 was"):
        list(second)
    list(first)
    assert verify(plan.group_url) == []


def test_a_task_that_outlives_its_run_writes_nothing_into_the_next_runs_output(
    plan: DenoisePlan, tmp_path: Path
) -> None:
    slabs_done_by(plan)
    before = stored_chunks(Path(plan.target.url))
    late = with_other_weights(plan, tmp_path)
    statistics = Ledger(plan.target.url).statistics()
    assert statistics is not None
    slab = late.slabs[0]
    with pytest.raises(InputError, match="begun with other settings"):
        denoise_slab(late, "cpu", SlabTask(slab, statistics.of(slab.read.z)))
    assert stored_chunks(Path(plan.target.url)) == before


def test_overwrite_resumes_what_the_same_command_left_unfinished(plan: DenoisePlan) -> None:
    interrupted(plan, 5)
    assert slabs_done_by(plan, overwrite=True) == len(plan.slabs) - 5


def test_overwrite_starts_a_finished_output_again(plan: DenoisePlan) -> None:
    slabs_done_by(plan)
    assert slabs_done_by(plan, overwrite=True) == len(plan.slabs)


def test_overwrite_starts_an_unfinished_output_with_other_settings_again(plan: DenoisePlan, tmp_path: Path) -> None:
    interrupted(plan, 5)
    assert slabs_done_by(with_other_weights(plan, tmp_path), overwrite=True) == len(plan.slabs)


def test_a_record_whose_voxels_are_gone_is_not_believed(plan: DenoisePlan) -> None:
    slabs_done_by(plan)
    whole = stored_chunks(Path(plan.target.url))
    (Path(plan.target.url) / "c/1/0/0").unlink()
    (Path(plan.target.url) / "c/2/1/1").unlink()
    assert slabs_done_by(plan) == 2
    assert stored_chunks(Path(plan.target.url)) == whole
    shutil.rmtree(f"{plan.target.url}/c")
    assert slabs_done_by(plan) == len(plan.slabs)
    assert stored_chunks(Path(plan.target.url)) == whole


def test_the_units_that_storage_lists_are_those_that_were_written(plan: DenoisePlan) -> None:
    assert stored_units(plan.target) == {}
    slabs_done_by(plan)
    assert stored_units(plan.target).keys() == set(boxes_of(plan.target.box, plan.target.write_unit))


def test_a_source_that_changed_is_refused_on_resume(plan: DenoisePlan) -> None:
    interrupted(plan, 5)
    zarr.open_array(plan.source.url, mode="r+")[6] = np.full((60, 100), 7, np.uint8)
    with pytest.raises(InputError, match=r"in\.zarr has changed since .*out\.zarr was begun: slice z=6"):
        slabs_done_by(plan)


def test_an_output_that_is_deleted_under_the_run_ends_it(plan: DenoisePlan) -> None:
    run = run_plan(plan, run_serially, "cpu")
    while next(run).record is None:
        pass
    shutil.rmtree(plan.group_url)
    with pytest.raises(RunError, match=r"out\.zarr was deleted or moved under the run"):
        list(run)


def test_an_unfinished_output_says_so(plan: DenoisePlan) -> None:
    interrupted(plan, 1)
    assert (get_provenance(plan.group_url) or {})["state"] == "unfinished"
    slabs_done_by(plan)
    assert (get_provenance(plan.group_url) or {})["state"] == "complete"


def test_damage_to_the_metadata_is_found(plan: DenoisePlan) -> None:
    slabs_done_by(plan)
    metadata = Path(plan.target.url) / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"shape": [\n    12,', '"shape": [\n    8,'))
    problem = verify(plan.group_url)[0]
    assert problem.startswith("shape of the array is [8, 60, 100], but it was begun with [12, 60, 100]")


def test_a_record_that_a_power_failure_emptied_is_none(plan: DenoisePlan) -> None:
    slabs_done_by(plan)
    (record,) = (Path(Ledger(plan.target.url).url) / "slabs").glob("z4-y0-x0.*.json")
    record.write_bytes(b"")
    assert verify(plan.group_url) == ["slab z4-y0-x0: its record is cut short"]


def test_a_cluster_without_workers_ends_the_run_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrrn_pipeline.runners.POLL_S", 0.2)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        pytest.raises(RunError, match="the cluster has had no worker for 1 s: start some"),
    ):
        list(DaskRunner(client, patience_s=0.6)(abs, [1, 2]))


def test_a_path_that_the_terminal_cannot_show_ends_no_run(
    plan: DenoisePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a[/b] ünï.zarr"
    denoise(plan.source.url, output, plan.denoiser.path, Options(cluster="serial", layout=LAYOUT, device="cpu"))
    from nrrn_pipeline.cli import app

    app(["verify", str(output)], standalone_mode=False)
    assert f"{output} is whole" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_driver_killed_before_it_began_or_when_all_was_deleted_blocks_nobody(
    plan: DenoisePlan, overwrite: bool
) -> None:
    list(Lease(Ledger(plan.target.url).url).take())  # and no more: it is never released
    presence._held.clear()  # as in another process
    assert slabs_done_by(plan, overwrite) == len(plan.slabs)
    assert verify(plan.group_url, deep=True) == []


def test_a_driver_killed_while_it_wrote_its_very_first_file_blocks_nobody(plan: DenoisePlan) -> None:
    left = Path(Ledger(plan.target.url).url) / "drivers" / "0000001.json.0123.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"{")
    assert slabs_done_by(plan) == len(plan.slabs)
    assert not left.exists()


def test_a_folder_with_anything_else_is_not_taken_for_a_drivers(plan: DenoisePlan) -> None:
    for name in ("0/nrrn/drivers/0000001.json", "0/notes.partial"):
        file = Path(plan.group_url) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{")
    with pytest.raises(InputError, match="exists and was not made by nrrn"):
        slabs_done_by(plan)


def test_a_deletion_that_was_killed_half_way_is_gone_on_with(
    plan: DenoisePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs_done_by(plan)
    remove_file, removed = storage.remove_file, []

    def killed(url: str) -> None:
        removed.append(url)
        if len(removed) > 2:
            raise KeyboardInterrupt
        remove_file(url)

    monkeypatch.setattr(storage, "remove_file", killed)
    with pytest.raises(KeyboardInterrupt):
        slabs_done_by(plan, overwrite=True)
    monkeypatch.setattr(storage, "remove_file", remove_file)
    assert slabs_done_by(plan, overwrite=True) == len(plan.slabs)
    assert verify(plan.group_url, deep=True) == []


def test_an_output_is_deleted_only_under_its_lease(plan: DenoisePlan, tmp_path: Path) -> None:
    first = run_plan(plan, run_serially, "cpu")
    while next(first).record is None:
        pass
    with pytest.raises(InputError, match="another nrrn denoise is at work on this output"):
        slabs_done_by(with_other_weights(plan, tmp_path), overwrite=True)
    list(first)
    assert verify(plan.group_url, deep=True) == []


def test_an_error_is_never_taken_for_an_output_that_is_not_there(
    plan: DenoisePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs_done_by(plan)
    monkeypatch.setattr("nrrn_pipeline.retrying.FIRST_PAUSE_S", 0.0)

    def away(*_: object, **__: object) -> None:
        raise TimeoutError("away")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "info", away)
    with pytest.raises(StorageError, match="away; tried 8 times"):
        storage.exists(plan.group_url)


def test_a_shard_that_cannot_be_read_is_named_and_repaired(plan: DenoisePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs_done_by(plan)
    whole = stored_chunks(Path(plan.target.url))
    read_file, bad = storage.read_file, f"{plan.target.url}/c/1/0/0"

    def bad_sector(url: str, *place: int | None) -> bytes | None:
        if url == bad:
            raise StorageError(f"{url}: OSError: [Errno 5] Input/output error; tried 8 times")
        return read_file(url, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "read_file", bad_sector)
    (problem,) = verify(plan.group_url, deep=True)
    assert problem.startswith("slab z4-y0-x0: cannot be read (")
    problems, summary = api.repair(plan.group_url, options=Options(cluster="serial", device="cpu"))
    assert problems == [problem]
    assert summary is not None
    assert summary.resumed == summary.slabs - 1
    monkeypatch.setattr(storage, "read_file", read_file)
    assert verify(plan.group_url, deep=True) == []
    assert stored_chunks(Path(plan.target.url)) == whole


def test_a_slab_done_twice_is_whole_if_either_record_fits(plan: DenoisePlan) -> None:
    slabs_done_by(plan)
    ledger = Ledger(plan.target.url)
    (record,) = ledger.records("z4-y0-x0")
    others = {name: (size, "0" * 16) for name, (size, _) in record.objects.items()}
    ledger.put(replace(record, objects=others, worker="a worker with a longer name: and so another file"))
    assert len(ledger.records("z4-y0-x0")) == 2
    assert verify(plan.group_url, deep=True) == []


@pytest.mark.parametrize("refused", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_hard_links_a_new_file_is_still_only_the_firsts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(refused, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert storage.write_new_file(f"{tmp_path}/new", b"first")
    assert not storage.write_new_file(f"{tmp_path}/new", b"second")
    assert storage.read_file(f"{tmp_path}/new") == b"first"
