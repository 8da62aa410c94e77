"""What a user does from the command line, on small volumes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from nrrn_pipeline import open_volume
from nrrn_pipeline.network import NRRN, load_weights, read_header
from nrrn_pipeline.volume import read_box
from tests.commands import Nrrn, Said
from tests.support import bare_zarr, image_like, stored_chunks, tiny_network, tiny_weights, whole_slices

LAYOUT = ("--chunk", "4,16,32", "--shard", "4,32,64", "--tile", "40")
NM = {"c": 1.0, "t": 1.0, "z": 8.0, "y": 4.0, "x": 4.0}


@dataclass(frozen=True)
class Denoise:
    """`nrrn denoise` of a source that is there, with weights that are there; all calls succeed."""

    folder: Path
    nrrn: Nrrn

    def __call__(self, *options: str, output: str = "out.zarr", source: str = "raw.zarr") -> Said:
        paths = (self.folder / source, self.folder / output, "--weights", self.folder / "w.safetensors")
        said = self.nrrn("denoise", *paths, "--cluster", "serial", *options)
        assert said.status == 0, said.err
        return said

    def voxels(self, output: str = "out.zarr") -> NDArray[Any]:
        volume = open_volume(self.folder / output)
        return read_box(volume, volume.box)


@pytest.fixture
def denoise(tmp_path: Path, nrrn: Nrrn) -> Denoise:
    bare_zarr(tmp_path / "raw.zarr", image_like((8, 64, 64)))
    tiny_weights(tmp_path / "w.safetensors")
    return Denoise(tmp_path, nrrn)


def ome_zarr(path: Path, voxels: NDArray[Any], axes: str, version: str) -> Path:
    """An OME-Zarr image of one level."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    group.create_array("s0", data=voxels, chunks=tuple(min(32, length) for length in voxels.shape))
    kinds = {"t": "time", "c": "channel"}
    units = {axis: {"unit": "nanometer"} for axis in "zyx"}
    image = {
        "axes": [{"name": axis, "type": kinds.get(axis, "space"), **units.get(axis, {})} for axis in axes],
        "datasets": [
            {"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": [NM[axis] for axis in axes]}]}
        ],
    }
    attributes = {"multiscales": [image]}
    group.attrs.update({"ome": {"version": "0.5", **attributes}} if version == "0.5" else attributes)
    return path


def test_the_output_is_the_network_on_whole_slices(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    expected = whole_slices(tiny_network(), image_like((8, 64, 64)))
    assert np.abs(denoise.voxels().astype(float) - np.clip(expected, 0, 255)).max() <= 0.501


@pytest.mark.parametrize(
    ("dtype", "axes", "version"), [("uint16", "tczyx", "0.4"), ("uint16", "czyx", "0.5"), ("uint8", "zyx", "0.5")]
)
def test_the_output_mirrors_an_ome_zarr(denoise: Denoise, dtype: str, axes: str, version: str) -> None:
    voxels = image_like((6, 40, 48), dtype)
    lead = (1,) * (len(axes) - 3)
    source = open_volume(ome_zarr(denoise.folder / "image.zarr", voxels.reshape(lead + voxels.shape), axes, version))
    denoise(source="image.zarr")
    made = open_volume(denoise.folder / "out.zarr")
    assert (made.shape, made.dtype, made.axes) == (source.shape, dtype, tuple(axes))
    assert made.voxel_nm == source.voxel_nm == (8.0, 4.0, 4.0)
    assert zarr.open_array(denoise.folder / "out.zarr" / "0", mode="r").shape == lead + voxels.shape


def test_the_output_mirrors_a_bare_float_array(denoise: Denoise) -> None:
    bare_zarr(denoise.folder / "float.zarr", image_like((6, 40, 48), "float32"))
    denoise(source="float.zarr")
    made = open_volume(denoise.folder / "out.zarr")
    assert (made.shape, made.dtype, made.axes, made.voxel_nm) == ((6, 40, 48), "float32", ("z", "y", "x"), None)
    expected = whole_slices(tiny_network(), image_like((6, 40, 48), "float32"))
    np.testing.assert_allclose(denoise.voxels(), expected, atol=1e-5)


def test_the_output_is_a_sharded_ome_zarr(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    group = zarr.open_group(denoise.folder / "out.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    assert group.attrs["ome"]["version"] == "0.5"
    assert (group["0"].chunks, group["0"].shards) == ((4, 16, 32), (4, 32, 64))
    assert len(stored_chunks(denoise.folder / "out.zarr" / "0")) == 2 * 2 * 1


def test_the_output_says_how_it_was_made(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    made = zarr.open_group(denoise.folder / "out.zarr", mode="r").attrs["nrrn"]
    assert made["state"] == "complete"
    assert re.fullmatch("[0-9a-f]{64}", made["fingerprint"])
    assert made["weights"] == str(denoise.folder / "w.safetensors")
    assert {"python", "nrrn-pipeline", "torch", "zarr"} <= set(made["versions"])
    settings = made["settings"]
    assert settings["source"] == str(denoise.folder / "raw.zarr")
    assert (settings["tile"], settings["halo"], settings["images"], settings["statistics"]) == (40, 4, 3, "slice")
    assert (settings["slab"], settings["shard"], settings["chunk"]) == ([4, 32, 64], [4, 32, 64], [4, 16, 32])


def test_a_run_sums_up_what_it_did(denoise: Denoise) -> None:
    said = denoise(*LAYOUT)
    first, second = said.out.splitlines()
    assert first == f"{denoise.folder / 'out.zarr'}: complete, 4 slabs"
    assert re.fullmatch(r"[\d.]+ s, [\d.]+ million voxels/s, peak memory of a worker [\d.]+ [MG]B", second)


def test_a_profile_says_where_the_time_went(denoise: Denoise) -> None:
    rows = dict(line.split("  ", 1) for line in denoise("--profile").out.splitlines()[2:] if not line.startswith(" "))
    assert rows.keys() == {"statistics and start", "denoising", "bottleneck"}
    assert "network" in denoise("--profile", "--overwrite").out


def test_a_second_run_redoes_nothing(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    before = _times(denoise.folder / "out.zarr")
    said = denoise(*LAYOUT)
    assert said.out == f"{denoise.folder / 'out.zarr'}: complete, 4 slabs, 4 of them done before\n"
    assert _times(denoise.folder / "out.zarr") == before


def test_only_what_is_not_recorded_is_done_again(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    out = denoise.folder / "out.zarr" / "0"
    before, times = stored_chunks(out), _times(out)
    (record,) = (out / "nrrn" / "slabs").glob("z4-y32-x0.*.json")
    record.unlink()
    assert "3 of them done before" in denoise(*LAYOUT).out
    assert stored_chunks(out) == before
    written = {name.partition(".")[0] for name, time in _times(out).items() if times.get(name) != time}
    assert written == {"c/1/1/0", "nrrn/slabs/z4-y32-x0"}


def test_overwrite_starts_again(denoise: Denoise) -> None:
    denoise(*LAYOUT)
    said = denoise("--overwrite")
    assert said.out.splitlines()[0] == f"{denoise.folder / 'out.zarr'}: complete, 1 slab"
    assert open_volume(denoise.folder / "out.zarr").chunk == (8, 64, 64)


def test_overwrite_replaces_any_other_zarr(denoise: Denoise) -> None:
    bare_zarr(denoise.folder / "out.zarr", image_like((5, 7, 9)))
    denoise("--overwrite")
    assert denoise.voxels().shape == (8, 64, 64)


@pytest.mark.parametrize("roi", ["0:8,0:64,0:64", "2:7,9:50,13:61", "0:1,0:64,30:64", "7:8,63:64,0:1"])
def test_a_roi_equals_that_part_of_the_whole(denoise: Denoise, roi: str) -> None:
    denoise(*LAYOUT)
    denoise("--roi", roi, output="part.zarr")
    z, y, x = (slice(*map(int, part.split(":"))) for part in roi.split(","))
    whole, part = denoise.voxels().astype(int)[z, y, x], denoise.voxels("part.zarr").astype(int)
    assert part.shape == whole.shape
    assert np.abs(part - whole).max() <= 1


def test_a_roi_knows_where_it_lies(denoise: Denoise) -> None:
    ome_zarr(denoise.folder / "image.zarr", image_like((6, 40, 48)), "zyx", "0.5")
    denoise("--roi", "2:6,10:40,12:48", source="image.zarr")
    image = zarr.open_group(denoise.folder / "out.zarr", mode="r").attrs["ome"]["multiscales"][0]
    assert image["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [8.0, 4.0, 4.0]},
        {"type": "translation", "translation": [16.0, 40.0, 48.0]},
    ]


def test_each_method_gives_its_own_output(denoise: Denoise) -> None:
    methods = {"three": (), "two": ("--images", "2"), "one": ("--images", "1"), "volume": ("--stats", "volume")}
    for name, options in methods.items():
        denoise(*options, output=name)
    for a, b in combinations(methods, 2):
        assert (denoise.voxels(a) != denoise.voxels(b)).any()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_images_choose_the_branches(denoise: Denoise, images: int) -> None:
    denoise("--images", str(images))
    expected = whole_slices(tiny_network(), image_like((8, 64, 64)), images)
    assert np.abs(denoise.voxels().astype(float) - np.clip(expected, 0, 255)).max() <= 0.501


@pytest.mark.parametrize("with_weights", [True, False])
def test_plan_tells_what_a_run_will_take_and_writes_nothing(
    denoise: Denoise, nrrn: Nrrn, with_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    weights = ("--weights", denoise.folder / "w.safetensors") if with_weights else ()
    before = _times(denoise.folder)
    said = nrrn("plan", denoise.folder / "raw.zarr", denoise.folder / "out.zarr", *weights, *LAYOUT, "--workers", "1")
    assert said.status == 0, said.err
    told = _table(said.out)
    assert told["slabs"].startswith("4 of 4 x 32 x 64, tile 40, halo ")
    assert re.fullmatch(r"\d+: \d+ for statistics, 4 to denoise", told["tasks"])
    assert re.fullmatch(r"[\d.]+ KB; [\d.]+ KB in whole chunks of the source, by 1 worker", told["reads"])
    assert re.fullmatch(r"[\d.]+; [\d.]+ in whole chunks", told["read amplification"])
    assert told["writes"] == "32.77 KB before compression"
    assert re.fullmatch(r"[\d.e-]+ TFLOP", told["arithmetic"])
    assert re.fullmatch(
        r"[\d.]+ MB a worker at its peak, [\d.]+ KB of it chunks of the source that it keeps", told["memory"]
    )
    assert re.fullmatch(r"\d+ seconds of the network with 1 worker, from one timed tile", told["time"])
    assert told["method"] == (
        "1 unit, 4 channels" if with_weights else "4 units, 64 channels: the paper's, as no --weights are given"
    )
    assert _times(denoise.folder) == before


def test_info_describes_a_volume(denoise: Denoise, nrrn: Nrrn) -> None:
    denoise(*LAYOUT)
    told = _table(nrrn("info", denoise.folder / "out.zarr").out)
    assert told["shape (z, y, x)"] == "8 x 64 x 64"
    assert told["dtype"] == "uint8"
    assert (told["chunk"], told["shard"]) == ("4 x 16 x 32", "4 x 32 x 64")
    assert told["axes"] == "z,y,x"


def test_info_describes_weights(denoise: Denoise, nrrn: Nrrn) -> None:
    told = _table(nrrn("info", denoise.folder / "w.safetensors").out)
    assert (told["units"], told["channels"]) == ("1", "4")
    assert re.fullmatch("[0-9a-f]{64}", told["sha256"])
    assert told["note"] == "random, for tests"


def test_info_shows_all_of_the_provenance_on_any_terminal(denoise: Denoise, nrrn: Nrrn) -> None:
    denoise()
    made = zarr.open_group(denoise.folder / "out.zarr", mode="r").attrs["nrrn"]
    said = nrrn("info", denoise.folder / "out.zarr")
    assert made["fingerprint"] in said.out
    assert made["settings"]["weights sha256"] in said.out


def test_a_whole_output_verifies(denoise: Denoise, nrrn: Nrrn) -> None:
    denoise(*LAYOUT)
    said = nrrn("verify", denoise.folder / "out.zarr")
    assert said.status == 0
    assert "is whole: every slab is recorded, every shard is there" in said.out
    said = nrrn("verify", denoise.folder / "out.zarr", "--deep")
    assert said.status == 0
    assert "is whole: every slab is recorded, every byte is as it was written" in said.out


def test_a_roi_verifies(denoise: Denoise, nrrn: Nrrn) -> None:
    denoise(*LAYOUT, "--roi", "1:7,5:64,3:60")
    assert nrrn("verify", denoise.folder / "out.zarr").status == 0


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _cut_all(_: bytes) -> bytes:
    return b""


def _flip_voxels(data: bytes) -> bytes:
    return data[:100] + bytes(byte ^ 0xFF for byte in data[100:116]) + data[116:]


def _flip_one_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _flip_index(data: bytes) -> bytes:
    return data[:-20] + bytes(byte ^ 0xFF for byte in data[-20:-16]) + data[-16:]


@pytest.mark.parametrize("damage", [_cut, _cut_all, _flip_voxels, _flip_one_bit, _flip_index])
@pytest.mark.parametrize("layout", [LAYOUT, ("--chunk", "4,32,64", "--shard", "4,32,64")], ids=["sharded", "chunked"])
def test_a_damaged_file_is_named(
    denoise: Denoise, nrrn: Nrrn, layout: tuple[str, ...], damage: Callable[[bytes], bytes]
) -> None:
    denoise(*layout)
    file = denoise.folder / "out.zarr" / "0" / "c" / "1" / "0" / "0"
    file.write_bytes(damage(file.read_bytes()))
    said = nrrn("verify", denoise.folder / "out.zarr", "--deep")
    assert said.status == 1
    assert re.fullmatch("slab z4-y0-x0: .*\n", said.out)
    assert "is not whole: 1 problem" in said.err
    quick = nrrn("verify", denoise.folder / "out.zarr")
    assert quick.status == (1 if damage in (_cut, _cut_all) else 0)


@pytest.mark.parametrize("layout", [LAYOUT, ("--chunk", "4,32,64", "--shard", "4,32,64")], ids=["sharded", "chunked"])
def test_a_deleted_file_is_named(denoise: Denoise, nrrn: Nrrn, layout: tuple[str, ...]) -> None:
    denoise(*layout)
    (denoise.folder / "out.zarr" / "0" / "c" / "0" / "1" / "0").unlink()
    said = nrrn("verify", denoise.folder / "out.zarr")
    assert said.status == 1
    assert said.out == "slab z0-y32-x0: 1 of its shards are gone\n"


@pytest.mark.parametrize(("options", "key"), [((), "z4-y32-x0"), (("--roi", "1:8,2:60,3:64"), "z5-y34-x3")])
def test_a_deleted_record_is_named(denoise: Denoise, nrrn: Nrrn, options: tuple[str, ...], key: str) -> None:
    denoise(*LAYOUT, *options)
    (record,) = (denoise.folder / "out.zarr" / "0" / "nrrn" / "slabs").glob(f"{key}.*.json")
    record.unlink()
    said = nrrn("verify", denoise.folder / "out.zarr")
    assert said.status == 1
    assert said.out == f"slab {key} has no record: it is not done\n"


def test_every_damage_is_listed_and_nothing_is_changed_by_looking(denoise: Denoise, nrrn: Nrrn) -> None:
    denoise(*LAYOUT)
    array = denoise.folder / "out.zarr" / "0"
    shutil.rmtree(array / "c" / "0")
    (array / "c" / "1" / "1" / "0").write_bytes(b"torn")
    before = _times(array)
    said = nrrn("verify", denoise.folder / "out.zarr")
    assert said.status == 1
    assert len(said.out.splitlines()) == 3
    assert _times(array) == before


def _vemden(network: NRRN) -> dict[str, torch.Tensor]:
    """The network under the names that its authors' tool gives its layers."""
    names = {"first": "conv1", "advance": "conv3", "last": "conv2"}
    gates = {"centre": "b", "neighbour": "a"}
    state = {}
    for name, tensor in network.state_dict().items():
        *path, kind = name.split(".")
        if path[0] != "units":
            state[f"{names[path[0]]}.{kind}"] = tensor
            continue
        for gate, part in zip(("Gate_update", "Gate_reset", "Gates2"), tensor.chunk(3), strict=True):
            state[f"BU.{path[1]}.{gate}_{gates[path[2]]}.{kind}"] = part.clone()
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_imported_weights_are_the_same_network(nrrn: Nrrn, tmp_path: Path, prefix: str) -> None:
    network = tiny_network(units=2, channels=3, seed=7)
    torch.save({prefix + name: tensor for name, tensor in _vemden(network).items()}, tmp_path / "theirs.pt")
    said = nrrn("weights", "import", tmp_path / "theirs.pt", tmp_path / "ours.safetensors")
    assert said.out == f"{tmp_path / 'ours.safetensors'}: 2 units, 3 channels\n"
    imported = load_weights(tmp_path / "ours.safetensors").state_dict()
    assert imported.keys() == network.state_dict().keys()
    assert all(torch.equal(imported[name], tensor) for name, tensor in network.state_dict().items())


def test_trained_weights_denoise(denoise: Denoise, nrrn: Nrrn) -> None:
    weights = denoise.folder / "trained.safetensors"
    small = ("--units", "1", "--channels", "2", "--steps", "3", "--crop", "16", "--batch", "2")
    said = nrrn("train", denoise.folder / "raw.zarr", "--out", weights, *small)
    assert said.status == 0, said.err
    first, held_out = said.out.splitlines()
    assert re.fullmatch(r".*: 1 unit, 2 channels, loss \w+, as (the noise is white|neighbouring voxels) .*", first)
    assert held_out == "no slices were held out: they are too few"
    assert _table(nrrn("info", weights).out)["channels"] == "2"
    said = denoise("--weights", str(weights))
    assert "complete, 1 slab" in said.out
    made = zarr.open_group(denoise.folder / "out.zarr", mode="r").attrs["nrrn"]
    assert made["weights"] == str(weights)


def test_several_volumes_are_trained_on_where_masks_and_parts_say(denoise: Denoise, nrrn: Nrrn) -> None:
    folder = denoise.folder
    voxels = np.random.default_rng(1).integers(0, 255, (30, 20, 22), np.uint8)
    bare_zarr(folder / "first.zarr", voxels)
    bare_zarr(folder / "second.zarr", voxels[:9])
    for name, of in (("first", voxels), ("second", voxels[:9])):
        bare_zarr(folder / f"{name}-mask.zarr", (of > 9).astype(np.uint8))
    small = ("--units", "1", "--channels", "2", "--steps", "3", "--crop", "16", "--batch", "2", "--loss", "adjacent")
    beside = [
        *("--mask", folder / "first-mask.zarr", "--mask", folder / "second-mask.zarr"),
        *("--roi", "0:30,0:20,4:22", "--roi", "1:9,0:20,0:22"),
    ]
    both = (folder / "first.zarr", folder / "second.zarr")
    said = nrrn("train", *both, "--out", folder / "both.safetensors", *small, *beside)
    assert said.status == 0, said.err
    assert "on 2 slices held out the loss fell" in said.out
    told = read_header(folder / "both.safetensors")["training"]["volumes"]
    assert [volume["source"] for volume in told] == [str(path) for path in both]
    assert [volume["roi"] for volume in told] == ["0:30,0:20,4:22", "1:9,0:20,0:22"]
    assert [volume["held_out"] for volume in told] == [[14, 15], []]
    said = nrrn("train", *both, "--out", folder / "none.safetensors", *small, *beside[:2])
    assert said.status == 2
    assert "--mask is given 1 time for 2 volumes: give it once for each, in the same order, or leave it out" in said.err
    assert not (folder / "none.safetensors").exists()


def _times(folder: Path) -> dict[str, int]:
    """When each file was last written, in ns; but for those of drivers, of which each run leaves its own."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.name != "drivers"]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def _table(text: str) -> dict[str, str]:
    """The rows of a printed table: names and what stands beside them."""
    rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines() if not line.startswith(" "))
    return {row[0]: row[1] for row in rows if len(row) == 2}
