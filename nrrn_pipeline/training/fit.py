"""The training loop: batches of triplets in, a trained network out. Needs torch alone.

The loss says what data training asks for: noisy volumes ("adjacent", the paper's; "blind-spot") or a clean one too
("clean").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.network import KINDS, Architecture, DenoisingNetwork, choose_device, default_inputs
from nrrn_pipeline.training.blind_spot import with_blind_spots
from nrrn_pipeline.training.loss import adjacent_slices_loss, blind_spot_loss, clean_loss

OnStep = Callable[[int, float], None]  # is told each step and its loss


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are the paper's, but for `steps` (it names none) and `halve_every` (vEMden's idea).

    crop: side in voxels. learning_rate: Adam's, halved every `halve_every` steps (0: never). network, units, channels,
    inputs: as of Architecture; None takes what was published for that kind of network. loss: a key of LOSSES.
    """

    units: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    channels: int = 64
    steps: int = 2000
    batch: int = 16
    crop: int = 256
    learning_rate: float = 1e-4
    halve_every: int = 0
    seed: int = 0
    device: str = "auto"
    network: str = "nrrn"
    inputs: str | None = None
    loss: str = "adjacent"

    def __post_init__(self) -> None:
        """Raises InputError for numbers that no network can be trained with."""
        if self.units is None:
            object.__setattr__(self, "units", KINDS[self.network].units if self.network in KINDS else 1)
        for name in ("units", "channels", "steps", "batch", "crop"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 1 or more")
        for name in ("halve_every", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InputError(f"{name.replace('_', ' ')} {getattr(self, name)} is not possible: use 0 or more")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning rate {self.learning_rate} is not possible: use more than 0 and at most 1")
        if self.loss not in LOSSES:
            raise InputError(f"loss {self.loss!r} is unknown: use {' or '.join(LOSSES)}")
        if self.architecture.kind != "nrrn" and self.loss == "adjacent":
            raise InputError(
                f"loss adjacent is not possible for {self.network}, which has no branch for each neighbour: use clean "
                "or blind-spot"
            )

    @property
    def architecture(self) -> Architecture:
        """The network to train. Raises InputError if there is none such."""
        inputs = default_inputs(self.network) if self.inputs is None else self.inputs
        return Architecture(self.network, self.units, self.channels, inputs)


def fit(batches: Iterator[Tensor], settings: TrainSettings, on_step: OnStep) -> DenoisingNetwork:
    """A network trained on batches of normalised triplets; same seed and batches, same weights.

    Batches are (n, 3, y, x), or, for loss clean, (n, 4, y, x): the triplet, then the clean centre slice, normalised as
    the noisy one. Raises RunError if the loss is no finite number any more.
    """
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    network = settings.architecture.build().to(device)
    random = torch.Generator().manual_seed(settings.seed)  # on the CPU, so that every device hides the same pixels
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    rate = torch.optim.lr_scheduler.StepLR(optimiser, settings.halve_every or settings.steps, gamma=0.5)
    for step in range(1, settings.steps + 1):
        batch = next(batches).to(device)
        if len(batch) * math.prod(-(-length // network.architecture.grid) for length in batch.shape[2:]) < 2:
            raise InputError(
                f"one crop of {batch.shape[2:]} is too small for {network.architecture}: use more, or larger"
            )
        loss = LOSSES[settings.loss](network, batch, random)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        if not torch.isfinite(loss):
            raise RunError(f"training failed at step {step}: the loss is {loss.item()}; use a lower --learning-rate")
        on_step(step, loss.item())
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise RunError("training failed at its last step: weights are not finite; use a lower --learning-rate")
    return network.eval().requires_grad_(False)


def _adjacent(network: DenoisingNetwork, triplet: Tensor, _: torch.Generator) -> Tensor:
    before, centre, after = triplet.split(1, dim=1)
    both = network(torch.cat([before, after]), torch.cat([centre, centre]))
    return adjacent_slices_loss(both[: len(both) // 2], both[len(both) // 2 :], triplet)


def _clean(network: DenoisingNetwork, batch: Tensor, _: torch.Generator) -> Tensor:
    triplet, clean = batch.split([3, 1], dim=1)
    return clean_loss(network.estimate(triplet), clean)


def _blind_spot(network: DenoisingNetwork, triplet: Tensor, random: torch.Generator) -> Tensor:
    blinded, hidden = with_blind_spots(triplet, random)
    return blind_spot_loss(network.estimate(blinded), triplet[:, 1:2], hidden)


Loss = Callable[[DenoisingNetwork, Tensor, torch.Generator], Tensor]
LOSSES: dict[str, Loss] = {"adjacent": _adjacent, "clean": _clean, "blind-spot": _blind_spot}
