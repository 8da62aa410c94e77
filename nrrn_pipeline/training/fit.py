"""The training loop: batches of triplets in, a trained network out. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.network import NRRN, choose_device
from nrrn_pipeline.training.loss import adjacent_slices_loss

OnStep = Callable[[int, float], None]  # is told each step and its loss


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are the paper's, but for `steps` (it names none) and `halve_every` (vEMden's idea).

    crop: side in voxels. learning_rate: Adam's, halved every `halve_every` steps (0: never).
    """

    units: int = 4
    channels: int = 64
    steps: int = 2000
    batch: int = 16
    crop: int = 256
    learning_rate: float = 1e-4
    halve_every: int = 0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises InputError for numbers that no network can be trained with."""
        for name in ("units", "channels", "steps", "batch", "crop"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 1 or more")
        for name in ("halve_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', ' ')} {getattr(self, name)} is not possible: use 0 or more")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning rate {self.learning_rate} is not possible: use more than 0 and at most 1")


def fit(batches: Iterator[Tensor], settings: TrainSettings, on_step: OnStep) -> NRRN:
    """A network trained with eq. 3 on (n, 3, y, x) normalised triplets; same seed and batches, same weights.

    Raises RunError if the loss is no finite number any more.
    """
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    network = NRRN(settings.units, settings.channels).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    rate = torch.optim.lr_scheduler.StepLR(optimiser, settings.halve_every or settings.steps, gamma=0.5)
    for step in range(1, settings.steps + 1):
        triplet = next(batches).to(device)
        before, centre, after = triplet.split(1, dim=1)
        both = network(torch.cat([before, after]), torch.cat([centre, centre]))
        loss = adjacent_slices_loss(both[: len(both) // 2], both[len(both) // 2 :], triplet)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        if not torch.isfinite(loss):
            raise RunError(f"training failed at step {step}: the loss is {loss.item()}; use a lower --learning-rate")
        on_step(step, loss.item())
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise RunError("training failed at its last step: weights are not finite; use a lower --learning-rate")
    return network.eval().requires_grad_(False)
