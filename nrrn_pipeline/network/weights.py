"""Trained networks on disk: safetensors, with the configuration and the training record in the file's metadata.

No file can run code here, so a weights file may come from anybody: safetensors holds none, and vEMden's pickled
checkpoints go through torch's restricted reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save
from torch import Tensor

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network.architecture import KINDS, Architecture, DenoisingNetwork
from nrrn_pipeline.network.nrrn import NRRN

FORMAT = "nrrn-1"
NO_WEIGHTS = "no weights at {}: give a .safetensors file written by nrrn train or nrrn weights import"
MAX_BYTES = 2**31

# vEMden's layer name -> ours, with the gate's place among the three that stand side by side in one layer
_VEMDEN_OUTER = {"conv1": "first", "conv3": "advance", "conv2": "last"}
_VEMDEN_GATES = {
    "Gate_update_b": ("centre", 0),
    "Gate_reset_b": ("centre", 1),
    "Gates2_b": ("centre", 2),
    "Gate_update_a": ("neighbour", 0),
    "Gate_reset_a": ("neighbour", 1),
    "Gates2_a": ("neighbour", 2),
}


def save_weights(network: DenoisingNetwork, path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write the network and its record (any JSON: data, loss, steps, versions) to a safetensors file, in one move."""
    partial = Path(f"{path}.partial")
    partial.write_bytes(weights_bytes(network, record))
    os.replace(partial, path)


def weights_bytes(network: DenoisingNetwork, record: dict[str, Any]) -> bytes:
    """What save_weights writes; of an NRRN, neither `kind` nor `inputs`, so that its files stay as they always were."""
    ours = network.architecture
    which = {} if ours.kind == "nrrn" else {"kind": ours.kind, "inputs": ours.inputs}
    header = {"format": FORMAT, **which, "units": ours.units, "channels": ours.channels, "training": record}
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()  # not the batches that batch normalisation has counted: nothing reads them
    }
    return save(tensors, metadata={"nrrn": json.dumps(header)})


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's `format`, `units`, `channels` and `training` record; `kind` and `inputs` if it is not of an NRRN.

    Raises InputError if the file is missing, is not safetensors, or does not hold a network of ours.
    """
    return parse_header(_read(path), path)


def parse_header(data: bytes, name: str | os.PathLike[str]) -> dict[str, Any]:
    """The same, of the bytes of a file of that name."""
    try:
        header = parse_metadata(data)
    except (SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise InputError(
            f"{name} is not a weights file ({error}): expected .safetensors by nrrn train or nrrn weights import"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{name} does not hold an NRRN (format {FORMAT}): its weights are of another kind of network")
    try:
        architecture_of(header)
    except InputError as error:
        raise InputError(f"{name} is damaged, or of a later version: its header's {error}") from error
    return header


def parse_metadata(data: bytes) -> Any:
    """What we wrote of a safetensors file's content into its metadata, {} if nothing. Raises what its parsers raise."""
    deserialize(data)  # type: ignore[no-untyped-call]  # the whole file, as its header says nothing of bytes that lack
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("nrrn", "{}"))


def architecture_of(header: dict[str, Any]) -> Architecture:
    """The network that a header describes, an NRRN unless it says another. Raises InputError if there is none such."""
    kind, inputs = header.get("kind", "nrrn"), header.get("inputs", "neighbours")
    return Architecture(kind, header.get("units", 0), header.get("channels", 0), inputs)


def load_weights(path: str | os.PathLike[str]) -> DenoisingNetwork:
    """The trained network, on the CPU. Raises InputError as read_header does, or if tensors do not fit."""
    return parse_weights(_read(path), path)  # read, not mapped: a file replaced under a map ends the process by SIGBUS


def parse_weights(data: bytes, name: str | os.PathLike[str]) -> DenoisingNetwork:
    """The same, of the bytes of a file of that name."""
    architecture = architecture_of(parse_header(data, name))
    try:
        tensors = load(data)
    except (SafetensorError, LookupError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{name} is damaged: its tensors cannot be read ({error})") from error
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        kind = KINDS[architecture.kind].name
        raise InputError(f"{name} does not hold {kind}: some of its tensors are not of real numbers")
    return _network(architecture, tensors, name)


def weights_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file, which says which weights made an output."""
    return bytes_hash(Path(path).read_bytes())


def bytes_hash(data: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise InputError(f"{path} is no weights file: it has more than {MAX_BYTES} bytes")
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(NO_WEIGHTS.format(path)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a weights file ({error}): expected .safetensors by nrrn train") from error


def import_vemden(path: str | os.PathLike[str]) -> NRRN:
    """The network of a checkpoint of the authors' tool (vEMden), a torch state dict.

    Raises InputError if the file is missing, would have to run code to be read, or holds other layers than NRRN's.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}: give a file saved by vEMden")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it is no plain torch state dict, and reading it could run code hidden in it. "
            "Save it again with torch.save(network.state_dict(), path)"
        ) from error
    except Exception as error:  # torch's readers of old and new formats raise whatever a damaged file leads them to
        raise InputError(f"{path} cannot be read as a torch checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise InputError(f"{path} is not a vEMden checkpoint: expected a state dict of tensors")
    state = {name.removeprefix("module.").removeprefix("nrrn."): tensor.float() for name, tensor in state.items()}
    units = len({name.split(".")[1] for name in state if name.startswith("BU.")})
    try:
        ours = _from_vemden(state, units)
        channels = ours["first.bias"].numel()
    except KeyError as error:
        raise InputError(f"{path} is not a vEMden checkpoint: it lacks the layer {error}") from error
    except RuntimeError as error:
        raise InputError(f"{path} does not fit an NRRN: its gates differ in shape ({error})") from error
    if units == 0 or not all(torch.isfinite(tensor).all() for tensor in ours.values()):
        raise InputError(f"{path} is not a trained vEMden checkpoint: it has no building unit, or weights not finite")
    if state:
        raise InputError(f"{path} is not a vEMden checkpoint: it holds the layer '{min(state)}', which NRRN lacks")
    network = _network(Architecture("nrrn", units, channels, "neighbours"), ours, path)
    assert isinstance(network, NRRN)
    return network


def _from_vemden(state: dict[str, Tensor], units: int) -> dict[str, Tensor]:
    """Tensors of vEMden, taken out of `state`, under our names; the gates' convolutions joined."""
    ours: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for theirs, name in _VEMDEN_OUTER.items():
            ours[f"{name}.{kind}"] = state.pop(f"{theirs}.{kind}")
        for unit in range(units):
            for layer in ("centre", "neighbour"):
                gates = sorted((place, gate) for gate, (side, place) in _VEMDEN_GATES.items() if side == layer)
                parts = [state.pop(f"BU.{unit}.{gate}.{kind}") for _, gate in gates]
                ours[f"units.{unit}.{layer}.{kind}"] = torch.cat(parts)
    return ours


def _network(architecture: Architecture, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> DenoisingNetwork:
    with torch.device("meta"):  # no arithmetic for initial weights that are replaced at once
        network = architecture.build()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{path} does not fit {architecture}: {first}") from error
    return network.eval().requires_grad_(False)
