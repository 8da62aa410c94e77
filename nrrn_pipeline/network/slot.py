"""The slot that any denoiser fits into: a function of a stack of slices that knows how far it reaches."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.geometry import Span
from nrrn_pipeline.network.architecture import DenoisingNetwork
from nrrn_pipeline.network.lanes import GPU_LANES, cpu_lanes, in_lanes
from nrrn_pipeline.network.nrrn import NRRN, Step, unit_step, unit_step_in_place

DEVICES = ("auto", "cpu", "cuda")
HALVES = ("float16", "bfloat16")  # half as many bytes; the first is the more accurate, while no number is too large
PRECISIONS = ("auto", "float32", *HALVES)

Stack = NDArray[np.float32]


class Network(Protocol):
    """NRRN or anything else that can stand in its place."""

    @property
    def reach(self) -> int:
        """Radius in y and x of the input voxels that one output voxel depends on."""

    def lanes(self, tiles: int, /) -> int:
        """How many of so many tiles to give it at a time, each from a thread of its own."""

    def __call__(self, stack: Stack) -> Stack:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate."""


class TorchNetwork:
    """A trained network in the slot: NumPy in, NumPy out, on one device, in one precision.

    A window that is too much for a GPU's memory is estimated in halves, each with its halo: the same estimate.
    """

    def __init__(self, network: DenoisingNetwork, device: torch.device, images: int = 3) -> None:
        self.network, self.device, self.images = network, device, images
        self._too_many: float = float("inf")  # pixels, as was seen
        self._step: Step = unit_step_in_place
        self._own = threading.local()
        if device.type == "cuda":
            self._step = CompiledStep()
            # for the whole process, as lanes run at the same time: float32 is float32, and algorithms are tried
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True

    @property
    def reach(self) -> int:
        """The network's own."""
        return self.network.reach

    @property
    def grid(self) -> int:
        """Voxels between two places where a tile may begin."""
        return self.network.architecture.grid

    def lanes(self, tiles: int) -> int:
        """As many as fill the device; on a CPU, of the threads that this one computes with."""
        return GPU_LANES if self.device.type == "cuda" else cpu_lanes(torch.get_num_threads(), tiles)

    def __call__(self, stack: Stack) -> Stack:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate. Raises RunError if memory suffices for no window."""
        pixels = stack.shape[1] * stack.shape[2]
        ended = False
        if pixels < self._too_many:
            try:
                return self._estimate(stack)
            except torch.OutOfMemoryError:
                self._too_many, ended = min(self._too_many, pixels), True
        if ended and self.device.type == "cuda":
            torch.cuda.empty_cache()  # out here, where the error no longer holds what was computed
        return self._in_halves(stack)

    def _estimate(self, stack: Stack) -> Stack:
        with self._on_device():
            given = torch.from_numpy(stack).to(self.device)
            if isinstance(self.network, NRRN):
                estimate = self.network.denoise(given, self.images, self._step)
            else:
                estimate = self.network.denoise(given, self.images)
            return estimate.cpu().numpy()

    def _in_halves(self, stack: Stack) -> Stack:
        """Of the longer side, each read with the reach around it, from the grid on."""
        axis = 1 if stack.shape[1] >= stack.shape[2] else 2
        whole = Span(0, stack.shape[axis])
        middle = len(whole) // 2 // self.grid * self.grid
        halves = [Span(0, middle), Span(middle, whole.stop)]
        reads = [half.grown(self.reach, whole).aligned(self.grid) for half in halves]
        if middle == 0 or max(map(len, reads)) == len(whole):
            raise RunError(
                f"GPU memory does not suffice for a window of {stack.shape[1]} x {stack.shape[2]} voxels: free some, "
                "or use --device cpu"
            )
        estimate = np.empty_like(stack[1:-1])
        for half, read in zip(halves, reads, strict=True):
            found = self(stack[_along(axis, read.within(whole))])
            estimate[_along(axis, half.within(whole))] = found[_along(axis, half.within(read))]
        return estimate

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """On a GPU each thread has a stream, so that tiles overlap."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._own.stream):
            yield


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    """That part along y (1) or x (2) of a stack."""
    return (slice(None),) * axis + (part,)


class CompiledStep:
    """unit_step in one kernel by torch.compile; where that cannot be, step by step in place, with one warning.

    Pixels are made one axis, whose length may be any: else every size of window is compiled anew, and torch gives up
    after a few.
    """

    def __init__(self, **how: Any) -> None:
        self._compiled: Any = torch.compile(unit_step, **how)

    def __call__(self, x: Tensor, w: Tensor, h_n: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As unit_step."""
        if self._compiled is not None:
            try:
                return self._in_rows(x, w, h_n, v)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many kinds: no compiler, no Triton, a GPU that it does not know
                self._compiled = None
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"the network runs uncompiled, and slower: {reason}", RuntimeWarning, stacklevel=2)
        return unit_step_in_place(x, w, h_n, v)

    def _in_rows(self, x: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
        """By (n, pixels, channels), which tensors in channels-last layout are already."""
        rows = [of.permute(0, 2, 3, 1).flatten(1, 2) for of in (x, *states)]
        for of in rows:
            torch._dynamo.mark_dynamic(of, 1)
        x_next, h_next = self._compiled(*rows, dim=2)
        height, width = x.shape[2:]
        found = (of.unflatten(1, (height, width)).permute(0, 3, 1, 2) for of in (x_next, h_next))
        return next(found), next(found)


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


def refuse_unknown_precision(name: str) -> None:
    """Raises InputError for a precision that there is not."""
    if name not in PRECISIONS:
        raise InputError(f"precision {name!r} is unknown: use {', '.join(PRECISIONS)}")


def in_slot(network: DenoisingNetwork, device: str, images: int, precision: str = "float32") -> TorchNetwork:
    """The network on its device, in a precision ("float32", or one of HALVES), laid out for speed."""
    where = choose_device(device)
    # channels last: the layout in which convolutions of many channels run fastest, on CPU and GPU alike
    laid_out = network.to(getattr(torch, precision)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = laid_out.to(where)
    if where.type == "cuda":
        torch.cuda.synchronize()  # lanes have streams of their own, which wait for no other
    return TorchNetwork(moved, where, images)


def fastest_in_slot(
    network: DenoisingNetwork, device: str, images: int, sample: Stack, limit: float
) -> tuple[TorchNetwork, str, dict[str, float]]:
    """The network in the first of HALVES that is at most `limit` (root mean square) from float32 on a sample stack.

    Or else in float32; the precision, and of each that was tried how far it is off.
    """
    exact = in_slot(deepcopy(network), device, images)
    expected, off = exact(sample), {}
    for precision in HALVES:
        half = in_slot(deepcopy(network), device, images, precision)
        off[precision] = float(np.sqrt(np.mean(np.square(half(sample) - expected, dtype=np.float64))))
        if off[precision] <= limit:  # never of what is no number
            return half, precision, off
    return exact, "float32", off


def seconds_per_pixel(network: Network, window: tuple[int, int], tiles: int, threads: int) -> float:
    """The network's time for one pixel of a slice here, with so many threads.

    Measured on slices of noise of (y, x) `window` pixels, as many at a time as of so many tiles of a slab.
    """
    stack = np.random.default_rng(0).standard_normal((5, *window), dtype=np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lanes = network.lanes(tiles)
        in_lanes(lanes, network, [stack] * lanes)  # the first call also chooses algorithms and takes memory
        # each slice more; the first also takes its neighbours
        seconds = []
        for slices in (1, 3):
            started = perf_counter()
            in_lanes(lanes, network, [stack[: slices + 2]] * lanes)
            seconds.append(perf_counter() - started)
        return float(seconds[1] - seconds[0]) / 2 / lanes / int(stack[0].size)
    finally:
        torch.set_num_threads(before)
