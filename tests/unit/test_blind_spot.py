from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.network import Architecture
from nrrn_pipeline.training.blind_spot import RADIUS, SPACING, with_blind_spots
from nrrn_pipeline.training.loss import blind_spot_loss

SHAPES = [(1, 3, 10, 10), (2, 3, 16, 24), (3, 3, 33, 11)]


def blinded_by(triplet: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With blind spots, every triplet's of its own seed."""
    return with_blind_spots(triplet, [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(triplet))])


def numbered(n: int, slices: int, height: int, width: int) -> Tensor:
    """Triplets of which every voxel has a value of its own: its number."""
    return torch.arange(n * slices * height * width, dtype=torch.float64).reshape(n, slices, height, width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_no_hidden_value_is_left_anywhere_in_the_input(shape: tuple[int, ...], seed: int) -> None:
    triplet = numbered(*shape)
    blinded, hidden = blinded_by(triplet, seed)
    values = triplet[:, 1:2][hidden]
    assert values.numel() > 0
    assert not torch.isin(values, blinded).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_hidden_pixel_takes_another_pixels_value_from_within_the_radius(shape: tuple[int, ...], seed: int) -> None:
    triplet = numbered(*shape)
    _, _, height, width = shape
    blinded, hidden = blinded_by(triplet, seed)
    own, other = triplet[:, 1:2][hidden].long(), blinded[:, 1:2][hidden].long()
    assert torch.equal(own // (height * width), other // (height * width))  # of the same slice
    apart_y = (own // width - other // width).abs()
    apart_x = (own % width - other % width).abs()
    assert max(apart_y.max(), apart_x.max()) <= RADIUS
    assert (apart_y + apart_x).min() > 0


def test_new_values_come_from_every_place_within_the_radius() -> None:
    triplet = numbered(200, 3, 32, 32)
    blinded, hidden = blinded_by(triplet)
    inner = hidden & torch.zeros_like(hidden).index_fill(2, torch.arange(8, 24), True)
    inner &= torch.zeros_like(hidden).index_fill(3, torch.arange(8, 24), True)
    moved = blinded[:, 1:2][inner] - triplet[:, 1:2][inner]
    expected = {dy * 32 + dx for dy in range(-RADIUS, RADIUS + 1) for dx in range(-RADIUS, RADIUS + 1)} - {0}
    assert set(moved.long().tolist()) == expected


def test_all_else_of_a_triplet_stays_as_it_is() -> None:
    triplet = numbered(2, 3, 16, 24)
    blinded, hidden = blinded_by(triplet)
    assert torch.equal(blinded[:, [0, 2]], triplet[:, [0, 2]])
    assert torch.equal(blinded[:, 1:2][~hidden], triplet[:, 1:2][~hidden])


def test_one_pixel_of_every_cell_is_hidden_and_in_time_each() -> None:
    _, hidden = blinded_by(torch.zeros(2000, 3, 16, 16))
    assert (hidden.sum((1, 2, 3)) == (16 // SPACING) ** 2).all()
    assert hidden.any(0).all()


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("nrrn", 1, 4, "neighbours"),
        Architecture("denoisenet", 3, 4, "channels"),
        Architecture("unet", 1, 4, "mean"),
    ],
    ids=str,
)
def test_no_estimate_depends_on_a_hidden_value(architecture: Architecture) -> None:
    torch.manual_seed(0)
    network = architecture.build()
    triplet = torch.randn(2, 3, 16, 16, requires_grad=True)
    blinded, hidden = blinded_by(triplet)
    network.estimate(blinded).square().sum().backward()
    assert triplet.grad is not None
    centre = triplet.grad[:, 1:2]
    assert (centre[hidden] == 0).all()
    assert (centre[~hidden] != 0).any()


def test_the_seed_decides_what_is_hidden() -> None:
    triplet = torch.randn(4, 3, 16, 16)
    first, again, other = (blinded_by(triplet, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_triplets_spots_are_the_same_whatever_the_others_of_its_batch() -> None:
    triplet = torch.randn(4, 3, 16, 19)
    whole, hidden = blinded_by(triplet)
    for i in range(4):
        alone, spots = with_blind_spots(triplet[i : i + 1], [torch.Generator().manual_seed(i)])
        assert torch.equal(alone[0], whole[i])
        assert torch.equal(spots[0], hidden[i])


@pytest.mark.parametrize("shape", [(9, 32), (32, 9), (1, 1)])
def test_crops_without_room_for_another_pixel_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"crops of {shape[0]} x {shape[1]} are too small.*use 10 or more"):
        blinded_by(torch.zeros(1, 3, *shape))


def test_the_loss_is_the_mean_square_on_hidden_pixels_alone() -> None:
    estimate, noisy = torch.tensor([[[[1.0, 5.0], [2.0, 9.0]]]]), torch.tensor([[[[0.0, 7.0], [5.0, 9.0]]]])
    hidden = torch.tensor([[[[True, False], [True, False]]]])
    assert blind_spot_loss(estimate, noisy, hidden).item() == (1 + 9) / 2


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_however_many_pixels_are_hidden_in_each() -> None:
    estimate, noisy = torch.randn(2, 6, 1, 19, 19)
    _, hidden = blinded_by(torch.zeros(6, 3, 19, 19))
    assert len(set(hidden.sum((1, 2, 3)).tolist())) > 1
    parts = [blind_spot_loss(estimate[i : i + 2], noisy[i : i + 2], hidden[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(blind_spot_loss(estimate, noisy, hidden), torch.stack(parts).mean())
