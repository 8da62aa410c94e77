"""Files by the formats' own libraries: the same voxels, the same voxel size; and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import tensorstore
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.formats import Stack, find_stack
from nrrn_pipeline.formats.images import natural, running_numbers
from nrrn_pipeline.geometry import Box, Span, box_of
from tests.support import bare_zarr, image_like

VOXELS = image_like((7, 33, 45))
WIDE = image_like((7, 33, 45), "uint16")
FLOATS = image_like((7, 33, 45), "float32")
NM = (8.0, 4.5, 5.0)
MICROMETERS = tuple(size / 1000 for size in NM)


def tiff(path: Path, voxels: NDArray[Any], **options: Any) -> Path:
    tifffile.imwrite(path, voxels, photometric="minisblack", **options)
    return path


def ome(path: Path, voxels: NDArray[Any], **options: Any) -> Path:
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", NM, strict=True)}
    units = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    return tiff(path.with_suffix(".ome.tif"), voxels, ome=True, metadata={"axes": "ZYX", **sizes, **units}, **options)


def imagej(path: Path, voxels: NDArray[Any], **options: Any) -> Path:
    z, y, x = MICROMETERS
    told = {"axes": "ZYX", "spacing": z, "unit": "um"}
    return tiff(path, voxels, imagej=True, resolution=(1 / x, 1 / y), metadata=told, **options)


def pages(path: Path, voxels: NDArray[Any], **options: Any) -> Path:
    with tifffile.TiffWriter(path) as file:
        for plane in voxels:
            file.write(plane, photometric="minisblack", contiguous=False, **options)
    return path


def slices(folder: Path, voxels: NDArray[Any], name: str = "slice_{}.tif", first: int = 1, **options: Any) -> Path:
    folder.mkdir()
    for z, plane in enumerate(voxels, start=first):
        tiff(folder / name.format(z), plane, **options)
    return folder


def pngs(folder: Path, voxels: NDArray[Any]) -> Path:
    folder.mkdir()
    for z, plane in enumerate(voxels):
        Image.fromarray(plane).save(folder / f"{z}.png")
    return folder


def mrc(path: Path, voxels: NDArray[Any]) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(voxels)
        file.set_volume()
        file.voxel_size = tuple(10 * size for size in NM[::-1])
    return path


def hdf5(path: Path, voxels: NDArray[Any], name: str = "volumes/raw", **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=voxels, **options).attrs["element_size_um"] = MICROMETERS
    return path


def n5(path: Path, voxels: NDArray[Any], dataset: str = "setup0/s0") -> Path:
    spec = {
        "driver": "n5",
        "kvstore": {"driver": "file", "path": f"{path}/{dataset}/"},
        "metadata": {
            "dimensions": voxels.shape[::-1],
            "blockSize": [16, 8, 4],
            "dataType": voxels.dtype.name,
            "compression": {"type": "gzip"},
            "pixelResolution": {"dimensions": NM[::-1], "unit": "nm"},
        },
    }
    tensorstore.open(spec, create=True).result()[...] = voxels.T
    (path / "attributes.json").write_text('{"n5": "2.5.0"}')
    return path


def npy(path: Path, voxels: NDArray[Any]) -> Path:
    np.save(path, voxels)
    return path


Maker = Callable[[Path, NDArray[Any]], Path]
MAKERS: dict[str, tuple[str, Maker]] = {
    "plain.tif": ("contiguous", tiff),
    "zlib.tif": ("compressed", lambda path, voxels: tiff(path, voxels, compression="zlib")),
    "lzw.tif": ("LZW", lambda path, voxels: tiff(path, voxels, compression="lzw", predictor=voxels.dtype.kind != "f")),
    "tiled.tif": ("tiles", lambda path, voxels: tiff(path, voxels, tile=(16, 16), metadata={"axes": "ZYX"})),
    "big.tif": ("BigTIFF", lambda path, voxels: tiff(path, voxels, bigtiff=True)),
    "motorola.tif": ("big-endian", lambda path, voxels: tiff(path, voxels, byteorder=">")),
    "pages.tif": ("page by page", pages),
    "lzw pages.tif": ("the same, compressed", lambda path, voxels: pages(path, voxels, compression="lzw")),
    "ome": ("OME-TIFF", ome),
    "imagej.tif": ("ImageJ", imagej),
    "folder": ("slices", slices),
    "compressed": ("slices", lambda path, voxels: slices(path, voxels, compression="zlib")),
    "volume.mrc": ("MRC", mrc),
    "volume.h5": ("HDF5", hdf5),
    "chunked.h5": ("chunks", lambda path, voxels: hdf5(path, voxels, chunks=(2, 10, 20), compression="gzip")),
    "five.h5": ("t and c", lambda path, voxels: hdf5(path, voxels[None, None])),
    "volume.npy": ("NumPy", npy),
    "volume.zarr": ("Zarr 3", bare_zarr),
    "two.zarr": ("Zarr 2", lambda path, voxels: bare_zarr(path, voxels, zarr_format=2)),
}
WITH_SIZE = {"ome", "imagej.tif", "volume.mrc", "volume.h5", "chunked.h5", "five.h5"}


def read(stack: Stack) -> NDArray[Any]:
    return stack.read(box_of(stack.shape))


@pytest.mark.parametrize("voxels", [VOXELS, WIDE, FLOATS], ids=["uint8", "uint16", "float32"])
@pytest.mark.parametrize("name", MAKERS)
def test_what_the_formats_own_libraries_wrote_is_read_as_it_was(
    tmp_path: Path, name: str, voxels: NDArray[Any]
) -> None:
    found = find_stack([MAKERS[name][1](tmp_path / name, voxels)])
    stored = "uint16" if name.endswith(".mrc") and voxels.dtype == np.uint8 else voxels.dtype.name  # MRC has no uint8
    assert (found.shape, found.dtype) == (voxels.shape, stored)
    assert np.array_equal(read(found), voxels)
    assert found.voxel_nm == (NM if name in WITH_SIZE else None)


@pytest.mark.parametrize("voxels", [VOXELS, WIDE, FLOATS], ids=["uint8", "uint16", "float32"])
def test_a_dataset_of_n5_is_read_as_tensorstore_wrote_it(tmp_path: Path, voxels: NDArray[Any]) -> None:
    found = find_stack([n5(tmp_path / "volume.n5", voxels)], dataset="setup0/s0")
    assert np.array_equal(read(found), voxels)
    assert found.voxel_nm == NM
    assert found.unit == (4, 8, 16)


@pytest.mark.parametrize("voxels", [VOXELS, WIDE], ids=["uint8", "uint16"])
def test_a_folder_of_png_is_read_as_pillow_wrote_it(tmp_path: Path, voxels: NDArray[Any]) -> None:
    assert np.array_equal(read(find_stack([pngs(tmp_path / "images", voxels)])), voxels)


@pytest.mark.parametrize("name", [*MAKERS, "n5"])
def test_any_part_is_that_part_of_the_whole(tmp_path: Path, name: str) -> None:
    path = n5(tmp_path / name, VOXELS) if name == "n5" else MAKERS[name][1](tmp_path / name, VOXELS)
    found, rng = find_stack([path], dataset="setup0/s0" if name == "n5" else None), np.random.default_rng(0)
    for _ in range(20):
        ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in VOXELS.shape]
        box = Box(*(Span(int(start), int(stop)) for start, stop in ends))
        assert np.array_equal(found.read(box), VOXELS[box.within(found_box := box_of(VOXELS.shape))]), (box, found_box)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float64"])
def test_other_dtypes_are_read_to_be_converted(tmp_path: Path, dtype: str) -> None:
    voxels = (VOXELS.astype(np.int64) - 100).clip(0 if dtype.startswith("u") else -100, 100).astype(dtype)
    assert np.array_equal(read(find_stack([npy(tmp_path / "a.npy", voxels)])), voxels)


def test_volumes_are_taken_one_after_the_other_in_natural_order(tmp_path: Path) -> None:
    parts = [(10, VOXELS[5:]), (2, VOXELS[2:5]), (1, VOXELS[:2])]
    found = find_stack([tiff(tmp_path / f"part_{number}.tif", voxels) for number, voxels in parts])
    assert np.array_equal(read(found), VOXELS)
    assert np.array_equal(found.read(Box(Span(1, 6), Span(3, 30), Span(0, 45))), VOXELS[1:6, 3:30])


def test_slices_are_in_natural_order_however_they_are_given(tmp_path: Path) -> None:
    many = image_like((12, 8, 9))
    folder = slices(tmp_path / "a", many)
    assert np.array_equal(read(find_stack([folder])), many)
    assert np.array_equal(read(find_stack(sorted(folder.iterdir(), reverse=True))), many)


def test_a_stack_of_imagej_of_more_than_4_gigabytes_holds_one_page(tmp_path: Path) -> None:
    """So ImageJ writes them: the voxels lie one after the other, and all but the first page are left out."""
    path = imagej(tmp_path / "a.tif", VOXELS)
    with tifffile.TiffFile(path) as file:
        second = file.pages[1].offset
    data = bytearray(path.read_bytes())
    place = bytes(data).index(second.to_bytes(4, "little"))
    data[place : place + 4] = bytes(4)  # no further page
    path.write_bytes(data)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
    assert np.array_equal(read(find_stack([path])), VOXELS)


def refusal(sources: Sequence[Path], **more: Any) -> str:
    with pytest.raises(InputError) as error:
        find_stack(sources, **more)
    return str(error.value)


def test_a_gap_in_the_numbers_is_named_and_filled_or_closed_when_asked(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS)
    (folder / "slice_3.tif").unlink()
    assert "slice 3 is missing between slice_2.tif and slice_4.tif" in refusal([folder])
    blank = find_stack([folder], lacking="blank")
    assert blank.notes == ("slice 3 is missing between slice_2.tif and slice_4.tif: blank slices in their place",)
    wanted = VOXELS.copy()
    wanted[2] = 0
    assert np.array_equal(read(blank), wanted)
    assert np.array_equal(read(find_stack([folder], lacking="skip")), np.delete(VOXELS, 2, axis=0))


def test_slices_of_another_size_or_dtype_are_named(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS)
    tiff(folder / "slice_2.tif", VOXELS[1, :20])
    tiff(folder / "slice_5.tif", WIDE[1])
    said = refusal([folder])
    assert "slice_2.tif is 20 x 45 uint8, not 33 x 45 uint8" in said
    assert "slice_5.tif is 33 x 45 uint16, not 33 x 45 uint8" in said
    assert find_stack([folder], lacking="blank").shape == VOXELS.shape
    assert find_stack([folder], lacking="skip").shape == (5, 33, 45)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_slice_that_is_cut_short_is_named(tmp_path: Path, compression: str | None, left: float) -> None:
    folder = slices(tmp_path / "a", VOXELS, compression=compression)
    torn = folder / "slice_4.tif"
    torn.write_bytes(torn.read_bytes()[: int(left * torn.stat().st_size)])
    assert "slice_4.tif is" in refusal([folder])
    wanted = VOXELS.copy()
    wanted[3] = 0
    assert np.array_equal(read(find_stack([folder], lacking="blank")), wanted)


def test_a_png_that_is_cut_short_is_named(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "a", VOXELS)
    torn = folder / "4.png"
    torn.write_bytes(torn.read_bytes()[:-50])
    assert "4.png is cut short" in refusal([folder])


@pytest.mark.parametrize("name", ["plain.tif", "pages.tif", "ome", "imagej.tif", "volume.mrc", "volume.npy"])
def test_a_volume_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    path = MAKERS[name][1](tmp_path / name, VOXELS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refusal([path])


@pytest.mark.parametrize("name", [name for name in MAKERS if name.endswith((".tif", ".mrc", ".h5", ".npy"))])
def test_a_file_of_other_bytes_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a volume" * 100)
    assert str(tmp_path / name) in refusal([tmp_path / name])
    (tmp_path / name).write_bytes(b"")
    assert str(tmp_path / name) in refusal([tmp_path / name])


def test_a_slice_that_does_not_decode_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS, compression="zlib")
    torn = folder / "slice_4.tif"
    with tifffile.TiffFile(torn) as file:
        place, length = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    data = bytearray(torn.read_bytes())
    data[place : place + length] = bytes(length)
    torn.write_bytes(data)
    found = find_stack([folder])
    with pytest.raises(StorageError, match=r"slice_4\.tif cannot be decoded"):
        read(found)
    torn.unlink()
    with pytest.raises(StorageError, match=r"slice_4\.tif is gone"):
        read(found)


def test_what_is_no_volume_is_refused_in_words(tmp_path: Path) -> None:
    colour = tmp_path / "colour.tif"
    tifffile.imwrite(colour, np.zeros((5, 6, 3), np.uint8), photometric="rgb")
    assert "holds colours" in refusal([colour])
    channels = tmp_path / "channels.tif"
    tifffile.imwrite(channels, np.zeros((4, 2, 8, 9), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    assert "axes Z 4, C 2, Y 8, X 9" in refusal([channels])
    odd = tmp_path / "odd.tif"
    with tifffile.TiffWriter(odd) as file:
        for plane in (VOXELS[0], VOXELS[1, :10]):
            file.write(plane, photometric="minisblack")
    assert "page 1" in refusal([odd])
    assert "nothing there" in refusal([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    assert "nothing there" in refusal([tmp_path / "empty"])
    (tmp_path / "notes.txt").write_text("")
    assert "of no kind that can be read" in refusal([tmp_path / "notes.txt"])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("")
    assert "holds no slices" in refusal([tmp_path / "texts"])


def test_a_folder_of_several_kinds_of_images_is_refused(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS)
    Image.fromarray(VOXELS[0]).save(folder / "thumbnail.png")
    assert "images of several kinds (.png, .tif)" in refusal([folder])


def test_other_files_in_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS)
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "._slice_1.tif").write_bytes(b"")
    found = find_stack([folder])
    assert found.notes == ("left out, as they are no images: ._slice_1.tif, Thumbs.db",)
    assert np.array_equal(read(found), VOXELS)


def test_volumes_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    paths = [npy(tmp_path / "a.npy", VOXELS), npy(tmp_path / "b.npy", VOXELS[:, :20])]
    assert "33 x 45 uint8" in refusal(paths)


def test_of_several_datasets_one_has_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["raw"], file["labels"], file["table"] = VOXELS, WIDE, np.zeros(3)
    said = refusal([path])
    assert "--dataset" in said
    assert "/raw (7, 33, 45)" in said
    assert np.array_equal(read(find_stack([path], dataset="labels")), WIDE)
    assert "no dataset nothing" in refusal([path], dataset="nothing")
    assert "is (3,), no volume" in refusal([path], dataset="table")
    assert "give its --dataset; there are setup0" in refusal([n5(tmp_path / "a.n5", VOXELS)])


def test_axes_of_a_map_in_another_order_are_refused(tmp_path: Path) -> None:
    path = mrc(tmp_path / "a.mrc", VOXELS.astype(np.float32))
    with mrcfile.open(path, "r+") as file:
        file.header.mapc, file.header.maps = 3, 1
    assert "axes in the order (3, 2, 1)" in refusal([path])


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["a1.tif", "a2.tif", "a3.tif"], 0),
        (["0005.tif", "0010.tif", "0020.tif", "0025.tif", "0030.tif"], 1),
        (["s_00001_z=0.0100um.tif", "s_00002_z=0.0200um.tif", "s_00003_z=0.0310um.tif"], 0),
        (["t1_s10.tif", "t1_s11.tif", "t1_s13.tif", "t1_s14.tif"], 1),
        (["z0.5.tif", "z1.0.tif", "z2.0.tif"], 1),
        ([f"s{n:04}.tif" for n in (*range(1, 101), *range(151, 251))], 50),
    ],
)
def test_the_number_that_counts_slices_is_found(names: list[str], missing: int) -> None:
    numbers = running_numbers("f", names)
    assert numbers is not None
    assert sum(numbers.missing_before(place) for place in range(1, len(names))) == missing


@pytest.mark.parametrize("names", [["a.tif", "b.tif"], ["1.tif"], ["1.tif", "9.tif", "99.tif"]])
def test_names_that_do_not_count_have_no_gaps(names: list[str]) -> None:
    assert running_numbers("f", names) is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["s_1_ESB.tif", "s_1_InLens.tif", "s_2_ESB.tif", "s_2_InLens.tif"], "several kinds of names, s_#_ESB.tif"),
        (["s_1_ch0.tif", "s_1_ch1.tif", "s_2_ch0.tif", "s_2_ch1.tif"], "no number in the names rises"),
        (["slice_1.tif", "slice_01.tif"], "no number in the names rises"),
    ],
)
def test_a_folder_of_several_detectors_channels_or_tiles_is_refused(
    tmp_path: Path, names: list[str], words: str
) -> None:
    for name in names:
        tiff(tmp_path / name, VOXELS[0])
    assert words in refusal([tmp_path], lacking="skip")


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=50, unique=True))
def test_natural_order_is_that_of_the_numbers(numbers: list[int]) -> None:
    names = sorted((f"slice_{number}.tif" for number in numbers), key=natural)
    assert names == [f"slice_{number}.tif" for number in sorted(numbers)]


def test_decimals_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    for number, plane in zip(("0.25", "0.5", "0.75", "1.0"), VOXELS, strict=False):
        tiff(tmp_path / f"z{number}.tif", plane)
    assert np.array_equal(read(find_stack([tmp_path])), VOXELS[:4])


@pytest.mark.parametrize(
    ("axes", "shape"), [("CYX", (2, 6, 8)), ("XYZ", (20, 6, 8)), ("YXZ", (6, 8, 5)), ("TZYX", (2, 3, 6, 8))]
)
def test_axes_that_are_no_slices_are_refused(tmp_path: Path, axes: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), metadata={"axes": axes}, photometric="minisblack")
    assert "has the axes" in refusal([path])


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for _ in range(2):
            file.write(VOXELS, photometric="minisblack", metadata={"axes": "ZYX"})
    assert "holds 2 images" in refusal([path])


def test_a_volume_that_is_stored_as_one_is_refused(tmp_path: Path) -> None:
    path, voxels = tmp_path / "a.tif", np.zeros((32, 64, 64), np.uint8)
    tifffile.imwrite(path, voxels, volumetric=True, tile=(16, 16, 16), photometric="minisblack")
    refusal([path])


def test_a_palette_of_greys_is_grey(tmp_path: Path) -> None:
    ramp = np.stack([np.arange(256) * 257] * 3).astype(np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VOXELS, photometric="palette", colormap=ramp)
    assert np.array_equal(read(find_stack([path])), VOXELS)
    tifffile.imwrite(path, VOXELS, photometric="palette", colormap=ramp[:, ::-1].copy())
    assert "holds colours" in refusal([path])


def test_units_of_each_axis_count_in_imagej(tmp_path: Path) -> None:
    path, told = tmp_path / "a.tif", {"axes": "ZYX", "spacing": 8, "unit": "micron", "zunit": "nm"}
    tiff(path, VOXELS, imagej=True, resolution=(200, 200), metadata=told)
    assert find_stack([path]).voxel_nm == (8, 5, 5)


def test_voxels_in_another_file_are_read_or_missed(tmp_path: Path) -> None:
    hdf5(tmp_path / "source.h5", VOXELS, "d")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(VOXELS.shape, np.uint8)
        layout[:] = h5py.VirtualSource("source.h5", "d", VOXELS.shape)
        file.create_virtual_dataset("d", layout)
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["d"] = h5py.ExternalLink("source.h5", "d")
    assert np.array_equal(read(find_stack([tmp_path / "virtual.h5"])), VOXELS)
    assert np.array_equal(read(find_stack([tmp_path / "linked.h5"], dataset="d")), VOXELS)
    (tmp_path / "source.h5").unlink()
    said = refusal([tmp_path / "virtual.h5"])
    assert "refers to voxels in other files, which cannot be read from here: source.h5" in said


@pytest.mark.parametrize(
    ("shape", "tags", "found"),
    [
        ((7, 33, 45, 1), None, True),
        ((1, 7, 33, 45, 1), None, True),
        ((1, 7, 33, 45, 1), "tzyxc", True),
        ((45, 33, 7), "xyz", False),
        ((2, 7, 33, 45), "czyx", False),
    ],
)
def test_single_axes_of_ilastik_are_left_out_and_others_refused(
    tmp_path: Path, shape: tuple[int, ...], tags: str | None, found: bool
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["d"] = np.resize(VOXELS, shape)
        if tags:
            file["d"].attrs["axistags"] = json.dumps({"axes": [{"key": key} for key in tags]})
    if found:
        assert np.array_equal(read(find_stack([path])), VOXELS)
    else:
        assert f"axes {tags}" in refusal([path])


@pytest.mark.parametrize(("flags", "dtype"), [(0, "uint8"), (1, "int8")])
def test_bytes_of_imod_have_a_sign_if_it_says_so(tmp_path: Path, flags: int, dtype: str) -> None:
    path = mrc(tmp_path / "a.mrc", VOXELS.view(np.int8))
    data = bytearray(path.read_bytes())
    data[152:160] = np.array([1146047817, flags], "<i4").tobytes()
    path.write_bytes(data)
    assert np.array_equal(read(find_stack([path])), VOXELS.view(dtype))


def test_bytes_and_sizes_that_mean_nothing_certain_are_said(tmp_path: Path) -> None:
    path = mrc(tmp_path / "a.mrc", VOXELS.view(np.int8))
    with mrcfile.open(path, "r+") as file:
        file.voxel_size = 1.0
    data = bytearray(path.read_bytes())
    data[212:216] = bytes(4)  # the machine's stamp
    path.write_bytes(data)
    found = find_stack([path])
    assert found.voxel_nm is None
    assert "signed by the standard" in found.notes[0]
    assert "1 x 1 x 1 angstrom" in found.notes[1]


def test_voxels_of_a_lower_level_of_n5_are_larger(tmp_path: Path) -> None:
    path = n5(tmp_path / "a.n5", VOXELS)
    attributes = path / "setup0" / "s0" / "attributes.json"
    attributes.write_text(json.dumps(json.loads(attributes.read_text()) | {"downsamplingFactors": [2, 2, 1]}))
    assert find_stack([path], dataset="setup0/s0").voxel_nm == (8, 9, 10)


def test_a_link_that_leads_nowhere_and_a_folder_are_slices_that_lack(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", VOXELS)
    (folder / "slice_7.tif").unlink()
    (folder / "slice_7.tif").symlink_to("nowhere.tif")
    (folder / "slice_8.tif").mkdir()
    said = refusal([folder])
    assert "slice_7.tif cannot be read: No such file" in said
    assert "slice_8.tif cannot be read: Is a directory" in said


@pytest.mark.parametrize("lacking", ["refuse", "blank", "skip"])
def test_what_storage_refuses_is_never_a_slice_that_lacks(
    tmp_path: Path, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = slices(tmp_path / "a", VOXELS)

    def refusing(url: str) -> Any:
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr("nrrn_pipeline.formats.images.find_tiff", refusing)
    assert "Permission denied" in refusal([folder], lacking=lacking)


def test_a_large_png_is_no_attack(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((14000, 13000), np.uint8)).save(tmp_path / "0.png", compress_level=1)
    assert find_stack([tmp_path / "0.png"]).shape == (1, 14000, 13000)
