from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nrrn_pipeline.network import NRRN
from tests.support import tiny_network

Array = NDArray[np.float64]


def numpy_convolution(layer: torch.nn.Conv2d, image: Array, part: slice = slice(None)) -> Array:
    """(channels in, y, x) -> (channels out, y, x), by the definition: zero padding, nine shifted products."""
    weight, bias = layer.weight.numpy()[part], layer.bias.numpy()[part]
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    result = np.broadcast_to(bias[:, None, None], (len(bias), height, width)).copy()
    for i in range(3):
        for j in range(3):
            result += np.einsum("oc,cyx->oyx", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
    return result


def numpy_branch(network: NRRN, neighbour: Array, centre: Array) -> list[Array]:
    """The branch written down from its definition; the estimate after every unit, then the final one."""

    def sigmoid(a: Array) -> Array:
        return 1 / (1 + np.exp(-a))

    def relu(a: Array) -> Array:
        return np.maximum(a, 0)

    def attention(h: Array) -> Array:
        return h[0] * sigmoid(h.max(axis=0))

    update, reset, candidate = (slice(i * network.channels, (i + 1) * network.channels) for i in range(3))
    h_n = relu(numpy_convolution(network.first, neighbour[None]))
    h_c = relu(numpy_convolution(network.first, centre[None]))
    x, estimates = centre, []
    for unit in network.units:
        h_n = np.tanh(numpy_convolution(network.advance, h_n))
        u = sigmoid(numpy_convolution(unit.centre, h_c, update) + numpy_convolution(unit.neighbour, h_n, update))
        r = sigmoid(numpy_convolution(unit.centre, h_c, reset) + numpy_convolution(unit.neighbour, h_n, reset))
        c = np.tanh(
            numpy_convolution(unit.centre, h_c, candidate) + r * numpy_convolution(unit.neighbour, h_n, candidate)
        )
        h_c = u * h_n + (1 - u) * c
        x = x + attention(h_c)
        estimates.append(x)
        h_c[0] = np.tanh(x)
    estimates.append(x + attention(numpy_convolution(network.last, relu(h_c))))
    return estimates


@pytest.mark.parametrize(("units", "channels", "shape"), [(1, 4, (9, 11)), (3, 5, (16, 7)), (2, 1, (1, 1))])
def test_forward_equals_a_branch_written_in_numpy(units: int, channels: int, shape: tuple[int, int]) -> None:
    network = tiny_network(units, channels, gain=2.0).double()
    neighbour, centre = np.random.default_rng(0).standard_normal((2, *shape))
    expected = numpy_branch(network, neighbour, centre)
    images = [torch.from_numpy(image)[None, None] for image in (neighbour, centre)]
    np.testing.assert_allclose(network(*images)[0, 0].numpy(), expected[-1], rtol=0, atol=1e-10)
    every = network(*images, estimates=True)[0].numpy()
    np.testing.assert_allclose(every, np.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("images", [3, 2, 1])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_denoise_is_the_mean_of_the_branches_of_every_triplet(images: int, depth: int) -> None:
    network = tiny_network(2, 4).double()
    stack = torch.randn(depth + 2, 13, 10, dtype=torch.float64)
    branches = {3: [-1, +1], 2: [-1], 1: [0]}[images]
    for z, estimate in enumerate(network.denoise(stack, images), start=1):
        expected = sum(network(stack[None, None, z + step], stack[None, None, z]) for step in branches) / len(branches)
        torch.testing.assert_close(estimate, expected[0, 0], rtol=0, atol=1e-12)


def test_the_estimates_after_each_unit_are_those_of_both_branches_and_end_with_the_final_one() -> None:
    network = tiny_network(3, 4, gain=1.5).double()
    stack = torch.randn(4, 13, 10, dtype=torch.float64)
    found = network.after_each_unit(stack)
    assert found.shape == (4, 2, 13, 10)
    torch.testing.assert_close(found[-1], network.denoise(stack), rtol=0, atol=1e-12)
    branches = [network(stack[None, None, i], stack[None, None, 1], estimates=True)[0] for i in (0, 2)]
    torch.testing.assert_close(found[:, 0], (branches[0] + branches[1]) / 2, rtol=0, atol=1e-12)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("units", [1, 2, 4])
def test_the_reach_measured_by_gradients_is_units_plus_3(units: int) -> None:
    network = tiny_network(units, 4, gain=1.5).double()
    size = 2 * network.reach + 7
    images = [torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    middle = size // 2
    network(*images)[0, 0, middle, middle].backward()
    radii = []
    for image in images:
        assert image.grad is not None
        seen = image.grad[0, 0].nonzero()
        radii.append(int((seen - middle).abs().max()))
    assert radii == [units + 3, units + 2]
    assert network.reach == units + 3


def test_the_papers_network_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in NRRN(units=4, channels=64).parameters()) == 960_768


def test_each_slices_neighbour_states_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = tiny_network(), []
    original = NRRN._neighbour_states
    monkeypatch.setattr(NRRN, "_neighbour_states", lambda self, image: calls.append(1) or original(self, image))
    network.denoise(torch.randn(7, 8, 8))
    assert len(calls) == 7


def test_gates_start_orthogonal() -> None:
    unit = NRRN(1, 8).units[0]
    for layer in (unit.centre, unit.neighbour):
        for gate, gain in zip(layer.weight.detach().split(8), (1, 1, 5 / 3), strict=True):
            rows = gate.reshape(8, -1) / gain
            torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-5)


def test_gradients_of_forward_are_right() -> None:
    network = tiny_network(2, 2).double()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    neighbour, centre = torch.randn(2, 1, 1, 5, 5, dtype=torch.float64)
    names = [name for name, _ in network.named_parameters()]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(network, named, (neighbour, centre)).sum()

    assert torch.autograd.gradcheck(loss, tuple(network.parameters()))
