from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import (
    NRRN,
    import_vemden,
    in_slot,
    load_weights,
    read_header,
    save_weights,
    weights_hash,
)
from nrrn_pipeline.planning import Weights
from nrrn_pipeline.slab import load_network
from tests.support import tiny_network, tiny_weights

State = dict[str, Tensor]
OUTER = ("conv1", "conv2", "conv3")
GATES = ("Gate_update_a", "Gate_update_b", "Gate_reset_a", "Gate_reset_b", "Gates2_a", "Gates2_b")


def vemden_state(units: int = 2, channels: int = 3, prefix: str = "") -> State:
    """Random weights under vEMden's names."""
    generator = torch.Generator().manual_seed(0)
    layers = [f"nrrn.{name}" for name in OUTER] + [f"nrrn.BU.{unit}.{gate}" for unit in range(units) for gate in GATES]
    state: State = {}
    for layer in layers:
        shape = (channels, 1 if layer == "nrrn.conv1" else channels, 3, 3)
        state[f"{prefix}{layer}.weight"] = 0.3 * torch.randn(shape, generator=generator)
        state[f"{prefix}{layer}.bias"] = 0.3 * torch.randn(channels, generator=generator)
    return state


def vemden_branch(state: State, neighbour: Tensor, centre: Tensor) -> Tensor:
    """One branch as the model is defined, straight from vEMden's tensors."""

    def conv(layer: str, h: Tensor) -> Tensor:
        return conv2d(h, state[f"nrrn.{layer}.weight"], state[f"nrrn.{layer}.bias"], padding=1)

    def attention(h: Tensor) -> Tensor:
        return h[:, :1] * torch.sigmoid(h.max(dim=1, keepdim=True).values)

    h_n, h_c, x = torch.relu(conv("conv1", neighbour)), torch.relu(conv("conv1", centre)), centre
    for unit in range(len(state) // 2 // len(GATES)):
        h_n = torch.tanh(conv("conv3", h_n))
        update = torch.sigmoid(conv(f"BU.{unit}.Gate_update_b", h_c) + conv(f"BU.{unit}.Gate_update_a", h_n))
        reset = torch.sigmoid(conv(f"BU.{unit}.Gate_reset_b", h_c) + conv(f"BU.{unit}.Gate_reset_a", h_n))
        candidate = torch.tanh(conv(f"BU.{unit}.Gates2_b", h_c) + reset * conv(f"BU.{unit}.Gates2_a", h_n))
        h_c = update * h_n + (1 - update) * candidate
        x = x + attention(h_c)
        h_c = h_c.clone()
        h_c[:, 0] = torch.tanh(x)[:, 0]
    return x + attention(conv("conv2", torch.relu(h_c)))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


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
    saved(path, vemden_state())


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


def test_the_network_that_was_planned_with_loads(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "a.safetensors", channels=8)
    network = load_network(Weights(str(path), weights_hash(path), 1, 4), "cpu", 2)
    stack = np.random.default_rng(0).standard_normal((4, 9, 8), dtype=np.float32)
    expected = tiny_network(channels=8).denoise(torch.from_numpy(stack), images=2).numpy()
    assert network.reach == 4
    np.testing.assert_allclose(network(stack), expected, atol=1e-5)


def test_weights_that_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "a.safetensors", seed=0)
    planned = weights_hash(path)
    tiny_weights(path, seed=1)
    with pytest.raises(InputError, match=f"have hash {weights_hash(path)[:12]} here.*planned with {planned[:12]}"):
        load_network(Weights(str(path), planned, 1, 4), "cpu", 3)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("units", "channels"), [(1, 4), (2, 3), (4, 8)])
def test_an_imported_vemden_checkpoint_computes_what_the_model_defines(
    tmp_path: Path, units: int, channels: int, prefix: str
) -> None:
    network = import_vemden(saved(tmp_path / "a.pth", vemden_state(units, channels, prefix)))
    state = {name: tensor.double() for name, tensor in vemden_state(units, channels).items()}
    neighbour, centre = torch.randn(2, 3, 1, 17, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = vemden_branch(state, neighbour, centre)
    assert (len(network.units), network.channels) == (units, channels)
    torch.testing.assert_close(network.double()(neighbour, centre), expected, rtol=0, atol=1e-10)


def test_an_imported_checkpoint_saves_and_loads_as_weights(tmp_path: Path) -> None:
    network = import_vemden(saved(tmp_path / "a.pth", vemden_state()))
    save_weights(network, tmp_path / "a.safetensors", {})
    again = load_weights(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "change", [Tensor.half, Tensor.double, torch.nn.Parameter], ids=["half", "double", "parameter"]
)
def test_a_checkpoint_of_any_precision_becomes_float32(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    state = {name: change(tensor) for name, tensor in vemden_state().items()}
    network = import_vemden(saved(tmp_path / "a.pth", state))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_checkpoint_in_torch_s_old_format_imports_too(tmp_path: Path) -> None:
    torch.save(vemden_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new = import_vemden(saved(tmp_path / "new.pth", vemden_state()))
    old = import_vemden(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.state_dict().items())


class Touch:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def pickled(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def torch_saved_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, torch_saved_old, pickled])
def test_a_checkpoint_that_would_run_code_is_refused_and_the_code_not_run(
    tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    marker = tmp_path / "was run"
    save({**vemden_state(), "hook": Touch(marker)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth"):
        import_vemden(tmp_path / "a.pth")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()


def test_a_pickled_network_is_refused_as_it_could_run_code(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could run code"):
        import_vemden(saved(tmp_path / "a.pth", tiny_network()))


@pytest.mark.parametrize(
    "layer",
    ["conv1.weight", "conv1.bias", "conv2.weight", "conv3.bias", "BU.1.Gate_reset_a.bias", "BU.0.Gates2_b.weight"],
)
def test_a_layer_that_is_missing_is_named(tmp_path: Path, layer: str) -> None:
    state = vemden_state()
    del state[f"nrrn.{layer}"]
    with pytest.raises(InputError, match=f"lacks the layer '{layer}'"):
        import_vemden(saved(tmp_path / "a.pth", state))


def test_a_building_unit_that_is_missing_is_named(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in vemden_state(units=3).items() if ".BU.1." not in name}
    with pytest.raises(InputError, match=r"lacks the layer 'BU\.1\."):
        import_vemden(saved(tmp_path / "a.pth", state))


@pytest.mark.parametrize("extra", ["nrrn.norm.weight", "nrrn.BU.0.Gate_extra.weight", "decoder.weight"])
def test_a_checkpoint_with_layers_that_the_network_lacks_is_refused_by_name(tmp_path: Path, extra: str) -> None:
    state = vemden_state() | {extra: torch.zeros(3)}
    with pytest.raises(InputError, match=extra.removeprefix("nrrn.")):
        import_vemden(saved(tmp_path / "a.pth", state))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("conv1.weight", (3, 3, 3, 3)),
        ("conv1.weight", ()),
        ("conv2.weight", (3, 3, 5, 5)),
        ("conv3.bias", (4,)),
        ("BU.0.Gates2_a.weight", (3, 4, 3, 3)),
        ("BU.1.Gate_reset_b.weight", (4, 3, 3, 3)),
        ("BU.1.Gate_update_b.bias", ()),
    ],
    ids=str,
)
def test_a_layer_of_another_shape_is_refused(tmp_path: Path, layer: str, shape: tuple[int, ...]) -> None:
    state = vemden_state() | {f"nrrn.{layer}": torch.zeros(shape)}
    with pytest.raises(InputError, match=r"a\.pth"):
        import_vemden(saved(tmp_path / "a.pth", state))


def torn_checkpoint(path: Path) -> None:
    whole = saved(path, vemden_state()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def torn_old_checkpoint(kept: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        torch_saved_old(vemden_state(), path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole))])

    return make


def image_file(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))


def safetensors_file(path: Path) -> None:
    tiny_weights(path)


def saved_content(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (absent, "no checkpoint at"),
        (folder, "no checkpoint at"),
        (empty, "a.pth"),
        (text, "a.pth"),
        (image_file, "a.pth"),
        (safetensors_file, "a.pth"),
        (torn_checkpoint, "cannot be read as a torch checkpoint"),
        (torn_old_checkpoint(0.002), "a.pth"),
        (torn_old_checkpoint(0.1), "a.pth"),
        (torn_old_checkpoint(0.5), "a.pth"),
        (torn_old_checkpoint(0.99), "a.pth"),
        (saved_content(torch.zeros(3)), "expected a state dict of tensors"),
        (saved_content([torch.zeros(3)]), "expected a state dict of tensors"),
        (saved_content({"epoch": 3, "state_dict": {}}), "expected a state dict of tensors"),
        (saved_content({0: torch.zeros(3)}), "is not a vEMden checkpoint"),
        (saved_content({}), "lacks the layer 'conv1.weight'"),
        (saved_content(NRRN(1, 4).state_dict()), "lacks the layer 'conv1.weight'"),
    ],
)
def test_what_is_no_vemden_checkpoint_is_refused_by_path_and_reason(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "a.pth"
    make(path)
    with pytest.raises(InputError, match=words) as refusal:
        import_vemden(path)
    assert str(path) in str(refusal.value)


def test_a_loaded_network_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(tiny_network(channels=16), path, {})
    network = load_weights(path)
    path.write_bytes(b"")  # a file that is mapped into memory would end the process here
    assert torch.isfinite(network.denoise(torch.randn(3, 8, 8))).all()
