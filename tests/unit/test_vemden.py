from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import NRRN, import_vemden, load_weights, save_weights
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


def text_file(path: Path) -> None:
    path.write_text("no weights at all\n")


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
        (lambda path: None, "no checkpoint at"),
        (Path.mkdir, "no checkpoint at"),
        (Path.touch, "a.pth"),
        (text_file, "a.pth"),
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
