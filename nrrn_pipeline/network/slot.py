"""The slot that any denoiser fits into: a function of a stack of slices that knows how far it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network.architecture import DenoisingNetwork
from nrrn_pipeline.network.nrrn import NRRN

DEVICES = ("auto", "cpu", "cuda")

Stack = NDArray[np.float32]


class Network(Protocol):
    """NRRN or anything else that can stand in its place."""

    @property
    def reach(self) -> int:
        """Radius in y and x of the input voxels that one output voxel depends on."""

    def __call__(self, stack: Stack) -> Stack:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate."""


@dataclass(frozen=True)
class TorchNetwork:
    """A trained network in the slot: NumPy in, NumPy out, on one device."""

    network: DenoisingNetwork
    device: torch.device
    images: int = 3

    @property
    def reach(self) -> int:
        """The network's own."""
        return self.network.reach

    @property
    def grid(self) -> int:
        """Voxels between two places where a tile may begin."""
        return self.network.architecture.grid

    def __call__(self, stack: Stack) -> Stack:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate."""
        estimate = self.network.denoise(torch.from_numpy(stack).to(self.device), self.images)
        return estimate.cpu().numpy()


def after_each_unit(network: DenoisingNetwork, stack: Stack) -> Stack:
    """(z+2, y, x) normalised stack -> (L+1, z, y, x): an NRRN's estimates after every unit, then the final one.

    Raises InputError for a network of another kind.
    """
    if not isinstance(network, NRRN):
        raise InputError(f"{network.architecture} has no building units: give an NRRN")
    return network.after_each_unit(torch.from_numpy(stack)).numpy()


def refuse_unknown_device(name: str) -> None:
    """Raises InputError for a device that no machine has."""
    if name not in DEVICES:
        raise InputError(f"device {name!r} is unknown: use {', '.join(DEVICES)}")


def gpu_count() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_text() -> str | None:
    """The GPU's name and memory; None if there is none."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def choose_device(name: str) -> torch.device:
    """`auto` (the GPU if there is one), `cpu` or `cuda`. Raises InputError if there is no such device here."""
    refuse_unknown_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no GPU here: use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def in_slot(network: DenoisingNetwork, device: str, images: int) -> TorchNetwork:
    """The network on its device, laid out for speed."""
    where = choose_device(device)
    # channels last: the layout in which convolutions of many channels run fastest, on CPU and GPU alike
    return TorchNetwork(network.to(where).to(memory_format=torch.channels_last), where, images)  # type: ignore[call-overload]


def seconds_per_pixel(network: Network, window: tuple[int, int], threads: int) -> float:
    """The network's time for one pixel of a slice here, measured on two slices of noise of (y, x) `window` pixels."""
    stack = np.random.default_rng(0).standard_normal((4, *window), dtype=np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network(stack[:3])  # the first call also chooses algorithms and takes memory
        started = perf_counter()
        network(stack)
        return (perf_counter() - started) / stack[1:-1].size
    finally:
        torch.set_num_threads(before)
