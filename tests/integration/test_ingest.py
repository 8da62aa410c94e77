"""nrrn ingest, as a user calls it: from files to a volume that can be denoised, whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image as Image05

from nrrn_pipeline import InputError, Intake, Options, RunError, RunWatch, SlabsFailedError, denoise, ingest, verify
from nrrn_pipeline.api import run_planned
from nrrn_pipeline.formats import find_stack, images
from nrrn_pipeline.formats.images import Images
from nrrn_pipeline.formats.parts import Raw
from nrrn_pipeline.formats.sources import Stack
from nrrn_pipeline.geometry import Span
from nrrn_pipeline.ingest_plan import SLAB_BYTES, plan_ingest
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import Method
from nrrn_pipeline.progress import Progress
from nrrn_pipeline.slabs import Layout, Slab
from nrrn_pipeline.statistics import measure_box, merge_boxes, statistics_boxes
from nrrn_pipeline.volume import open_volume, read_box
from tests.commands import Nrrn
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, tiny_weights

VOXELS = image_like((20, 40, 50))
SMALL = Layout(slab=(4, 40, 64), chunk=(4, 16, 16), shard=(4, 16, 32))
SERIAL = Options(layout=SMALL, cluster="serial")


def folder_of(path: Path, voxels: NDArray[Any] = VOXELS, **options: Any) -> Path:
    path.mkdir()
    for z, plane in enumerate(voxels):
        tifffile.imwrite(path / f"slice_{z:04}.tif", plane, photometric="minisblack", **options)
    return path


def stored(path: Path | str) -> NDArray[Any]:
    return zarr.open_array(f"{path}/0", mode="r")[:]


class Stages(RunWatch):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def progressed(self, progress: Progress) -> None:
        self.seen.append(progress.stage)


def test_a_folder_becomes_a_volume_with_its_voxel_size(tmp_path: Path, nrrn: Nrrn) -> None:
    folder, output = folder_of(tmp_path / "slices"), tmp_path / "raw.zarr"
    said = nrrn("ingest", folder, output, "--voxel-nm", "8,4.5,5", "--workers", 1)
    assert said.status == 0
    assert said.out.startswith(f"{output}: 20 x 40 x 50 uint8, voxels of 8 x 4.5 x 5 nm; complete, 1 slab\n")
    assert np.array_equal(stored(output), VOXELS)
    assert open_volume(output).voxel_nm == (8, 4.5, 5)
    image = Image05.from_zarr(zarr.open_group(output, mode="r"))
    assert [axis.unit for axis in image.ome_attributes.multiscales[0].axes] == ["nanometer"] * 3
    assert verify(output, deep=True) == []
    assert "is whole" in nrrn("verify", output, "--deep").out
    assert "complete" in nrrn("status", output).out


def test_what_the_files_do_not_say_is_said(tmp_path: Path, nrrn: Nrrn) -> None:
    said = nrrn("ingest", folder_of(tmp_path / "a"), tmp_path / "raw.zarr", "--cluster", "serial")
    assert "do not say how large voxels are" in said.err
    assert open_volume(tmp_path / "raw.zarr").voxel_nm is None


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_ingested_volume_is_denoised_as_any_other_but_not_measured_again(tmp_path: Path, dtype: str) -> None:
    voxels, weights = image_like((20, 40, 50), dtype), tiny_weights(tmp_path / "w.safetensors")
    ingest(folder_of(tmp_path / "slices", voxels), tmp_path / "raw.zarr", options=SERIAL)
    own = Ledger(open_volume(tmp_path / "raw.zarr").url).own_statistics()
    bare = open_volume(bare_zarr(tmp_path / "bare.zarr", voxels))
    measured = merge_boxes(measure_box(bare, box) for box in statistics_boxes(bare, Span(0, 20)))
    assert own is not None
    assert np.allclose(own.mean, measured.mean, rtol=1e-12)
    assert np.allclose(own.std, measured.std, rtol=1e-12)
    stages = Stages()
    for name in ("raw", "bare"):
        denoise(tmp_path / f"{name}.zarr", tmp_path / f"{name}.out", weights, Options(cluster="serial"), stages)
        assert ("statistics" in stages.seen) == (name == "bare")
    assert np.allclose(stored(tmp_path / "raw.out"), stored(tmp_path / "bare.out"), rtol=1e-5)


def test_a_part_of_an_ingested_volume_is_not_measured_either(tmp_path: Path, nrrn: Nrrn) -> None:
    ingest(folder_of(tmp_path / "slices"), tmp_path / "raw.zarr", options=SERIAL)
    weights, words = tiny_weights(tmp_path / "w.safetensors"), ("--cluster", "serial", "--roi", "5:12,0:20,10:50")
    nrrn("denoise", tmp_path / "raw.zarr", tmp_path / "part.zarr", "--weights", weights, *words)
    nrrn("denoise", tmp_path / "raw.zarr", tmp_path / "all.zarr", "--weights", weights, "--cluster", "serial")
    assert np.array_equal(stored(tmp_path / "part.zarr"), stored(tmp_path / "all.zarr")[5:12, 0:20, 10:50])
    kept = Ledger(open_volume(tmp_path / "part.zarr").url).statistics()
    assert kept is not None
    assert kept.z == Span(4, 13)
    said = nrrn("denoise", tmp_path / "raw.zarr", tmp_path / "part.zarr", "--weights", weights, *words)
    assert "done before" in said.out


def test_a_plan_counts_no_pass_of_statistics_that_are_known(tmp_path: Path, nrrn: Nrrn) -> None:
    ingest(folder_of(tmp_path / "slices"), tmp_path / "raw.zarr", options=SERIAL)
    bare_zarr(tmp_path / "bare.zarr", VOXELS)
    said = {name: nrrn("plan", tmp_path / f"{name}.zarr", tmp_path / "o.zarr").out for name in ("raw", "bare")}
    assert "1: 0 for statistics, 1 to denoise" in said["raw"]
    assert "0 for statistics" not in said["bare"]


def test_statistics_of_a_volume_that_has_changed_since_are_measured_again(tmp_path: Path) -> None:
    ingest(folder_of(tmp_path / "slices"), tmp_path / "raw.zarr", options=SERIAL)
    array = zarr.open_array(tmp_path / "raw.zarr" / "0", mode="r+")
    array[:] = 255 - array[:]
    stages = Stages()
    method = Method(name="mean")
    denoise(tmp_path / "raw.zarr", tmp_path / "out.zarr", None, Options(cluster="serial", method=method), stages)
    assert "statistics" in stages.seen


def test_statistics_of_a_volume_some_of_whose_slices_have_changed_are_measured_again(tmp_path: Path) -> None:
    """Far from the slice in the middle, which is looked at; blank slices matter to their neighbours."""
    ingest(folder_of(tmp_path / "slices"), tmp_path / "raw.zarr", options=SERIAL)
    array = zarr.open_array(tmp_path / "raw.zarr" / "0", mode="r+")
    array[3] = 0
    stages = Stages()
    method = Method(name="mean")
    denoise(tmp_path / "raw.zarr", tmp_path / "out.zarr", None, Options(cluster="serial", method=method), stages)
    assert "statistics" in stages.seen


def test_statistics_of_slabs_that_were_mended_are_not_those_of_before(tmp_path: Path) -> None:
    folder, output = folder_of(tmp_path / "slices"), tmp_path / "raw.zarr"
    ingest(folder, output, options=SERIAL)
    tifffile.imwrite(folder / "slice_0002.tif", 255 - VOXELS[2], photometric="minisblack")
    (output / "0" / "c" / "0" / "0" / "0").unlink()
    ingest(folder, output, options=SERIAL)
    assert np.array_equal(stored(output)[2], 255 - VOXELS[2])
    own = Ledger(open_volume(output).url).own_statistics()
    assert own is None or abs(own.mean[2] - (255 - VOXELS[2]).mean()) < 1e-9


def test_slabs_hold_whole_slices_of_images_and_fit_into_memory(tmp_path: Path) -> None:
    for plane, dtype in (
        ((4000, 6000), "uint8"),
        ((700, 900), "uint8"),
        ((30_000, 40_000), "uint16"),
        ((9, 9), "uint8"),
    ):
        names = tuple(map(str, range(2000)))
        sliced = plan_ingest(Stack("f", (Images("f", names, plane, dtype),)), str(tmp_path / "o"))
        raw = plan_ingest(Stack("f", (Raw("f", (2000, *plane), dtype, 0),)), str(tmp_path / "o"))
        for made in (sliced, raw):
            assert all(size % unit == 0 for size, unit in zip(made.slab, made.target.write_unit, strict=True))
            one = made.slabs.largest().keep
            assert one.size * made.target.itemsize <= SLAB_BYTES or made.slab[0] == 1
            assert len(one.x) == plane[1]
        assert sliced.slabs.largest().keep.shape[1:] == plane
        assert raw.slab[0] >= sliced.slab[0]


def test_a_run_that_broke_off_goes_on_and_reads_no_slice_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output, read = folder_of(tmp_path / "slices"), tmp_path / "raw.zarr", list[str]()
    real = images._read_plane

    def counted(url: str, shape: tuple[int, int]) -> NDArray[Any]:
        if len(read) == 10:
            raise KeyboardInterrupt
        read.append(url)
        return real(url, shape)

    monkeypatch.setattr(images, "_read_plane", counted)
    with pytest.raises(KeyboardInterrupt):
        ingest(folder, output, options=SERIAL)
    monkeypatch.setattr(images, "_read_plane", lambda url, shape: (read.append(url), real(url, shape))[1])
    summary = ingest(folder, output, options=SERIAL)
    assert (summary.slabs, summary.resumed, summary.done) == (5, 2, 3)
    assert len(read) == 22  # two slices of the slab that was broken off
    assert np.array_equal(stored(output), VOXELS)
    assert Ledger(open_volume(output).url).own_statistics() is not None
    assert ingest(folder, output, options=SERIAL).done == 0


def test_other_files_than_it_was_begun_with_are_refused(tmp_path: Path) -> None:
    folder, output = folder_of(tmp_path / "slices"), tmp_path / "raw.zarr"
    ingest(folder, output, options=SERIAL)
    (folder / "slice_0019.tif").unlink()
    with pytest.raises(InputError, match="begun with other settings: files was"):
        ingest(folder, output, options=SERIAL)


def test_a_slice_that_does_not_decode_is_named_and_all_others_are_done(tmp_path: Path, nrrn: Nrrn) -> None:
    folder, output = folder_of(tmp_path / "slices", compression="zlib"), tmp_path / "raw.zarr"
    torn = folder / "slice_0009.tif"
    whole = torn.read_bytes()
    with tifffile.TiffFile(torn) as file:
        place, length = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    torn.write_bytes(whole[:place] + bytes(length) + whole[place + length :])
    with pytest.raises(SlabsFailedError, match=r"slice_0009\.tif cannot be decoded"):
        ingest(folder, output, options=SERIAL)
    assert len(verify(output)) == 1
    torn.write_bytes(whole)
    summary = ingest(folder, output, options=SERIAL)
    assert (summary.resumed, summary.done) == (4, 1)
    assert np.array_equal(stored(output), VOXELS)


def test_a_folder_that_is_not_whole_is_refused_or_filled_as_asked(tmp_path: Path, nrrn: Nrrn) -> None:
    folder = folder_of(tmp_path / "slices")
    (folder / "slice_0005.tif").unlink()
    (folder / "slice_0011.tif").write_bytes((folder / "slice_0011.tif").read_bytes()[:-100])
    words = (folder, tmp_path / "raw.zarr", "--cluster", "serial")
    said = nrrn("ingest", *words)
    assert said.status == 2
    assert "slice 5 is missing between slice_0004.tif and slice_0006.tif; slice_0011.tif is cut short" in said.err
    assert "--lacking blank" in said.err
    assert not (tmp_path / "raw.zarr").exists()
    said = nrrn("ingest", *words, "--lacking", "blank")
    assert "blank slices in their place" in said.err
    wanted = VOXELS.copy()
    wanted[[5, 11]] = 0
    assert np.array_equal(stored(tmp_path / "raw.zarr"), wanted)
    notes = json.loads((tmp_path / "raw.zarr" / "zarr.json").read_text())["attributes"]["nrrn"]["notes"]
    assert "slice 5 is missing" in notes[0]


def test_three_thousand_files(tmp_path: Path) -> None:
    voxels = np.arange(3000 * 12, dtype=np.uint16).reshape(3000, 3, 4)
    folder = tmp_path / "many"
    folder.mkdir()
    for z, plane in enumerate(voxels):
        tifffile.imwrite(folder / f"slice_{z + 1}.tif", plane)  # no leading zeros
    summary = ingest(folder, tmp_path / "raw.zarr", options=Options(cluster="serial"))
    assert summary.slabs == 47
    assert np.array_equal(stored(tmp_path / "raw.zarr"), voxels)


LARGE = """
import sys, numpy as np, tifffile
planes = (np.full((1024, 2048), z % 251, np.uint8) for z in range(1024))
tifffile.imwrite(sys.argv[1], planes, shape=(1024, 1024, 2048), dtype=np.uint8, bigtiff=True, photometric="minisblack")
"""


def test_two_gigabytes_in_one_file_take_half_a_gigabyte_of_memory(tmp_path: Path) -> None:
    """Of a worker; also of the driver, which holds none of the voxels."""
    subprocess.run([sys.executable, "-c", LARGE, tmp_path / "large.tif"], check=True)
    assert os.path.getsize(tmp_path / "large.tif") > 2**31
    command = [sys.executable, "-m", "nrrn_pipeline.cli", "ingest", tmp_path / "large.tif", tmp_path / "raw.zarr"]
    said = subprocess.run([*command, "--workers", "2"], check=True, capture_output=True, text=True).stdout
    number, unit = said.strip().rpartition("peak memory of a worker ")[2].split()
    print(said)
    assert unit == "MB"
    assert float(number) < 500
    array = zarr.open_array(tmp_path / "raw.zarr" / "0", mode="r")
    for z in (0, 511, 1023):
        assert (array[z] == z % 251).all()


def test_signed_voxels_are_taken_where_the_dtype_holds_them_and_refused_where_not(tmp_path: Path, nrrn: Nrrn) -> None:
    signed = VOXELS.astype(np.int16)
    np.save(tmp_path / "a.npy", signed)
    words = ("ingest", tmp_path / "a.npy", tmp_path / "a.zarr", "--cluster", "serial")
    said = nrrn(*words)
    assert said.status == 2
    assert "holds int16 voxels" in said.err
    nrrn(*words, "--as", "uint8")
    assert np.array_equal(stored(tmp_path / "a.zarr"), VOXELS)
    signed[3, 3, 3] = -1
    np.save(tmp_path / "b.npy", signed)
    with pytest.raises(RunError, match=r"are -1 to 2\d\d, not all of which uint8 can hold"):
        ingest(tmp_path / "b.npy", tmp_path / "b.zarr", Intake(dtype="uint8"), SERIAL)
    ingest(tmp_path / "b.npy", tmp_path / "b.zarr", Intake(dtype="float32"), replace_overwrite(SERIAL))
    assert np.array_equal(stored(tmp_path / "b.zarr"), signed)


def replace_overwrite(options: Options) -> Options:
    return Options(layout=options.layout, cluster="serial", overwrite=True)


def test_a_region_of_zarr_2_with_its_size_is_rechunked(tmp_path: Path) -> None:
    source = bare_zarr(tmp_path / "old.zarr", VOXELS, (3, 7, 50), zarr_format=2)
    ingest(source, tmp_path / "new.zarr", Intake(voxel_nm=(5, 5, 5)), SERIAL)
    assert np.array_equal(stored(tmp_path / "new.zarr"), VOXELS)
    assert open_volume(tmp_path / "new.zarr").chunk == (4, 16, 16)


def test_processes_share_an_ingest(tmp_path: Path, nrrn: Nrrn) -> None:
    folder, output = folder_of(tmp_path / "slices"), tmp_path / "raw.zarr"
    layout = ("--slab", "4,40,64", "--chunk", "4,16,16", "--shard", "4,16,32")
    for share in ("0/2", "1/2"):
        assert nrrn("ingest", folder, output, "--shard-of", share, *layout).status == 0
    assert np.array_equal(stored(output), VOXELS)
    assert Ledger(open_volume(output).url).own_statistics() is not None


def test_files_on_object_storage_become_a_volume_there(tmp_path: Path, moto_s3: ObjectStore) -> None:
    folder, bucket = folder_of(tmp_path / "slices", compression="zlib"), "ingest"
    moto_s3.make_bucket(bucket)
    for path in folder.iterdir():
        moto_s3.put(bucket, f"slices/{path.name}", path.read_bytes())
    np.save(tmp_path / "a.npy", VOXELS)
    moto_s3.put(bucket, "a.npy", (tmp_path / "a.npy").read_bytes())
    with moto_s3.in_use():
        for source in ("slices", "a.npy"):
            ingest(f"s3://{bucket}/{source}", f"s3://{bucket}/{source}.zarr", options=SERIAL)
            volume = open_volume(f"s3://{bucket}/{source}.zarr")
            assert np.array_equal(read_box(volume, volume.box), VOXELS)


@pytest.mark.parametrize("words", [("only-one",), ("a", "b", "--voxel-nm", "5,5"), ("a", "b", "--lacking", "maybe")])
def test_bad_words_are_refused_in_one_line(
    tmp_path: Path, nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = nrrn("ingest", *words)
    assert said.status == 2
    assert said.err.startswith("nrrn: ")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_runs_slab_by_slab_as_whole(tmp_path: Path) -> None:
    made = plan_ingest(find_stack([folder_of(tmp_path / "slices")]), str(tmp_path / "raw.zarr"), layout=SMALL)
    assert all(np.array_equal(made.voxels(slab), VOXELS[slab.keep.within(made.target.box)]) for slab in made.slabs)
    assert isinstance(made.slabs[0], Slab)
    run_planned(made, SERIAL, RunWatch())
    assert np.array_equal(stored(tmp_path / "raw.zarr"), VOXELS)
