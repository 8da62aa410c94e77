"""Bad input: one clear line, exit status 1 or 2, and nothing written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from nrrn_pipeline.ledger import Ledger
from tests.commands import Nrrn
from tests.support import bare_zarr, image_like, tiny_weights

PROGRESS = re.compile(r"\d+ slabs? on .*|statistics .*")


@dataclass(frozen=True)
class Lab:
    """A folder with a good source and good weights, and the command line to refuse things with."""

    folder: Path
    call: Callable[..., tuple[int, str]]

    @property
    def source(self) -> Path:
        return self.folder / "raw.zarr"

    @property
    def weights(self) -> Path:
        return self.folder / "w.safetensors"

    def denoise(self, *options: object, source: object = None, output: object = None, weights: object = None) -> None:
        """A good call, but for what is given; it must succeed."""
        assert self._run("denoise", *options, source=source, output=output, weights=weights)[0] == 0

    def refusal(self, *options: object, command: str = "denoise", begun: bool = False, **given: object) -> str:
        """The one line that a call is refused with; `begun`: progress may stand before it."""
        before = self.listing()
        status, err = self._run(command, *options, **given)
        lines = [line for line in err.splitlines() if line.strip() and not (begun and PROGRESS.fullmatch(line))]
        assert status in (1, 2), err
        assert len(lines) == 1, err
        assert lines[0].startswith("nrrn: ")
        assert self.listing() == before
        return lines[0]

    def listing(self) -> dict[str, bytes | None]:
        """Every file with its bytes, every folder and link."""
        found = sorted(self.folder.rglob("*"))
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None for path in found}

    def _run(
        self, command: str, *options: object, source: object = None, output: object = None, weights: object = None
    ) -> tuple[int, str]:
        output = output or self.folder / "out.zarr"
        cluster = () if "--cluster" in options else ("--cluster", "serial")
        return self.call(
            command, source or self.source, output, "--weights", weights or self.weights, *cluster, *options
        )


@pytest.fixture
def lab(tmp_path: Path, nrrn: Nrrn) -> Lab:
    def call(*words: object) -> tuple[int, str]:
        said = nrrn(*words)
        return said.status, said.err

    bare_zarr(tmp_path / "raw.zarr", image_like((8, 48, 64)))
    tiny_weights(tmp_path / "w.safetensors")
    return Lab(tmp_path, call)


OPTIONS = {
    "--slab 4,48,64": "slab z=4 .* write unit 8.* use z=8",
    "--chunk 8,16,16 --shard 8,32,64 --slab 8,40,64": "slab y=40 .* write unit 32.* use y=32",
    "--chunk 8,16,16 --shard 8,48,32 --slab 8,48,33": "slab x=33 .* write unit 32.* use x=32",
    "--chunk 3,48,64 --shard 8,48,64": "shard z=8 .* chunk's 3; use z=9",
    "--halo 3": "halo 3 .* reach 4: .* use 4 or more",
    "--halo -1": "halo -1 .* reach 4",
    "--tile 8": "tile 8 .* halo of 4 .* use 9 or more",
    "--tile 0": "tile 0 .* halo of 4",
    "--roi 0:9,0:48,0:64": "roi z=0:9 .* 0:8",
    "--roi 0:8,-1:48,0:64": "roi y=-1:48 .* 0:48",
    "--roi 0:8,0:48,30:30": "roi x=30:30 is empty",
    "--roi 0:8,0:48": "--roi '0:8,0:48' is not understood: expected Z0:Z1,Y0:Y1,X0:X1",
    "--roi z,y,x": "--roi 'z,y,x' is not understood",
    "--roi 1,2,3": "--roi '1,2,3' is not understood",
    "--roi 0:8:2,0:48,0:64": "--roi '0:8:2,0:48,0:64' is not understood",
    "--level 1": "no level 1",
    "--level -1": "no level -1",
    "--images 4": "images 4 is not possible: use 3",
    "--stats median": "statistics 'median' is unknown: use slice or volume",
    "--device tpu": "device 'tpu' is unknown: use auto, cpu",
    "--slab 8,48": "--slab '8,48' is not understood: expected three numbers Z,Y,X",
    "--slab 8,48,many": "--slab '8,48,many' is not understood",
    "--slab 0,48,64": r"slab \(0, 48, 64\) is not possible",
    "--chunk 8;48;64": "--chunk '8;48;64' is not understood",
    "--shard -8,48,64": r"shard \(-8, 48, 64\) is not possible",
    "--cluster local --workers 0": "workers 0 is not possible: use 1 or more",
    "--cluster local --workers -2": "workers -2 is not possible: use 1 or more",
    "--cluster local --workers 1000000": "1000000 workers of .* cannot fit: .* are free; use --workers ",
}


@pytest.mark.parametrize("command", ["denoise", "plan"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_setting_that_cannot_work_is_refused_with_what_to_use(lab: Lab, options: str, command: str) -> None:
    assert re.search(OPTIONS[options], lab.refusal(*options.split(), command=command))


def test_the_slab_that_a_refusal_suggests_is_accepted(lab: Lab) -> None:
    layout = ("--chunk", "4,16,16", "--shard", "8,16,32")
    assert "use z=8" in lab.refusal(*layout, "--slab", "6,16,32")
    lab.denoise(*layout, "--slab", "8,16,32")


def test_the_tile_that_a_refusal_suggests_holds_more_than_its_halo(lab: Lab) -> None:
    assert "use 401 or more" in lab.refusal("--halo", "200", "--tile", "256")


def test_levels_outside_the_pyramid_are_refused(lab: Lab) -> None:
    source = _pyramid(lab.folder / "pyramid.zarr")
    assert "its levels are 0 to 1" in lab.refusal("--level", "2", source=source)
    assert "its levels are 0 to 1" in lab.refusal("--level", "-1", source=source)


def test_a_source_that_is_missing_is_named(lab: Lab) -> None:
    assert str(lab.folder / "nowhere") in lab.refusal(source=lab.folder / "nowhere")


@pytest.mark.parametrize("kind", ["folder", "file", "group"])
def test_a_source_that_is_no_volume_is_named(lab: Lab, kind: str) -> None:
    path = lab.folder / "odd"
    if kind == "file":
        path.write_text("no zarr")
    elif kind == "folder":
        path.mkdir()
        (path / "image.tif").write_text("no zarr")
    else:
        zarr.create_group(path)
    assert re.search("is not a Zarr volume|without OME-Zarr multiscales", refusal := lab.refusal(source=path))
    assert str(path) in refusal


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((8, 8, 8), ("x", "y", "z"), "axes x,y,z: expected z,y,x"),
        ((8, 8), None, "expected z,y,x"),
        ((2, 8, 8, 8), None, "2 entries along axis c"),
        ((2, 1, 8, 8, 8), None, "2 entries along axis t"),
    ],
)
def test_a_volume_of_other_axes_is_refused(
    lab: Lab, shape: tuple[int, ...], names: tuple[str, ...] | None, expected: str
) -> None:
    voxels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = bare_zarr(lab.folder / "odd.zarr", voxels, chunks=shape, dimension_names=names)
    assert expected in lab.refusal(source=path)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "float64", "bool"])
def test_a_volume_of_another_dtype_is_refused(lab: Lab, dtype: str) -> None:
    path = bare_zarr(lab.folder / "odd.zarr", np.ones((8, 8, 8), dtype))
    assert f"{dtype} voxels: expected uint8, uint16, float32" in lab.refusal(source=path)


@pytest.mark.parametrize("output", ["out.zarr", "new/folders/out.zarr"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_names_its_slice_and_leaves_nothing(lab: Lab, wrong: float, output: str) -> None:
    voxels = image_like((8, 48, 64), "float32")
    voxels[5, 7, 11] = wrong
    source = bare_zarr(lab.folder / "holes.zarr", voxels)
    refusal = lab.refusal(source=source, output=lab.folder / output, begun=True)
    assert "NaN or infinite voxels in slice z=5" in refusal


def test_weights_that_are_missing_are_named(lab: Lab) -> None:
    assert "no weights at" in lab.refusal(weights=lab.folder / "nowhere.safetensors")


def test_weights_in_another_format_are_refused(lab: Lab) -> None:
    (lab.folder / "w.pt").write_bytes(b"PK not safetensors at all")
    assert "is not a weights file" in lab.refusal(weights=lab.folder / "w.pt")


def test_weights_of_another_kind_of_network_are_refused(lab: Lab) -> None:
    save_file({"unet.weight": torch.zeros(3)}, lab.folder / "unet.safetensors")
    assert "another kind of network" in lab.refusal(weights=lab.folder / "unet.safetensors")


def test_a_gpu_that_is_not_there_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here: use --device cpu or auto" in lab.refusal("--device", "cuda")


OVERLAPS = {
    "the input itself": "raw.zarr",
    "inside the input": "raw.zarr/clean.zarr",
    "a folder that holds the input": ".",
    "the input by another way": "other/../raw.zarr",
    "the input through a link": "link.zarr",
    "inside the input through a link": "link.zarr/clean.zarr",
    "a folder that holds the input through a link": "link",
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("where", OVERLAPS)
def test_an_output_on_top_of_the_input_is_refused(lab: Lab, where: str, overwrite: tuple[str, ...]) -> None:
    (lab.folder / "other").mkdir()
    (lab.folder / "link.zarr").symlink_to(lab.source)
    (lab.folder / "link").symlink_to(lab.folder)
    assert "on top of the input" in lab.refusal(*overwrite, output=lab.folder / OVERLAPS[where])


def test_an_input_behind_a_link_is_known_again(lab: Lab) -> None:
    (lab.folder / "link.zarr").symlink_to(lab.source)
    assert "on top of the input" in lab.refusal(source=lab.folder / "link.zarr", output=lab.source)


@pytest.mark.parametrize("inside", ["0", "1", "clean.zarr"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_inside_the_inputs_image_is_refused(lab: Lab, inside: str, overwrite: tuple[str, ...]) -> None:
    source = _pyramid(lab.folder / "pyramid.zarr")
    assert "on top of the input" in lab.refusal(*overwrite, source=source, output=source / inside)


@pytest.mark.parametrize("kind", ["folder", "file", "array"])
def test_an_output_that_is_something_else_is_kept(lab: Lab, kind: str) -> None:
    assert "exists and was not made by nrrn" in lab.refusal(output=_something(lab.folder, kind))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_deletes_nothing_but_zarr(lab: Lab, kind: str) -> None:
    assert "is no Zarr and is not overwritten" in lab.refusal("--overwrite", output=_something(lab.folder, kind))


CHANGES = {
    "--tile 64": "tile was 72, now 64",
    "--halo 9": "halo was 4, now 9",
    "--images 2": "images was 3, now 2",
    "--stats volume": "statistics was slice, now volume",
    "--roi 0:8,0:48,0:32": "roi was 0:8,0:48,0:64, now 0:8,0:48,0:32",
    "--chunk 8,24,64": r"chunk was \[8, 48, 64\], now \[8, 24, 64\]",
}


@pytest.mark.parametrize("options", CHANGES)
def test_an_output_begun_with_other_settings_says_what_changed(lab: Lab, options: str) -> None:
    lab.denoise()
    refusal = lab.refusal(*options.split())
    assert re.search(CHANGES[options], refusal)
    assert "--overwrite" in refusal


def test_sizes_that_are_left_open_are_those_of_an_output_that_is_begun(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run goes on where other sizes are usual, as with a GPU."""
    lab.denoise("--tile", "40", "--chunk", "4,16,16", "--shard", "4,48,32", "--slab", "8,48,32")
    before = Ledger(str(lab.folder / "out.zarr" / "0")).settings()
    lab.denoise()
    assert Ledger(str(lab.folder / "out.zarr" / "0")).settings() == before
    monkeypatch.setattr("nrrn_pipeline.planning.TILE_BYTES", 700_000)
    lab.denoise("--overwrite")  # whole, so it is begun anew
    found = Ledger(str(lab.folder / "out.zarr" / "0")).settings() or {}
    assert found["slab"] == [8, 48, 64]
    assert found["tile"] == 22 + 8, "a third, and a halo of 4 on each side"


def test_an_output_begun_with_other_weights_says_so(lab: Lab) -> None:
    lab.denoise()
    assert "weights sha256 was" in lab.refusal(weights=tiny_weights(lab.folder / "other.safetensors", seed=1))


def test_a_damaged_ledger_is_refused_and_overwritten_when_asked(lab: Lab) -> None:
    lab.denoise()
    (lab.folder / "out.zarr" / "0" / "nrrn" / "plan.json").write_text("{")
    assert "plan.json is damaged" in lab.refusal("--tile", "40")  # other settings than the output's own attributes know
    lab.denoise("--overwrite", "--tile", "40")


@pytest.mark.parametrize("output", ["/sys/out.zarr", "/sys/new/out.zarr"])
def test_an_output_where_nobody_may_write_is_refused(lab: Lab, output: str) -> None:
    assert f"{output} cannot be written" in lab.refusal(output=output, begun=True)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_below_a_file_is_refused(lab: Lab, overwrite: tuple[str, ...]) -> None:
    assert "cannot be written" in lab.refusal(*overwrite, output=lab.weights / "out.zarr", begun=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer_is_named(lab: Lab, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrrn_pipeline.cluster.address.ANSWER_S", 0.5)
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in lab.refusal("--cluster", address)


@pytest.mark.parametrize("address", ["ftp://somewhere", "tcp://10.0.0.1:8786"])
def test_an_address_that_is_no_safe_one_is_refused_with_what_to_use(lab: Lab, address: str) -> None:
    assert "use tls://" in lab.refusal("--cluster", address)


@pytest.mark.parametrize("command", ["denoise", "plan"])
def test_a_cluster_that_is_no_address_is_refused(lab: Lab, command: str) -> None:
    assert "cluster 'cloud' is unknown: use local, serial, an address" in lab.refusal(
        "--cluster", "cloud", command=command
    )


@pytest.mark.parametrize("command", ["denoise", "plan"])
@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_memory_that_cannot_hold_a_slab_is_refused(
    lab: Lab, cluster: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    refusal = lab.refusal("--cluster", cluster, command=command)
    assert re.search("1 worker of .* cannot fit: .* are free; use a smaller --slab .* or --tile", refusal)


@pytest.mark.parametrize(
    "words",
    [
        ["denoise"],
        ["denoise", "a.zarr"],
        ["denoise", "a.zarr", "b.zarr", "--weights", "w", "--tile", "wide"],
        ["denoise", "a.zarr", "b.zarr", "--weights", "w", "--colour"],
        ["clean"],
    ],
)
def test_words_that_are_no_command_show_the_usage(lab: Lab, words: list[str]) -> None:
    before = lab.listing()
    status, err = lab.call(*words)
    assert status == 2
    assert err.startswith("Usage: ")
    assert "Traceback" not in err
    assert lab.listing() == before


TRAIN = {
    "--steps 0": "steps 0 is not possible",
    "--channels -1": "channels -1 is not possible",
    "--learning-rate 0": "learning rate 0.0 is not possible",
    "--device tpu": "device 'tpu' is unknown",
    "--seed -1": "seed",
    "--level 1": "no level 1",
    "--roi 0:9": "--roi '0:9' is not understood: expected Z0:Z1,Y0:Y1,X0:X1",
    "--roi 0:99,0:8,0:8": "roi z=0:99 is empty or not inside the volume",
    "--roi 0:2,0:32,0:32 --loss adjacent": "has no three consecutive slices to learn from in z=0:2",
    "--mask nowhere.zarr": "no volume at .*nowhere.zarr",
    "--mask a.zarr --mask b.zarr": "--mask is given 2 times for 1 volume: give it once for each",
}


@pytest.mark.parametrize("options", TRAIN)
def test_training_that_cannot_work_writes_no_weights(lab: Lab, options: str) -> None:
    small = ["--units", "1", "--channels", "2", "--steps", "1", "--crop", "16", "--batch", "1"]
    before = lab.listing()
    status, err = lab.call("train", lab.source, "--out", lab.folder / "new.safetensors", *small, *options.split())
    assert status in (1, 2)
    assert re.fullmatch(f"nrrn: .*{TRAIN[options]}.*", err.splitlines()[-1])
    assert lab.listing() == before


@pytest.mark.parametrize("weights", ["w.safetensors", "no/folder/w.safetensors"])
def test_training_never_starts_if_its_weights_cannot_be_written(lab: Lab, weights: str) -> None:
    before = lab.listing()
    status, err = lab.call("train", lab.source, "--out", lab.folder / weights, "--steps", "1000000")
    assert status == 2
    assert re.match("nrrn: .*(exists|cannot be written)", err.splitlines()[-1])
    assert lab.listing() == before


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_cannot_be_described_is_named(lab: Lab, command: str) -> None:
    status, err = lab.call(command, lab.folder / "nowhere")
    assert status == 2
    assert err.splitlines()[-1] == f"nrrn: no volume at {lab.folder / 'nowhere'}: there is nothing there"


def test_a_volume_that_is_no_output_cannot_be_verified(lab: Lab) -> None:
    status, err = lab.call("verify", lab.source)
    assert status == 2
    assert "was not made by nrrn" in err.splitlines()[-1]


def test_a_checkpoint_that_could_run_code_is_refused(lab: Lab) -> None:
    torch.save({"model": Lab}, lab.folder / "evil.pt")
    before = lab.listing()
    status, err = lab.call("weights", "import", lab.folder / "evil.pt", lab.folder / "new.safetensors")
    assert status == 2
    assert re.fullmatch("nrrn: .* is refused: .* could run code hidden in it.*\n", err)
    assert lab.listing() == before


def test_a_process_ends_with_the_refusals_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from nrrn_pipeline.cli import main; main()"]
    words = ["denoise", tmp_path / "raw.zarr", tmp_path / "out.zarr", "--weights", "w"]
    ended = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.strip() == f"nrrn: no volume at {tmp_path / 'raw.zarr'}: there is nothing there"
    assert not list(tmp_path.iterdir())


def _something(folder: Path, kind: str) -> Path:
    path = folder / "something"
    if kind == "array":
        return bare_zarr(path, image_like((8, 8, 8)))
    if kind == "file":
        path.write_text("my notes")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("my notes")
    return path


def _pyramid(path: Path) -> Path:
    """An OME-Zarr 0.5 image of two levels."""
    group = zarr.create_group(path)
    voxels = image_like((8, 48, 64))
    for level in (0, 1):
        step = 2**level
        group.create_array(str(level), data=voxels[:, ::step, ::step], chunks=(8, 24, 32))
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [8.0, 4.0 * side, 4.0 * side]}]}
        for level, side in ((0, 1), (1, 2))
    ]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return path
