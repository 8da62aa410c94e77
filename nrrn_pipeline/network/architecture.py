"""Which networks there are, what each costs, and the class that all of them are of.

NRRN is the paper's; DenoiseNet and U-Net are the trained peers that it is measured beside. An `Architecture` says all
of a network but its weights, and is known without building it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from nrrn_pipeline.errors import InputError

MAX_CHANNELS = 4096


@dataclass(frozen=True)
class Kind:
    """One kind of network: what its `inputs` may be (the first unless told), and its published and possible `units`."""

    name: str
    inputs: tuple[str, ...]
    units: int
    least: int
    most: int  # no file can make us build a network without end


KINDS = {
    "nrrn": Kind("an NRRN", inputs=("neighbours",), units=4, least=1, most=64),
    "denoisenet": Kind("a DenoiseNet", inputs=("channels", "single"), units=20, least=2, most=64),
    "unet": Kind("a U-Net", inputs=("mean", "single"), units=4, least=1, most=8),
}


@dataclass(frozen=True)
class Architecture:
    """A network without its weights.

    units: NRRN's building units, DenoiseNet's convolutions, the U-Net's poolings. channels: feature maps, of the U-Net
    those at full size. inputs: what the network sees of a triplet: "neighbours" in two branches, the centre slice
    ("single"), all three as "channels", or their "mean".
    """

    kind: str
    units: int
    channels: int
    inputs: str

    def __post_init__(self) -> None:
        """Raises InputError for what is no network."""
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise InputError(f"network {self.kind!r} is unknown: use {' or '.join(KINDS)}")
        kind = KINDS[self.kind]
        for name, value, least, most in (
            ("units", self.units, kind.least, kind.most),
            ("channels", self.channels, 1, MAX_CHANNELS),
        ):
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} {value} is not possible for {self.kind}: use {least} to {most}")
        if self.inputs not in kind.inputs:
            raise InputError(f"inputs {self.inputs!r} is not possible for {self.kind}: use {' or '.join(kind.inputs)}")

    @classmethod
    def published(cls, kind: str, inputs: str | None = None) -> Self:
        """The network as its authors describe it, of 64 channels. Raises InputError if the kind is unknown."""
        known = KINDS.get(kind)
        return cls(kind, known.units if known else 0, 64, inputs or default_inputs(kind))

    def __str__(self) -> str:
        return f"{KINDS[self.kind].name} with units {self.units}, channels {self.channels}"

    @property
    def reach(self) -> int:
        """Radius in y and x of the voxels that one output voxel depends on."""
        if self.kind == "denoisenet":
            return self.units
        if self.kind == "unet":
            # convolutions: 2 voxels, down and up, on each grid but the coarsest, and 2 on that; then a voxel's place in
            # its cell of 2^depth: 2 (2^depth - 1) 2 + 2 2^depth + 2^depth - 1
            return 7 * self.grid - 5
        return reach_of(self.units)

    @property
    def grid(self) -> int:
        """Voxels between two places where a tile may begin, so that it is pooled as its whole slice is; 1: anywhere."""
        return 2**self.units if self.kind == "unet" else 1

    @cached_property
    def parameters(self) -> int:
        """How many numbers training sets."""
        with torch.device("meta"):  # counted without any arithmetic or memory
            return sum(parameter.numel() for parameter in self.build().parameters())

    def flop_per_voxel(self, images: int = 3) -> int:
        """Floating-point operations of `denoise` for one voxel: its convolutions, a multiply-add counted as two.

        Of the U-Net for slices whose sides are multiples of `grid`; others are padded to them.
        """
        self.refuse_images(images)
        c = self.channels
        if self.kind == "denoisenet":
            return 2 * 9 * (self._maps_in * c + (self.units - 2) * c**2 + c)
        if self.kind == "unet":
            # on every grid twice the maps on a quarter of the voxels: the same arithmetic again. Down C/2 -> C, C -> C;
            # up 2C -> C by 2x2, 2C -> C, C -> C: 13.5 + 2 + 27 products of C and C, at full size but 1 -> C, C -> C
            return 2 * (9 * (c + c**2) + c) + 85 * self.units * c**2
        return flop_per_voxel(self.units, c, images)

    def activation_bytes(self, pixels: int, images: int = 3) -> int:
        """Memory that `denoise` takes, in float32, for slices of `pixels` pixels, as measured."""
        self.refuse_images(images)
        if self.kind == "denoisenet":
            return 4 * (2 * self.channels + 8) * pixels  # a layer's maps in and out, and single ones
        if self.kind == "unet":
            return 4 * (7 * self.channels + 8) * pixels  # where the finest maps are joined
        return activation_bytes(self.channels, pixels, images)

    def refuse_images(self, images: int) -> None:
        """Raises InputError unless a slice can be estimated from so many: NRRN's from 3, 2 or 1, others' as trained."""
        if images not in ((1, 2, 3) if self.kind == "nrrn" else (3,)):
            raise InputError(f"images {images} is not possible for {self.kind}: leave it at 3, which is all it can use")

    def build(self) -> DenoisingNetwork:
        """The network, with random weights."""
        # here, as each of them names its architecture
        from nrrn_pipeline.network.denoisenet import DenoiseNet
        from nrrn_pipeline.network.nrrn import NRRN
        from nrrn_pipeline.network.unet import UNet

        if self.kind == "nrrn":
            return NRRN(self.units, self.channels)
        return (DenoiseNet if self.kind == "denoisenet" else UNet)(self.units, self.channels, self.inputs)

    @property
    def _maps_in(self) -> int:
        return 3 if self.inputs == "channels" else 1


class DenoisingNetwork(nn.Module):
    """Any network of these. Its `forward` takes what `network_input` makes of a triplet, if it is not NRRN."""

    architecture: Architecture

    @property
    def reach(self) -> int:
        """Radius in y and x of the voxels that one output voxel depends on."""
        return self.architecture.reach

    def estimate(self, triplet: Tensor) -> Tensor:
        """(n, 3, y, x) normalised triplets -> (n, 1, y, x) estimates of their clean centre slices; differentiable."""
        estimate: Tensor = self(network_input(triplet, self.architecture.inputs))
        return estimate

    @torch.inference_mode()
    def denoise(self, stack: Tensor, images: int = 3) -> Tensor:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate of all slices but the first and the last."""
        self.architecture.refuse_images(images)
        result, precision = torch.empty_like(stack[1:-1]), next(self.parameters()).dtype
        for z in range(len(result)):  # one at a time: what is held does not grow with the stack
            result[z] = self.estimate(stack[None, z : z + 3].to(precision))[0, 0]
        return result


def network_input(triplet: Tensor, inputs: str) -> Tensor:
    """(n, 3, y, x) triplets -> what a network sees of them: (n, 1, y, x), or all of it for "channels"."""
    if inputs == "single":
        return triplet[:, 1:2]
    return triplet.mean(dim=1, keepdim=True) if inputs == "mean" else triplet


def default_inputs(kind: str) -> str:
    """What a network of that kind sees unless told: more than one slice. "" for an unknown kind."""
    return KINDS[kind].inputs[0] if kind in KINDS else ""


def reach_of(units: int) -> int:
    """Radius in y and x of what one output voxel of NRRN depends on: L+3 in the neighbour slices, L+2 in the centre."""
    return units + 3


def flop_per_voxel(units: int, channels: int, images: int = 3) -> int:
    """Floating-point operations of NRRN's `denoise` for one voxel: its convolutions, a multiply-add counted as two."""
    # C -> C, three images: W1 L, V 3L, W 3 (at l = 0 both branches share it) + 6 (L - 1), W2 2; else L + 3L + 3L + 1
    inner = 10 * units - 1 if images == 3 else 7 * units + 1
    outer = 2  # 1 -> C: each slice once as a neighbour, once as a centre
    return 2 * 9 * (inner * channels**2 + outer * channels)


def activation_bytes(channels: int, pixels: int, images: int = 3) -> int:
    """Memory that NRRN's `denoise` takes, in float32, for slices of `pixels` pixels, as measured.

    Of three images 28 C maps, 9 C of which the centres keep for their second neighbour; else 16 C; and single ones.
    """
    return 4 * ((28 if images == 3 else 16) * channels + 8) * pixels
