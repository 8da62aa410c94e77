"""nrrn export to a .zarr: what is written is OME-Zarr 0.4 for every reader of it, and the same voxels."""

from __future__ import annotations

import json
from dataclasses import replace
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
from ome_zarr_models.v04 import Image as Image04

from nrrn_pipeline import (
    Box,
    InputError,
    Intake,
    Layout,
    Options,
    RunError,
    add_levels,
    export_zarr,
    ingest,
    open_volume,
    repair,
    verify,
)
from nrrn_pipeline.export_plan import SLAB_BYTES, ExportPlan, plan_export
from nrrn_pipeline.slabs import CHUNK
from nrrn_pipeline.volume import Volume, count_levels
from tests.commands import Nrrn
from tests.servers import ObjectStore
from tests.support import bare_zarr, breaks_off, image_like, ome_image

NM = (8.0, 4.5, 5.0)
SMALL = Options(layout=Layout(chunk=(4, 8, 8), shard=(8, 16, 16)), cluster="serial")
OLD = Options(layout=Layout(chunk=(5, 8, 8), slab=(5, 16, 16)), cluster="serial")  # two by two chunks a slab
VOXELS = image_like((13, 30, 40))


def volume_of(folder: Path, voxels: NDArray[Any] = VOXELS, pyramid: bool = False) -> Path:
    np.save(folder / "source.npy", voxels)
    ingest(folder / "source.npy", folder / "raw.zarr", Intake(voxel_nm=NM), replace(SMALL, pyramid=pyramid))
    return folder / "raw.zarr"


def level(path: Path | str, number: int = 0) -> NDArray[Any]:
    return zarr.open_array(f"{path}/{number}", mode="r")[:]


def files_in(path: Path) -> dict[str, bytes]:
    """Of an array: everything but the ledger."""
    found = (file for file in path.rglob("*") if file.is_file() and "nrrn" not in file.relative_to(path).parts)
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_reader_of_zarr_2_reads_it_and_its_levels(tmp_path: Path, dtype: str) -> None:
    source, path = volume_of(tmp_path, image_like((13, 30, 40), dtype), pyramid=True), tmp_path / "old.zarr"
    export_zarr(source, path, OLD)
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 2
    (image,) = Image04.from_zarr(group).attributes.multiscales
    assert [each.path for each in image.datasets] == ["0", "1", "2", "3"]
    assert [axis.unit for axis in image.axes] == ["nanometer"] * 3
    assert count_levels(path) == 4
    (node,) = list(Reader(parse_url(str(path), mode="r"))())
    for number, lazy in enumerate(node.data):
        voxels, ours = np.asarray(lazy), open_volume(path, number)
        assert voxels.dtype == dtype
        assert np.array_equal(voxels, level(path, number))
        assert np.array_equal(voxels, ours.to_xarray().values)
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/{number}/"}}
        assert np.array_equal(tensorstore.open(spec).result().read().result(), voxels)
    assert np.array_equal(level(path), level(source))
    assert open_volume(path).voxel_nm == NM
    assert json.loads((path / "0" / ".zarray").read_text())["dimension_separator"] == "/"
    assert verify(path, deep=True) == []


def test_xarray_reads_it(tmp_path: Path) -> None:
    export_zarr(volume_of(tmp_path), tmp_path / "old.zarr", OLD)
    found = xarray.open_zarr(tmp_path / "old.zarr", consolidated=False, mask_and_scale=False)  # else 0 becomes NaN
    assert found["0"].dims == ("z", "y", "x")
    assert np.array_equal(found["0"], VOXELS)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 13)] * 3),
    chunk=st.tuples(*[st.integers(1, 6)] * 3),
    times=st.tuples(*[st.integers(1, 3)] * 3),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_what_is_exported_and_ingested_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    chunk: tuple[int, int, int],
    times: tuple[int, int, int],
    dtype: str,
) -> None:
    folder, voxels = tmp_path_factory.mktemp("cut"), image_like(shape, dtype)
    slab = tuple(size * count for size, count in zip(chunk, times, strict=True))
    layout = Layout(chunk=chunk, slab=(slab[0], slab[1], slab[2]))
    export_zarr(bare_zarr(folder / "a.zarr", voxels), folder / "old.zarr", Options(layout=layout, cluster="serial"))
    ingest(folder / "old.zarr", folder / "new.zarr", options=Options(cluster="serial"))
    assert level(folder / "old.zarr").dtype == level(folder / "new.zarr").dtype == dtype
    assert np.array_equal(level(folder / "old.zarr"), voxels)
    assert np.array_equal(level(folder / "new.zarr"), voxels)


def test_a_part_and_a_level_are_where_they_were(tmp_path: Path, nrrn: Nrrn) -> None:
    source = volume_of(tmp_path, pyramid=True)
    words = ("--cluster", "serial", "--chunk", "4,8,8")
    said = nrrn("export", source, tmp_path / "part.zarr", "--roi", "3:11,5:28,0:33", *words)
    assert said.out.startswith(f"{tmp_path / 'part.zarr'}: 8 x 23 x 33 uint8, voxels of 8 x 4.5 x 5 nm; complete")
    part = open_volume(tmp_path / "part.zarr")
    assert part.origin == (24, 22.5, 0)
    assert np.array_equal(part.to_xarray(), VOXELS[3:11, 5:28, :33])
    assert verify(tmp_path / "part.zarr", deep=True) == []
    nrrn("export", source, tmp_path / "level.zarr", "--level", "1", *words)
    found, wanted = open_volume(tmp_path / "level.zarr"), open_volume(source, 1)
    assert (found.voxel_nm, found.origin) == (wanted.voxel_nm, wanted.origin)
    assert np.array_equal(found.to_xarray(), wanted.to_xarray())
    assert count_levels(tmp_path / "level.zarr") == count_levels(source) - 1


def test_levels_are_made_where_there_are_some_or_they_are_asked_for(tmp_path: Path, nrrn: Nrrn) -> None:
    source, words = volume_of(tmp_path), ("--cluster", "serial", "--chunk", "4,8,8")
    nrrn("export", source, tmp_path / "old.zarr", *words)
    assert count_levels(tmp_path / "old.zarr") == 1
    nrrn("export", source, tmp_path / "old.zarr", *words, "--pyramid")
    levels = count_levels(tmp_path / "old.zarr")
    assert levels == 4
    add_levels(source, SMALL)
    export_zarr(source, tmp_path / "new.zarr", Options(layout=Layout(chunk=(4, 8, 8)), cluster="serial"))
    for number in range(levels):
        for made in ("old", "new"):
            assert np.array_equal(level(tmp_path / f"{made}.zarr", number), level(source, number))
    assert add_levels(tmp_path / "old.zarr", SMALL) == 3  # nrrn pyramid knows them too


def test_broken_off_it_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = volume_of(tmp_path, pyramid=True)
    whole = export_zarr(source, tmp_path / "whole.zarr", OLD)
    breaks_off(monkeypatch, ExportPlan, at=7)
    with pytest.raises(KeyboardInterrupt):
        export_zarr(source, tmp_path / "old.zarr", OLD)
    summary = export_zarr(source, tmp_path / "old.zarr", OLD)
    assert (summary.resumed, summary.done) == (6, whole.slabs - 6)
    assert files_in(tmp_path / "old.zarr" / "0") == files_in(tmp_path / "whole.zarr" / "0")
    before = files_in(tmp_path / "old.zarr" / "0")
    again = export_zarr(source, tmp_path / "old.zarr", OLD)
    assert (again.resumed, again.done, again.level_slabs) == (whole.slabs, 0, 0)
    assert files_in(tmp_path / "old.zarr" / "0") == before


def test_a_chunk_that_is_damaged_or_gone_is_found_and_copied_again(tmp_path: Path) -> None:
    source, path = volume_of(tmp_path, pyramid=True), tmp_path / "old.zarr"
    export_zarr(source, path, OLD)
    whole = files_in(path / "0")
    (path / "0" / "1" / "2" / "3").unlink()
    assert [problem.split(":")[0] for problem in verify(path)] == ["slab z5-y16-x16"]
    with open(path / "0" / "0" / "0" / "0", "r+b") as file:
        file.write(b"damaged")
    assert len(verify(path, deep=True)) == 2
    with pytest.raises(RunError, match="run the same nrrn export again"):
        repair(path)
    assert export_zarr(source, path, OLD).done == 2
    assert verify(path, deep=True) == []
    assert whole == files_in(path / "0")


def test_processes_share_an_export(tmp_path: Path, nrrn: Nrrn) -> None:
    source, path = volume_of(tmp_path, pyramid=True), tmp_path / "old.zarr"
    for share in ("0/2", "1/2"):
        assert nrrn("export", source, path, "--shard-of", share, "--chunk", "5,8,8", "--slab", "5,16,16").status == 0
    assert np.array_equal(level(path), VOXELS)
    assert verify(path, deep=True) == []


def test_on_object_storage(tmp_path: Path, moto_s3: ObjectStore) -> None:
    moto_s3.make_bucket("old")
    source = volume_of(tmp_path, VOXELS[:9, :16, :16], pyramid=True)
    with moto_s3.in_use():
        export_zarr(source, "s3://old/old.zarr", OLD)
        assert verify("s3://old/old.zarr", deep=True) == []
        assert np.array_equal(open_volume("s3://old/old.zarr").to_xarray(), VOXELS[:9, :16, :16])
        assert count_levels("s3://old/old.zarr") == 3


@pytest.mark.parametrize("axes", [4, 5])
def test_axes_before_z_are_kept(tmp_path: Path, axes: int) -> None:
    voxels = image_like((5, 20, 30)).reshape((1,) * (axes - 3) + (5, 20, 30))
    source = ome_image(tmp_path / "a.zarr", voxels)
    export_zarr(source, tmp_path / "old.zarr", OLD)
    assert np.array_equal(level(tmp_path / "old.zarr"), voxels)
    assert Image04.from_zarr(zarr.open_group(tmp_path / "old.zarr", mode="r")).attributes.multiscales
    assert verify(tmp_path / "old.zarr", deep=True) == []


@pytest.mark.parametrize("chunk", [(1, 4096, 4096), (1, 30_000, 40_000), (64, 64, 64), (512, 512, 512), (7, 9, 300)])
def test_slabs_hold_chunks_of_the_source_and_fit_into_memory(chunk: tuple[int, int, int]) -> None:
    made = plan_export(Volume("a", (1000, 40_000, 40_000), "uint8", chunk, chunk), "b")
    assert made.target.chunk == made.target.write_unit == CHUNK
    assert all(size % unit == 0 for size, unit in zip(made.slab, CHUNK, strict=True))
    assert all(size >= own for size, own in zip(made.slab[1:], chunk[1:], strict=True))
    assert made.slab_bytes <= SLAB_BYTES or made.slab[0] == CHUNK[0]


def test_too_many_chunks_are_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match="too many to keep account of: use a larger --chunk"):
        plan_export(Volume("a", (4000, 40_000, 40_000), "uint8", CHUNK, CHUNK), "b")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(shard=(8, 16, 16)), "Zarr 2 knows chunks alone"),
        (Layout(chunk=(4, 8, 8), slab=(6, 8, 8)), "slab z=6 is not a multiple of the target's write unit"),
        (Layout(chunk=(2048, 1024, 1024)), "larger than a chunk can be"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, layout: Layout, words: str) -> None:
    source = bare_zarr(tmp_path / "a.zarr", VOXELS)
    with pytest.raises(InputError, match=words):
        export_zarr(source, tmp_path / "old.zarr", Options(layout=layout, cluster="serial"))
    assert not (tmp_path / "old.zarr").exists()


def test_what_cannot_be_is_refused_in_one_line_with_nothing_written(tmp_path: Path, nrrn: Nrrn) -> None:
    source = volume_of(tmp_path)
    before = files_in(tmp_path)
    wrong: dict[tuple[object, ...], str] = {
        (source, source): "lies on top of the input",
        (source, tmp_path / "old.zarr", "--roi", "0:99,0:8,0:9"): "not inside the volume",
        (tmp_path / "none.zarr", tmp_path / "old.zarr"): "there is nothing there",
        (source, tmp_path / "old.tif", "--workers", "2"): "is written by this process alone",
        (source, tmp_path / "old.npy", "--chunk", "4,8,8"): "give --level and --roi at most",
    }
    for given_words, told in wrong.items():
        said = nrrn("export", *given_words)
        assert said.status == 2
        assert told in said.err
        assert len(said.err.strip().splitlines()) == 1
    assert files_in(tmp_path) == before


def test_an_export_with_other_settings_is_refused_and_begun_anew_when_asked(tmp_path: Path) -> None:
    source, path = volume_of(tmp_path), tmp_path / "old.zarr"
    export_zarr(source, path, OLD)
    other = replace(OLD, roi=Box.parse("0:10,0:30,0:40"))
    with pytest.raises(InputError, match="was begun with other settings: roi was"):
        export_zarr(source, path, other)
    export_zarr(source, path, replace(other, overwrite=True))
    assert np.array_equal(level(path), VOXELS[:10])
    assert verify(path, deep=True) == []
    with pytest.raises(InputError, match="was begun with other settings"):
        ingest(source, path, options=SMALL)
