from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nrrn_pipeline import storage
from nrrn_pipeline.denoisers import Weights
from nrrn_pipeline.errors import InputError, StorageError
from nrrn_pipeline.network import (
    Architecture,
    Network,
    architecture_of,
    bytes_hash,
    in_slot,
    load_weights,
    parse_header,
    parse_weights,
    read_header,
    save_weights,
    weights_bytes,
    weights_hash,
)
from nrrn_pipeline.planning import DenoisePlan, Method
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.shipped import read_weights
from nrrn_pipeline.slab import load_network
from nrrn_pipeline.volume import Volume
from tests.servers import ObjectStore
from tests.support import tiny_network, tiny_weights

State = dict[str, Tensor]


def with_header(path: Path, **changes: Any) -> None:
    """Rewrite a weights file with another header; None takes an entry away."""
    header = {key: value for key, value in (read_header(path) | changes).items() if value is not None}
    save_file(load_file(path), path, {"nrrn": json.dumps(header)})


def with_tensors(path: Path, change: Callable[[State], None]) -> None:
    tensors, header = load_file(path), read_header(path)
    change(tensors)
    save_file(tensors, path, {"nrrn": json.dumps(header)})


@pytest.mark.parametrize(("units", "channels"), [(1, 4), (3, 2), (4, 8)])
def test_weights_load_as_they_were_saved_to_the_last_bit(tmp_path: Path, units: int, channels: int) -> None:
    before = tiny_network(units, channels, seed=5)
    save_weights(before, tmp_path / "a.safetensors", {})
    after = load_weights(tmp_path / "a.safetensors")
    assert (len(after.units), after.channels) == (units, channels)
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


PEERS = [
    Architecture("denoisenet", 4, 4, "channels"),
    Architecture("denoisenet", 3, 2, "single"),
    Architecture("unet", 1, 4, "mean"),
    Architecture("unet", 2, 2, "single"),
]


def peer_bytes(architecture: Architecture) -> bytes:
    torch.manual_seed(3)
    return weights_bytes(architecture.build(), {"note": "random, for tests"})


@pytest.mark.parametrize("architecture", PEERS, ids=str)
def test_a_trained_peer_loads_as_it_was_saved(tmp_path: Path, architecture: Architecture) -> None:
    torch.manual_seed(0)
    before = architecture.build()
    for _ in range(3):  # training sets the running statistics of batch normalisation
        before.estimate(5 + 2 * torch.randn(4, 3, 8, 8))
    before.eval()
    save_weights(before, tmp_path / "a.safetensors", {"steps": 3})
    after = load_weights(tmp_path / "a.safetensors")
    assert after.architecture == architecture
    assert not after.training
    stack = torch.randn(4, 9, 7)
    assert torch.equal(after.denoise(stack), before.denoise(stack))
    assert weights_bytes(after, {"steps": 3}) == weights_bytes(before, {"steps": 3})


def test_running_statistics_are_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(peer_bytes(Architecture("unet", 1, 2, "mean")))
    names = load_file(tmp_path / "a.safetensors").keys()
    assert sum("running_mean" in name for name in names) == sum("running_var" in name for name in names) == 6


@pytest.mark.parametrize("architecture", [*PEERS, Architecture("nrrn", 2, 3, "neighbours")], ids=str)
def test_a_header_tells_the_architecture(architecture: Architecture) -> None:
    header = parse_header(peer_bytes(architecture), "a")
    assert architecture_of(header) == architecture
    assert ("kind" in header) == (architecture.kind != "nrrn")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "nrrn"},
        {"kind": None},
        {"kind": "resnet"},
        {"kind": ["unet"]},
        {"kind": {}},
        {"kind": "x" * 10**5},
        {"kind": "denoisenet", "inputs": "single", "units": 4},
        {"inputs": None},
        {"inputs": "channels"},
        {"inputs": ["mean"]},
        {"inputs": 7},
        {"units": 2},
        {"units": 9},
        {"units": 10**9},
        {"units": 8, "channels": 4096},
        {"channels": 10**9},
        {"channels": True},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_peers_header_that_does_not_fit_its_tensors_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(peer_bytes(Architecture("unet", 1, 4, "mean")))
    with_header(path, **changes)
    with pytest.raises(InputError, match=r"a\.safetensors (is damaged|does not fit)"):
        load_weights(path)


@pytest.mark.parametrize("name", ["down.0.1.running_var", "last.bias"])
def test_a_peers_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(peer_bytes(Architecture("unet", 1, 4, "mean")))
    with_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"does not fit a U-Net with units 1, channels 4: .*{name}"):
        load_weights(path)


def test_a_loaded_network_is_ready_to_infer(tmp_path: Path) -> None:
    network = load_weights(tiny_weights(tmp_path / "a.safetensors"))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_laid_out_for_speed_save_like_any_others(tmp_path: Path) -> None:
    tiny_weights(tmp_path / "a.safetensors", channels=8)
    fast = in_slot(tiny_network(channels=8), "cpu", 3).network
    save_weights(fast, tmp_path / "b.safetensors", {"note": "random, for tests"})
    assert weights_hash(tmp_path / "a.safetensors") == weights_hash(tmp_path / "b.safetensors")


def test_the_training_record_is_kept(tmp_path: Path) -> None:
    record = {
        "source": "a volume",
        "mean_loss_of_last_tenth": 0.1,
        "settings": {"steps": 3},
        "voxel_nm": [4.0, 4.0, 8.0],
        "z": None,
    }
    save_weights(tiny_network(units=2), tmp_path / "a.safetensors", record)
    header = read_header(tmp_path / "a.safetensors")
    assert header == {"format": "nrrn-1", "units": 2, "channels": 4, "training": record}


def test_saving_leaves_one_file_and_replaces_what_was_there(tmp_path: Path) -> None:
    tiny_weights(tmp_path / "a.safetensors", seed=0)
    before = weights_hash(tmp_path / "a.safetensors")
    tiny_weights(tmp_path / "a.safetensors", seed=1)
    assert weights_hash(tmp_path / "a.safetensors") != before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_weights_file_is_as_readable_as_the_umask_allows(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = tiny_weights(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def absent(path: Path) -> None:
    """Leave nothing there."""


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("no weights at all\n")


def torn(path: Path) -> None:
    whole = tiny_weights(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def checkpoint(path: Path) -> None:
    torch.save({"nrrn.conv1.bias": torch.zeros(3)}, path)


def other_network(path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2)}, path)


def other_metadata(path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2)}, path, {"nrrn": "{torn"})


def metadata_of_another_type(path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2)}, path, {"nrrn": "[1, 2]"})


def other_format(path: Path) -> None:
    with_header(tiny_weights(path), format="nrrn-2")


NO_WEIGHTS = [
    (absent, "no weights at"),
    (folder, "no weights at"),
    (empty, "is not a weights file"),
    (text, "is not a weights file"),
    (torn, "is not a weights file"),
    (checkpoint, "is not a weights file"),
    (other_metadata, "is not a weights file"),
    (other_network, "does not hold an NRRN"),
    (metadata_of_another_type, "does not hold an NRRN"),
    (other_format, r"does not hold an NRRN \(format nrrn-1\)"),
]


@pytest.mark.parametrize("load", [load_weights, read_header])
@pytest.mark.parametrize(("make", "words"), NO_WEIGHTS)
def test_what_is_no_weights_file_is_refused_by_path_and_reason(
    tmp_path: Path, load: Callable[[Path], object], make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(InputError, match=words) as refusal:
        load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 8},
        {"channels": 2},
        {"units": 2},
        {"units": 0},
        {"units": None},
        {"channels": None},
        {"channels": "many"},
        {"channels": -1},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_tensors_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tiny_weights(tmp_path / "a.safetensors")
    with_header(path, **changes)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_weights(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("last.bias"), "last.bias"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "extra.weight"),
        (lambda tensors: tensors.update({"first.weight": torch.zeros(4, 1, 5, 5)}), "first.weight"),
        (lambda tensors: tensors.update({"units.0.centre.bias": torch.zeros(4)}), "units.0.centre.bias"),
    ],
    ids=["missing", "extra", "kernel", "gates"],
)
def test_tampered_tensors_are_refused_by_name(tmp_path: Path, change: Callable[[State], None], named: str) -> None:
    path = tiny_weights(tmp_path / "a.safetensors")
    with_tensors(path, change)
    with pytest.raises(InputError, match=f"does not fit an NRRN with units 1, channels 4: .*{named}"):
        load_weights(path)


def test_the_hash_is_the_file_s_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert weights_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def loaded(weights: Weights, images: int = 3) -> Network:
    volume = Volume("made up", (3, 8, 8), "uint8", (3, 8, 8), (3, 8, 8))
    plan = DenoisePlan(volume, volume, volume.box, weights, volume.shape, 256, 7, Method(images))
    return load_network(plan, "cpu")[0]


def test_the_network_that_was_planned_with_loads(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "a.safetensors", channels=8)
    network = loaded(Weights(str(path), weights_hash(path), 1, 4), images=2)
    stack = np.random.default_rng(0).standard_normal((4, 9, 8), dtype=np.float32)
    expected = tiny_network(channels=8).denoise(torch.from_numpy(stack), images=2).numpy()
    assert network.reach == 4
    np.testing.assert_allclose(network(stack), expected, atol=1e-5)


def test_weights_that_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "a.safetensors", seed=0)
    planned = weights_hash(path)
    tiny_weights(path, seed=1)
    with pytest.raises(InputError, match=f"have hash {weights_hash(path)[:12]} here.*planned with {planned[:12]}"):
        loaded(Weights(str(path), planned, 1, 4))


def test_a_loaded_network_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(tiny_network(channels=16), path, {})
    network = load_weights(path)
    path.write_bytes(b"")  # a file that is mapped into memory would end the process here
    assert torch.isfinite(network.denoise(torch.randn(3, 8, 8))).all()


def test_bytes_are_the_file_that_save_weights_writes(tmp_path: Path) -> None:
    save_weights(tiny_network(), tmp_path / "a.safetensors", {"z": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == weights_bytes(tiny_network(), {"z": 1})


def test_bytes_parse_as_the_file_does() -> None:
    data = weights_bytes(tiny_network(2, 3, seed=7), {"note": "of bytes"})
    assert parse_header(data, "a") == {
        "format": "nrrn-1",
        "units": 2,
        "channels": 3,
        "training": {"note": "of bytes"},
    }
    found = parse_weights(data, "a").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tiny_network(2, 3, seed=7).state_dict().items())


@pytest.mark.parametrize("parse", [parse_header, parse_weights])
def test_bytes_that_are_cut_short_are_refused_under_the_name_given(parse: Callable[[bytes, str], object]) -> None:
    data = weights_bytes(tiny_network(), {})
    for kept in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(InputError, match=r"^s3://lab/a is not a weights file"):
            parse(data[:kept], "s3://lab/a")


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, or what stands for one, for weights."""
    if request.param == "local":
        yield str(tmp_path)
    elif request.param == "memory":
        yield "memory://test_weights"
        files = fsspec.filesystem("memory")
        files.rm("/test_weights", recursive=True)
    else:
        store: ObjectStore = request.getfixturevalue("moto_s3")
        store.make_bucket("weights")
        with store.in_use():
            yield f"s3://weights/{tmp_path.name}"


def test_weights_are_described_and_loaded_wherever_they_are(place: str) -> None:
    data = weights_bytes(tiny_network(1, 8, seed=3), {})
    storage.write_file(f"{place}/a.safetensors", data)
    weights = describe_weights(f"{place}/a.safetensors")
    assert weights == Weights(f"{place}/a.safetensors", bytes_hash(data), 1, 8)
    network = loaded(weights)
    stack = np.random.default_rng(0).standard_normal((3, 9, 8), dtype=np.float32)
    expected = tiny_network(1, 8, seed=3).denoise(torch.from_numpy(stack), images=3).numpy()
    np.testing.assert_allclose(network(stack), expected, atol=1e-5)


def test_weights_that_changed_are_refused_wherever_they_are(place: str) -> None:
    storage.write_file(f"{place}/b.safetensors", weights_bytes(tiny_network(seed=4), {}))
    weights = describe_weights(f"{place}/b.safetensors")
    storage.write_file(f"{place}/b.safetensors", weights_bytes(tiny_network(seed=5), {}))
    with pytest.raises(InputError, match="planned with"):
        loaded(weights)


@pytest.mark.parametrize("name", ["absent", "folder"])
def test_weights_that_are_not_there_are_said_to_be_missing(place: str, name: str) -> None:
    storage.write_file(f"{place}/folder/a.safetensors", weights_bytes(tiny_network(), {}))
    with pytest.raises(InputError, match=f"^no weights at {place}/{name}: give a"):
        describe_weights(f"{place}/{name}")


def test_weights_whose_every_reading_differs_are_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_weights(tmp_path / "a.safetensors").read_bytes()
    readings = iter(range(1000))

    def flipped(url: str, start: int = 0, stop: int | None = None) -> bytes:
        place = next(readings) + len(data) // 2
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    monkeypatch.setattr(storage, "read_file", flipped)
    with pytest.raises(StorageError, match="readings gave other bytes"):
        read_weights(str(tmp_path / "a.safetensors"))


def test_one_flipped_reading_of_weights_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_weights(tmp_path / "a.safetensors").read_bytes()
    readings = iter([data[:-1] + bytes([data[-1] ^ 1])])
    monkeypatch.setattr(storage, "read_file", lambda *_: next(readings, data))
    assert read_weights(str(tmp_path / "a.safetensors")) == data
