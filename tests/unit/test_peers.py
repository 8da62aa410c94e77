"""DenoiseNet and the U-Net: what they compute, how far they see, what they cost; tiles of them leave no seam."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import (
    NRRN,
    Architecture,
    DenoiseNet,
    DenoisingNetwork,
    UNet,
    activation_bytes,
    flop_per_voxel,
    in_slot,
    reach_of,
)

Array = NDArray[np.float64]

TINY = [
    Architecture("nrrn", 2, 4, "neighbours"),
    Architecture("denoisenet", 4, 4, "channels"),
    Architecture("denoisenet", 2, 3, "single"),
    Architecture("unet", 1, 4, "mean"),
    Architecture("unet", 2, 3, "single"),
]
PEERS = TINY[1:]


def random_network(architecture: Architecture, seed: int = 0) -> DenoisingNetwork:
    """With every weight and running statistic at random, as after training, ready to infer."""
    torch.manual_seed(seed)
    network = architecture.build().double().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Conv2d):
            module.weight.mul_(2)
            if module.bias is not None:
                module.bias.normal_()
    return network


def convolution(layer: nn.Conv2d, image: Array) -> Array:
    """(channels in, y, x) -> (channels out, y, x), by the definition: zero padding, shifted products."""
    weight = layer.weight.numpy()
    side, (height, width) = weight.shape[2], image.shape[1:]
    padded = np.pad(image, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    result = np.zeros((len(weight), height, width))
    for i in range(side):
        for j in range(side):
            result += np.einsum("oc,cyx->oyx", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
    return result if layer.bias is None else result + layer.bias.numpy()[:, None, None]


def numpy_denoisenet(network: DenoiseNet, image: Array) -> Array:
    shares, h = [], image
    for layer in network.layers:
        shares.append(convolution(layer, h)[0])
        h = np.maximum(convolution(layer, h), 0)
    return image[len(image) // 2] + sum(shares)


def numpy_unet(network: UNet, image: Array, level: int = 0) -> Array:
    """The maps of a grid, from those that it is given on the way down; sides are multiples of 2^depth."""

    def twice(block: nn.Sequential, h: Array) -> Array:
        for conv, norm in ((block[0], block[1]), (block[3], block[4])):
            mean, var, scale, shift = (
                tensor.numpy()[:, None, None]
                for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            h = np.maximum((convolution(conv, h) - mean) / np.sqrt(var + norm.eps) * scale + shift, 0)
        return h

    kept = twice(network.down[level], image)
    if level == network.architecture.units:
        return kept
    c, height, width = kept.shape
    coarse = kept.reshape(c, height // 2, 2, width // 2, 2).max((2, 4))
    below = numpy_unet(network, coarse, level + 1)
    up = network.up[level]
    raised = np.einsum("iyx,ioab->oyaxb", below, up.weight.numpy()).reshape(c, height, width)
    return twice(network.joined[level], np.concatenate([kept, raised + up.bias.numpy()[:, None, None]]))


@pytest.mark.parametrize(("units", "inputs"), [(2, "single"), (4, "channels"), (5, "single")])
def test_denoisenet_equals_the_sum_of_shares_written_in_numpy(units: int, inputs: str) -> None:
    network = random_network(Architecture("denoisenet", units, 3, inputs))
    assert isinstance(network, DenoiseNet)
    image = np.random.default_rng(0).standard_normal((3 if inputs == "channels" else 1, 7, 9))
    expected = numpy_denoisenet(network, image)
    np.testing.assert_allclose(network(torch.from_numpy(image)[None])[0, 0].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("depth", "shape"), [(1, (6, 8)), (2, (8, 4)), (3, (8, 16))])
def test_unet_equals_its_recursion_written_in_numpy(depth: int, shape: tuple[int, int]) -> None:
    network = random_network(Architecture("unet", depth, 2, "single"))
    assert isinstance(network, UNet)
    image = np.random.default_rng(0).standard_normal((1, *shape))
    expected = image + convolution(network.last, numpy_unet(network, image))
    np.testing.assert_allclose(network(torch.from_numpy(image)[None])[0].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(13, 10), (1, 1), (8, 9), (3, 16)])
def test_unet_continues_a_slice_by_its_last_row_and_column(shape: tuple[int, int]) -> None:
    network = random_network(Architecture("unet", 2, 3, "single"))
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    height, width = (-(-length // 4) * 4 for length in shape)
    rows, columns = (torch.arange(a).clamp(max=b - 1) for a, b in zip((height, width), shape, strict=True))
    continued = image[:, :, rows][:, :, :, columns]
    torch.testing.assert_close(network(image), network(continued)[:, :, : shape[0], : shape[1]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", TINY, ids=str)
def test_denoise_estimates_every_slice_from_its_triplet(architecture: Architecture) -> None:
    network = random_network(architecture)
    stack = torch.randn(5, 9, 7, dtype=torch.float64)
    triplets = torch.stack([stack[z : z + 3] for z in range(3)])
    torch.testing.assert_close(network.denoise(stack), network.estimate(triplets)[:, 0], rtol=0, atol=1e-12)
    assert network.architecture == architecture


@pytest.mark.parametrize("architecture", PEERS, ids=str)
def test_a_network_sees_the_slices_that_its_inputs_name(architecture: Architecture) -> None:
    network = random_network(architecture)
    triplet = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    turned = triplet[:, [1, 2, 0]]
    outer = torch.cat([triplet[:, 2:], triplet[:, 1:2], triplet[:, :1]], 1)
    same = [torch.allclose(network.estimate(triplet), network.estimate(other)) for other in (turned, outer)]
    assert same == {"single": [False, True], "mean": [True, True], "channels": [False, False]}[architecture.inputs]


@pytest.mark.parametrize("architecture", PEERS, ids=str)
@pytest.mark.parametrize("images", [1, 2, 0])
def test_peers_refuse_another_number_of_images_than_they_were_trained_on(
    architecture: Architecture, images: int
) -> None:
    with pytest.raises(InputError, match=f"images {images} is not possible for {architecture.kind}: leave it at 3"):
        architecture.build().denoise(torch.zeros(3, 8, 8), images)


def seen_from(network: DenoisingNetwork, y: int, side: int) -> list[int]:
    """The rows that the output at (y, y) depends on: gradients of random inputs, as one shows a pooling's maximum."""
    rows: set[int] = set()
    for _ in range(6):
        triplet = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
        network.estimate(triplet)[0, 0, y, y].backward()
        assert triplet.grad is not None
        rows |= set(triplet.grad[0].nonzero()[:, 1].tolist())
    return sorted(rows)


@pytest.mark.parametrize(
    ("architecture", "reach"),
    [
        (Architecture("nrrn", 2, 4, "neighbours"), 5),
        (Architecture("denoisenet", 4, 4, "channels"), 4),
        (Architecture("denoisenet", 7, 4, "single"), 7),
        (Architecture("unet", 1, 4, "mean"), 9),
        (Architecture("unet", 2, 4, "single"), 23),
    ],
    ids=str,
)
def test_the_reach_is_the_farthest_gradient_of_any_place_on_the_grid(architecture: Architecture, reach: int) -> None:
    network = random_network(architecture)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.fill_(3.0)  # hardly any rectifier shuts a path
    grid = architecture.grid
    start = -(-(reach + 2) // grid) * grid
    rows = {y: seen_from(network, y, 2 * start + grid) for y in range(start, start + grid)}
    assert max(max(y - seen[0], seen[-1] - y) for y, seen in rows.items()) == reach
    assert architecture.reach == network.reach == reach


def tiled(network: DenoisingNetwork, stack: Tensor, step: int, halo: int, grid: int) -> Tensor:
    """The estimate of a stack by tiles of `step` kept pixels a side, read with a halo from multiples of `grid` on."""
    result = torch.full_like(stack[1:-1], torch.nan)
    height, width = stack.shape[1:]
    for y in range(0, height, step):
        for x in range(0, width, step):
            top, left = (max(0, start - halo) // grid * grid for start in (y, x))
            bottom, right = min(height, y + step + halo), min(width, x + step + halo)
            estimate = network.denoise(stack[:, top:bottom, left:right].contiguous())
            kept = estimate[:, y - top : y - top + step, x - left : x - left + step]
            result[:, y : y + step, x : x + step] = kept
    return result


@pytest.mark.parametrize("architecture", TINY, ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (67, 53), (41, 59)])
def test_tiled_output_equals_whole_slice_output(architecture: Architecture, shape: tuple[int, int]) -> None:
    network = random_network(architecture)
    stack = torch.randn(4, *shape, dtype=torch.float64)
    whole = network.denoise(stack)
    found = tiled(network, stack, step=13, halo=network.reach, grid=architecture.grid)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_tiles_of_the_unet_that_begin_off_the_grid_differ() -> None:
    network = random_network(Architecture("unet", 2, 4, "single"))
    stack = torch.randn(3, 61, 61, dtype=torch.float64)
    assert (tiled(network, stack, 13, network.reach, grid=1) - network.denoise(stack)).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", TINY, ids=str)
def test_tiles_with_less_than_the_reach_differ(architecture: Architecture) -> None:
    network = random_network(architecture)
    stack = torch.randn(3, 48, 48, dtype=torch.float64)
    found = tiled(network, stack, step=16, halo=network.reach // 4, grid=architecture.grid)
    assert (found - network.denoise(stack)).abs().max() > 1e-6


@pytest.mark.parametrize("length", [33, 34, 35, 36])
def test_a_tile_that_ends_with_its_slice_is_continued_as_the_slice_is(length: int) -> None:
    network = random_network(Architecture("unet", 2, 4, "mean"))
    stack = torch.randn(3, length, length, dtype=torch.float64)
    start = 8
    last = network.denoise(stack[:, start:, start:].contiguous())[:, network.reach :, network.reach :]
    beyond = start + network.reach
    torch.testing.assert_close(last, network.denoise(stack)[:, beyond:, beyond:], rtol=0, atol=1e-12)


ALL = [Architecture("nrrn", units, 64, "neighbours") for units in range(1, 6)] + [
    Architecture.published("denoisenet"),
    Architecture.published("denoisenet", "single"),
    Architecture.published("unet"),
    Architecture("unet", 2, 8, "single"),
    Architecture("denoisenet", 2, 8, "single"),
]


@pytest.mark.parametrize("architecture", ALL, ids=str)
def test_one_tile_more_costs_the_arithmetic_that_is_told(architecture: Architecture) -> None:
    network = architecture.build().to("meta").eval()

    def counted(slices: int) -> int:
        with FlopCounterMode(display=False) as counter:
            network.denoise(torch.zeros(slices + 2, 256, 256, device="meta"))
        return counter.get_total_flops()

    assert counted(5) - counted(4) == architecture.flop_per_voxel() * 256**2


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        (Architecture.published("nrrn"), 960_768),
        # 9 weights a pair of maps, one bias a map: 1 -> C, 18 times C -> C, C -> 1
        (Architecture.published("denoisenet", "single"), 640 + 18 * 36_928 + 577),
        (Architecture.published("denoisenet", "channels"), 1_792 + 18 * 36_928 + 577),
        # C = 2, no pooling but one. Down: 18 + 36, 72 + 144; up: 32 + 2; joined: 72 + 36; last: 2 + 1; norms: 2 a map
        (Architecture("unet", 1, 2, "mean"), 54 + 216 + 34 + 108 + 3 + 2 * (2 + 2 + 4 + 4 + 2 + 2)),
    ],
    ids=str,
)
def test_parameters_are_those_counted_by_hand(architecture: Architecture, parameters: int) -> None:
    assert architecture.parameters == parameters
    assert sum(parameter.numel() for parameter in architecture.build().parameters()) == parameters


def test_an_nrrns_architecture_tells_what_its_functions_tell() -> None:
    ours = Architecture("nrrn", 3, 8, "neighbours")
    assert ours.reach == reach_of(3)
    assert ours.flop_per_voxel(2) == flop_per_voxel(3, 8, 2)
    assert ours.activation_bytes(100, 1) == activation_bytes(8, 100, 1)
    assert NRRN(3, 8).architecture == ours


@pytest.mark.parametrize("architecture", TINY, ids=str)
def test_a_built_network_is_the_one_described(architecture: Architecture) -> None:
    network = architecture.build()
    assert network.architecture == architecture
    assert type(network) is {"nrrn": NRRN, "denoisenet": DenoiseNet, "unet": UNet}[architecture.kind]


@pytest.mark.parametrize("architecture", PEERS, ids=str)
def test_a_peer_fits_the_slot(architecture: Architecture) -> None:
    network = architecture.build().eval()
    stack = np.random.default_rng(0).standard_normal((4, 9, 8), dtype=np.float32)
    expected = network.denoise(torch.from_numpy(stack)).numpy()
    slot = in_slot(network, "cpu", 3)
    np.testing.assert_allclose(slot(stack), expected, atol=1e-5)
    assert (slot.reach, slot.grid) == (architecture.reach, architecture.grid)


def test_tiles_may_begin_anywhere_unless_slices_are_pooled() -> None:
    assert [architecture.grid for architecture in TINY] == [1, 1, 1, 2, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("resnet", 4, 64, "single"), "network 'resnet' is unknown: use nrrn or denoisenet or unet"),
        ((["nrrn"], 4, 64, "single"), "is unknown: use nrrn"),
        (("nrrn", 0, 64, "neighbours"), "units 0 is not possible for nrrn: use 1 to 64"),
        (("denoisenet", 1, 64, "single"), "units 1 is not possible for denoisenet: use 2 to 64"),
        (("unet", 9, 64, "mean"), "units 9 is not possible for unet: use 1 to 8"),
        (("unet", True, 64, "mean"), "units True is not possible"),
        (("unet", 4, 0, "mean"), "channels 0 is not possible for unet: use 1 to 4096"),
        (("unet", 4, 64, "channels"), "inputs 'channels' is not possible for unet: use mean or single"),
        (("denoisenet", 20, 64, "mean"), "inputs 'mean' is not possible for denoisenet: use channels or single"),
        (("nrrn", 4, 64, "single"), "inputs 'single' is not possible for nrrn: use neighbours"),
    ],
    ids=str,
)
def test_what_is_no_network_is_refused_with_what_would_be_one(fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        Architecture(*fields)


def test_an_unknown_kind_has_no_published_network() -> None:
    with pytest.raises(InputError, match="network 'resnet' is unknown"):
        Architecture.published("resnet")
