"""nrrn export: what it writes, the formats' own libraries read; and ingest brings it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nrrn_pipeline import Box, InputError, Intake, Options, RunError, export, ingest, open_volume
from nrrn_pipeline.formats import find_stack, writers
from nrrn_pipeline.geometry import box_of
from nrrn_pipeline.slabs import Layout
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like

NM = (8.0, 4.5, 5.0)
SMALL = Options(layout=Layout(chunk=(4, 16, 16), shard=(8, 32, 32)), cluster="serial")
NAMES = ["a.tif", "a.ome.tif", "a.mrc", "a.h5", "a.npy", "slices"]


def volume_of(folder: Path, voxels: NDArray[Any], nm: tuple[float, float, float] | None = NM) -> Path:
    np.save(folder / "source.npy", voxels)
    ingest(folder / "source.npy", folder / "raw.zarr", Intake(voxel_nm=nm), SMALL)
    return folder / "raw.zarr"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_comes_back_with_its_voxel_size(tmp_path: Path, name: str, dtype: str) -> None:
    voxels = image_like((21, 40, 50), dtype)
    export(volume_of(tmp_path, voxels), tmp_path / name)
    found = find_stack([tmp_path / name])
    assert np.array_equal(found.read(box_of(found.shape)), voxels)
    if name != "a.npy":
        assert found.voxel_nm == pytest.approx(NM, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source.npy", "raw.zarr", name])


def test_the_formats_own_libraries_read_it(tmp_path: Path) -> None:
    voxels = image_like((21, 40, 50))
    source = volume_of(tmp_path, voxels)
    for name in NAMES:
        export(source, tmp_path / name)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_imagej
        assert file.imagej_metadata is not None
        assert (file.imagej_metadata["spacing"], file.imagej_metadata["unit"]) == (0.008, "um")
        assert np.array_equal(file.asarray(), voxels)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        assert file.is_ome
        assert np.array_equal(file.asarray(), voxels)
    with mrcfile.open(tmp_path / "a.mrc") as file:
        assert np.array_equal(file.data, voxels)
        assert mrcfile.validate(tmp_path / "a.mrc")
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["volume"], voxels)
    assert np.array_equal(np.load(tmp_path / "a.npy"), voxels)
    assert np.array_equal(tifffile.imread(sorted((tmp_path / "slices").iterdir())), voxels)


def test_a_part_and_a_level_are_written(tmp_path: Path, nrrn: Nrrn) -> None:
    voxels = image_like((21, 40, 50))
    source = volume_of(tmp_path, voxels)
    said = nrrn("export", source, tmp_path / "part.npy", "--roi", "3:18,5:40,0:33")
    assert said.out == f"{tmp_path / 'part.npy'}: written\n"
    assert np.array_equal(np.load(tmp_path / "part.npy"), voxels[3:18, 5:40, :33])
    nrrn("pyramid", source, "--cluster", "serial")
    nrrn("export", source, tmp_path / "level.npy", "--level", "1")
    assert np.load(tmp_path / "level.npy").shape == open_volume(source, 1).shape


def test_a_volume_without_voxel_size_is_written_without(tmp_path: Path) -> None:
    source = volume_of(tmp_path, image_like((3, 8, 9)), None)
    for name in NAMES:
        export(source, tmp_path / name)
        assert find_stack([tmp_path / name]).voxel_nm is None, name


def test_a_large_one_is_a_bigtiff_with_ome_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "CLASSIC", 1000)
    voxels = image_like((5, 30, 40))
    export(volume_of(tmp_path, voxels), tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert file.is_ome
        assert np.array_equal(file.asarray(), voxels)
    assert find_stack([tmp_path / "a.tif"]).voxel_nm == NM


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.jpg", "of no kind that can be written"), ("s3://b/a.tif", "written to paths"), ("b.zarr", "by export_zarr")],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    source = volume_of(tmp_path, image_like((3, 8, 9)))
    (tmp_path / "there.tif").write_bytes(b"mine")
    with pytest.raises(InputError, match=words):
        export(source, name if "://" in name else tmp_path / name)
    with pytest.raises(InputError, match="exists"):
        export(source, tmp_path / "there.tif")
    with pytest.raises(InputError, match="not inside the volume"):
        export(source, tmp_path / "a.tif", roi=Box.parse("0:9,0:8,0:9"))
    assert (tmp_path / "there.tif").read_bytes() == b"mine"


@pytest.mark.parametrize("name", NAMES)
def test_broken_off_it_leaves_nothing(tmp_path: Path, name: str) -> None:
    source = volume_of(tmp_path, image_like((21, 40, 50)))

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / name, progressed=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.zarr", "source.npy"]
    with pytest.raises(RunError, match="cannot be written"):
        export(source, tmp_path / "no folder" / name)


PEAK = """
import resource, sys
from nrrn_pipeline import export
export(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("name", ["a.tif", "a.mrc", "a.h5", "a.npy"])
def test_memory_does_not_grow_with_the_volume(tmp_path: Path, name: str) -> None:
    peaks = []
    for count in (1, 6):
        source = bare_zarr(tmp_path / f"{count}.zarr", np.zeros((64 * count, 512, 512), np.uint8), (16, 256, 256))
        command = [sys.executable, "-c", PEAK, source, tmp_path / f"{count}{name}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(said.stdout))
    assert peaks[1] < peaks[0] + 40, peaks  # of 84 MB more
