"""Levels of lower resolution: means, whatever the cut; valid for every reader; whole again after whatever happens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v05 import Image as Image05

from nrrn_pipeline import (
    Following,
    InputError,
    Intake,
    Layout,
    Method,
    Options,
    add_levels,
    denoise,
    follow,
    ingest,
    repair,
    status,
    verify,
)
from nrrn_pipeline.errors import RunError
from nrrn_pipeline.geometry import Box, Span
from nrrn_pipeline.ingest_plan import IngestPlan
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.pyramid import PyramidPlan, plan_pyramid
from nrrn_pipeline.volume import Volume, count_levels, open_volume
from tests.commands import Nrrn
from tests.servers import ObjectStore
from tests.support import bare_zarr, breaks_off, image_like, tiny_weights

SMALL = Options(layout=Layout(chunk=(4, 8, 8), shard=(8, 16, 16)), cluster="serial")
VOXELS = image_like((21, 50, 71))


def volume_of(folder: Path, voxels: NDArray[Any] = VOXELS, nm: tuple[float, float, float] = (5, 5, 5)) -> Path:
    """An OME-Zarr volume in small shards."""
    np.save(folder / "a.npy", voxels)
    ingest(folder / "a.npy", folder / "a.zarr", Intake(voxel_nm=nm), SMALL)
    return folder / "a.zarr"


def open_levels(path: Path) -> list[Volume]:
    return [open_volume(path, number) for number in range(count_levels(path))]


def level(path: Path | str, number: int) -> NDArray[Any]:
    return zarr.open_array(f"{path}/{number}", mode="r")[:]


def means(voxels: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    """Straight from the definition."""
    shape = [-(-length // factor) for length, factor in zip(voxels.shape, factors, strict=True)]
    found = np.empty(shape)
    for place in np.ndindex(*shape):
        cell = tuple(slice(at * factor, (at + 1) * factor) for at, factor in zip(place, factors, strict=True))
        found[place] = voxels[cell].mean(dtype=np.float64)
    return np.floor(found + 0.5).astype(voxels.dtype) if voxels.dtype.kind == "u" else found.astype(voxels.dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_each_voxel_is_the_mean_of_those_that_it_covers(tmp_path: Path, dtype: str) -> None:
    voxels = image_like((21, 50, 71), dtype)
    path = volume_of(tmp_path, voxels)
    assert add_levels(path, SMALL) == 4
    shapes = [each.shape for each in open_levels(path)]
    assert shapes == [(21, 50, 71), (11, 25, 36), (6, 13, 18), (3, 7, 9), (3, 7, 5)]
    for number, (fine, coarse) in enumerate(pairwise(shapes), start=1):
        factors = tuple(-(-a // b) for a, b in zip(fine, coarse, strict=True))
        wanted = means(level(path, number - 1), factors)
        found = level(path, number)
        assert np.array_equal(found, wanted) if dtype != "float32" else np.allclose(found, wanted, rtol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 13)),
    factors=st.tuples(*[st.sampled_from([1, 2])] * 3),
    unit=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_a_level_does_not_depend_on_how_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    factors: tuple[int, int, int],
    unit: tuple[int, int, int],
) -> None:
    voxels = image_like(shape)
    source = open_volume(bare_zarr(tmp_path_factory.mktemp("cut") / "a.zarr", voxels))
    small = tuple(-(-length // factor) for length, factor in zip(shape, factors, strict=True))
    target = Volume("none/1", (small[0], small[1], small[2]), "uint8", unit, unit, level_path="1")
    plan, found = PyramidPlan(source, target, factors), np.zeros(small, np.uint8)
    for slab in plan.slabs:
        found[slab.keep.within(target.box)] = plan.voxels(slab)
    assert np.array_equal(found, means(voxels, factors))


def test_voxels_that_are_longer_in_z_are_halved_later(tmp_path: Path) -> None:
    add_levels(volume_of(tmp_path, nm=(20, 5, 5)), SMALL)
    found = open_levels(tmp_path / "a.zarr")
    assert [each.voxel_nm for each in found[:4]] == [(20, 5, 5), (20, 10, 10), (20, 20, 20), (40, 40, 40)]
    assert found[1].origin == (0, 2.5, 2.5)
    assert found[3].origin == (10, 17.5, 17.5)


def test_levels_end_where_all_is_one_chunk() -> None:
    base = Volume("a/0", (4000, 6000, 5000), "uint8", (16, 256, 256), (64, 512, 512), level_path="0", metadata="x")
    plans = plan_pyramid(base)
    assert all(length <= chunk for length, chunk in zip(plans[-1].target.shape, plans[-1].target.chunk, strict=True))
    assert any(length > chunk for length, chunk in zip(plans[-2].target.shape, plans[-2].target.chunk, strict=True))
    assert len(plans) == 8
    assert plan_pyramid(Volume("a/0", (9, 9, 9), "uint8", (16, 16, 16), (16, 16, 16), level_path="0")) == []


@pytest.mark.parametrize("made", ["ingested", "denoised"])
def test_every_reader_sees_the_levels(tmp_path: Path, made: str) -> None:
    path = volume_of(tmp_path)
    if made == "denoised":
        denoise(path, tmp_path / "out.zarr", None, replace(SMALL, method=Method(name="mean"), pyramid=True))
        path = tmp_path / "out.zarr"
    else:
        add_levels(path, SMALL)
    image = Image05.from_zarr(zarr.open_group(path, mode="r"))
    assert [each.path for each in image.ome_attributes.multiscales[0].datasets] == ["0", "1", "2", "3", "4"]
    (node,) = list(Reader(parse_url(str(path), mode="r"))())
    assert [np.asarray(each).shape for each in node.data] == [each.shape for each in open_levels(path)]
    assert np.array_equal(np.asarray(node.data[1]), level(path, 1))
    for number in range(5):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{number}/"}}
        assert np.array_equal(tensorstore.open(spec).result().read().result(), level(path, number))
        others = [str(other) for other in range(5) if other != number]
        found = xarray.open_zarr(path, consolidated=False, drop_variables=others)[str(number)]
        assert found.dims == ("z", "y", "x")
        assert found.dtype == np.uint8
        assert np.array_equal(found, level(path, number))


def test_a_level_s_voxels_are_amid_those_that_they_cover(tmp_path: Path) -> None:
    path = volume_of(tmp_path)
    add_levels(path, SMALL)
    fine, coarse = (open_volume(path, number).to_xarray() for number in (0, 1))
    assert np.array_equal(coarse, level(path, 1))
    for axis in "zyx":
        assert coarse[axis].attrs["units"] == "nm"
        covered = fine[axis].values[: 2 * (len(fine[axis]) // 2)].reshape(-1, 2)
        assert np.array_equal(coarse[axis].values[: len(covered)], covered.mean(axis=1))


def test_denoising_makes_levels_when_asked(tmp_path: Path, nrrn: Nrrn) -> None:
    path, output = volume_of(tmp_path), tmp_path / "out.zarr"
    words = ("--method", "mean", "--cluster", "serial", "--chunk", "4,8,8", "--shard", "8,16,16")
    assert nrrn("denoise", path, output, *words).status == 0
    assert len(open_levels(output)) == 1
    assert nrrn("denoise", path, output, *words, "--pyramid").status == 0
    assert len(open_levels(output)) == 5
    assert np.array_equal(level(output, 1), means(level(output, 0), (2, 2, 2)))
    assert "is whole" in nrrn("verify", output, "--deep").out
    said = nrrn("pyramid", output, "--cluster", "serial")
    assert said.out == f"{output}: 4 levels below the full size\n"
    assert nrrn("denoise", path, output, *words, "--overwrite").status == 0  # whole, so it is begun anew
    assert len(open_levels(output)) == 1
    assert not (output / "1").exists()


def test_broken_off_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nrrn: Nrrn) -> None:
    path = volume_of(tmp_path)
    count = breaks_off(monkeypatch, PyramidPlan, at=7)
    with pytest.raises(KeyboardInterrupt):
        add_levels(path, SMALL)
    assert len(open_levels(path)) == 1, "a level that is not whole is not shown"
    before = count[0]
    done, total = status(path).levels[1]
    assert (done, f"1: 6 of {total} slabs" in nrrn("status", path).out) == (6, True)
    add_levels(path, SMALL)
    assert all(done == total for done, total in status(path).levels.values())
    slabs = sum(len(plan.slabs) for plan in plan_pyramid(open_volume(path)))
    assert count[0] - before == slabs - 6
    assert np.array_equal(level(path, 1), means(VOXELS, (2, 2, 2)))
    count[0] = 1000
    add_levels(path, SMALL)
    assert count[0] == 1000, "there was nothing to do"


def test_what_is_repaired_is_repaired_in_every_level(tmp_path: Path) -> None:
    path, output = volume_of(tmp_path), tmp_path / "out.zarr"
    options = Options(layout=SMALL.layout, cluster="serial", method=Method(name="mean"), pyramid=True)
    denoise(path, output, None, options)
    whole = [level(output, number) for number in range(5)]
    with open(output / "0" / "c" / "0" / "1" / "2", "r+b") as file:
        file.write(b"damaged")
    with open(output / "2" / "c" / "0" / "0" / "1", "r+b") as file:
        file.write(b"damaged")
    problems = verify(output, deep=True)
    assert [problem.split(":")[0] for problem in problems] == ["slab z0-y16-x32", "level 2"]
    done, summary = repair(output, options=Options(cluster="serial"))
    assert done == problems
    assert summary is not None
    assert summary.done == 1
    assert summary.level_slabs == 5  # one of each level lies above the slab, and one in level 2 was damaged itself
    assert verify(output, deep=True) == []
    assert all(np.array_equal(level(output, number), voxels) for number, voxels in enumerate(whole))


def test_a_slab_that_is_done_again_is_done_again_in_the_levels_above(tmp_path: Path) -> None:
    path = volume_of(tmp_path)
    add_levels(path, SMALL)
    shard = path / "0" / "c" / "0" / "0" / "0"
    shard.unlink()
    changed = VOXELS.copy()
    changed[:8, :16, :16] = 7  # as if its file had been mended since
    np.save(tmp_path / "a.npy", changed)
    ingest(tmp_path / "a.npy", path, Intake(voxel_nm=(5, 5, 5)), SMALL)
    assert level(path, 1)[0, 0, 0] == 7
    assert np.array_equal(level(path, 1), means(level(path, 0), (2, 2, 2)))
    assert np.array_equal(level(path, 2), means(level(path, 1), (2, 2, 2)))


def test_levels_of_a_slab_that_was_done_again_count_as_not_done_though_the_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = volume_of(tmp_path), PyramidPlan.voxels
    add_levels(path, SMALL)
    (path / "0" / "c" / "0" / "0" / "0").unlink()
    changed = VOXELS.copy()
    changed[:8, :16, :16] = 7
    np.save(tmp_path / "a.npy", changed)

    def killed(plan: PyramidPlan, slab: Any) -> NDArray[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(PyramidPlan, "voxels", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "a.npy", path, Intake(voxel_nm=(5, 5, 5)), SMALL)
    assert level(path, 0)[0, 0, 0] == 7
    assert level(path, 1)[0, 0, 0] != 7
    assert {problem.split(":")[0] for problem in verify(path)} == {f"level {number}" for number in (1, 2, 3, 4)}
    monkeypatch.setattr(PyramidPlan, "voxels", real)
    ingest(tmp_path / "a.npy", path, Intake(voxel_nm=(5, 5, 5)), SMALL)
    assert all(np.array_equal(level(path, n), means(level(path, n - 1), (2, 2, 2))) for n in (1, 2))
    assert verify(path, deep=True) == []


def test_levels_of_a_volume_that_grows_on_are_deleted(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "raw.zarr", VOXELS[:17], (4, 16, 16))
    options, output = Options(layout=SMALL.layout, cluster="serial"), tmp_path / "out.zarr"
    weights = tiny_weights(tmp_path / "w.safetensors")
    denoise(source, output, weights, replace(options, pyramid=True))
    assert len(open_levels(output)) == 5
    array = zarr.open_array(source, mode="r+")
    array.resize((33, 50, 71))
    array[17:] = image_like((16, 50, 71))
    follow(source, output, weights, options, Following(every_s=0, settle_s=0))
    assert open_volume(output).shape == (24, 50, 71)
    assert len(open_levels(output)) == 1
    assert not (output / "1").exists()
    with pytest.raises(InputError, match="is growing: levels are added to what is complete"):
        add_levels(output, SMALL)
    denoise(source, output, weights, replace(options, pyramid=True))
    assert np.array_equal(level(output, 1), means(level(output, 0), (2, 2, 2)))


def test_processes_share_levels(tmp_path: Path, nrrn: Nrrn) -> None:
    path = volume_of(tmp_path)
    for share in ("0/2", "1/2"):
        assert nrrn("pyramid", path, "--shard-of", share).status == 0
    assert np.array_equal(level(path, 1), means(VOXELS, (2, 2, 2)))
    assert verify(path, deep=True) == []


def test_a_batch_makes_levels_of_what_it_did_before(tmp_path: Path, nrrn: Nrrn) -> None:
    path = volume_of(tmp_path)
    (tmp_path / "jobs.csv").write_text(f"source,output\n{path},{tmp_path / 'out.zarr'}\n")
    words = ("batch", tmp_path / "jobs.csv", "--method", "mean", "--cluster", "serial", "--chunk", "4,8,8")
    words = (*words, "--shard", "8,16,16")
    assert "done" in nrrn(*words).out
    assert "done before" in nrrn(*words).out
    assert "done before" not in nrrn(*words, "--pyramid").out
    assert len(open_levels(tmp_path / "out.zarr")) == 5
    assert "done before" in nrrn(*words, "--pyramid").out


def test_on_object_storage(moto_s3: ObjectStore, tmp_path: Path) -> None:
    moto_s3.make_bucket("levels")
    np.save(tmp_path / "a.npy", VOXELS)
    with moto_s3.in_use():
        ingest(tmp_path / "a.npy", "s3://levels/a.zarr", Intake(voxel_nm=(5, 5, 5)), SMALL)
        assert add_levels("s3://levels/a.zarr", SMALL) == 4
        assert verify("s3://levels/a.zarr", deep=True) == []


def test_what_cannot_have_levels_is_refused(tmp_path: Path, nrrn: Nrrn) -> None:
    """Whatever others made stays as it is, also with --overwrite."""
    bare = bare_zarr(tmp_path / "bare.zarr", VOXELS)
    path = volume_of(tmp_path)
    group = zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    group.create_array("0", shape=VOXELS.shape, chunks=(4, 8, 8), dtype="uint8")[:] = VOXELS
    scale = {"type": "scale", "scale": [1, 1, 1]}
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    for foreign in (bare, tmp_path / "old.zarr"):
        before = {file: file.read_bytes() for file in foreign.rglob("*") if file.is_file()}
        for overwrite in (False, True):
            with pytest.raises(InputError, match="was not made by nrrn: bring it in with nrrn ingest"):
                add_levels(foreign, Options(cluster="serial", overwrite=overwrite))
        assert before == {file: file.read_bytes() for file in foreign.rglob("*") if file.is_file()}
    zarr.create_array(path / "1", shape=(3, 3, 3), chunks=(3, 3, 3), dtype="uint8")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"a\.zarr/1 exists and was not made by nrrn"):
            add_levels(path, Options(cluster="serial", overwrite=overwrite))
    said = nrrn("denoise", path, tmp_path / "o.zarr", "--method", "mean", "--follow", "--every", "0", "--pyramid")
    assert "levels (pyramid) do not go together" in said.err


def test_levels_are_added_to_what_is_complete_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", VOXELS)
    breaks_off(monkeypatch, IngestPlan, at=3)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "a.npy", tmp_path / "a.zarr", Intake(voxel_nm=(5, 5, 5)), SMALL)
    with pytest.raises(InputError, match="is unfinished: levels are added to what is complete"):
        add_levels(tmp_path / "a.zarr", SMALL)


def test_a_volume_of_one_chunk_needs_no_levels(tmp_path: Path, nrrn: Nrrn) -> None:
    path = volume_of(tmp_path, VOXELS[:4, :8, :8])
    assert nrrn("pyramid", path, "--cluster", "serial").out == f"{path}: 0 levels below the full size\n"


def test_levels_of_a_volume_that_was_moved_stay(tmp_path: Path) -> None:
    path, options = volume_of(tmp_path), Options(layout=SMALL.layout, cluster="serial", method=Method(name="mean"))
    denoise(path, tmp_path / "out.zarr", None, replace(options, pyramid=True))
    (tmp_path / "out.zarr").rename(tmp_path / "new.zarr")
    assert denoise(path, tmp_path / "new.zarr", None, options).level_slabs == 0
    assert len(open_levels(tmp_path / "new.zarr")) == 5
    assert verify(tmp_path / "new.zarr", deep=True) == []


def test_a_level_that_is_gone_or_damaged_is_named_and_made_again(tmp_path: Path, nrrn: Nrrn) -> None:
    path = volume_of(tmp_path)
    add_levels(path, SMALL)
    whole = [level(path, number) for number in range(5)]
    shutil.rmtree(path / "2")
    with open(path / "3" / "c" / "0" / "0" / "0", "r+b") as file:
        file.write(b"damaged")
    said = nrrn("verify", path, "--deep")
    assert said.status == 1
    assert "level 2: " in said.out
    assert "level 3: slab z0-y0-x0" in said.out
    said = nrrn("repair", path, "--cluster", "serial")
    assert "of levels done again" in said.out
    assert all(np.array_equal(level(path, number), voxels) for number, voxels in enumerate(whole))
    assert nrrn("verify", path, "--deep").status == 0


def test_what_was_ingested_is_brought_in_again_where_it_is_damaged(tmp_path: Path) -> None:
    path = volume_of(tmp_path)
    with open(path / "0" / "c" / "0" / "1" / "2", "r+b") as file:
        file.write(b"damaged")
    with pytest.raises(RunError, match="run the same nrrn ingest again"):
        repair(path)
    volume_of(tmp_path)
    assert verify(path, deep=True) == []
    assert np.array_equal(level(path, 0), VOXELS)


def test_a_level_that_fails_leaves_the_others_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = volume_of(tmp_path), PyramidPlan.voxels

    def failing(plan: PyramidPlan, slab: Any) -> NDArray[Any]:
        if plan.target.level_path == "2":
            raise OSError("no such chunk")
        return real(plan, slab)

    monkeypatch.setattr(PyramidPlan, "voxels", failing)
    with pytest.raises(RunError):
        add_levels(path, SMALL)
    assert [each.level_path for each in open_levels(path)] == ["0", "1"]
    assert np.array_equal(level(path, 0), VOXELS)
    assert verify(path, deep=True) == []
    assert Ledger(f"{path}/2").begun()


def test_levels_of_a_part_begin_where_the_part_does(tmp_path: Path) -> None:
    path = volume_of(tmp_path)
    roi = Box(Span(2, 20), Span(10, 50), Span(5, 65))
    options = Options(roi=roi, layout=SMALL.layout, cluster="serial", method=Method(name="mean"), pyramid=True)
    denoise(path, tmp_path / "part.zarr", None, options)
    assert open_levels(tmp_path / "part.zarr")[1].origin == (12.5, 52.5, 27.5)
