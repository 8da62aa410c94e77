"""The training loop: batches of triplets in, a trained network out. Needs torch and NumPy alone.

The loss says what data training asks for: a noisy volume ("adjacent", the paper's; "blind-spot"), one whose noise is
known ("recorrupted"), or a clean one too ("clean").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from nrrn_pipeline.errors import DivergedError, InputError
from nrrn_pipeline.network import KINDS, Architecture, DenoisingNetwork, choose_device, default_inputs
from nrrn_pipeline.training.blind_spot import with_blind_spots
from nrrn_pipeline.training.loss import adjacent_slices_loss, blind_spot_loss, clean_loss
from nrrn_pipeline.training.processes import ALONE, Processes

GRADIENT = 1.0  # the longest that is taken as it is: a rare batch must not undo what many did
WARM_UP = 20  # steps in which the learning rate rises, before it falls along a cosine

AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bfloat16")
LEARNT, HELD_OUT = 0, 1  # in the keys of random numbers, each of which is one crop's
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam remembers of each weight

OnStep = Callable[[int, float], None]  # is told a step, the first being 1, and a loss
Randoms = Iterable[torch.Generator]  # one for each crop


def _ignore(_: int, __: float) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class TrainWatch:
    """Who is told how training goes.

    step: of each step, the first being 1, and its loss. look: of a step after which slices that are held out were
    looked at, and the loss there. trial: of a number of units that was tried, and the loss there.
    """

    step: OnStep = _ignore
    look: OnStep = _ignore
    trial: OnStep = _ignore


NOBODY = TrainWatch()


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Unless told, a small network, in minutes on a few cores; the paper's is PUBLISHED.

    crop: side in voxels. learning_rate: Adam's at its highest; it falls along a cosine, or by half every `halve_every`
    steps (vEMden's way; 0: never, the paper's). network, units, channels, inputs: as of Architecture. loss: a key of
    LOSSES, or "auto", by the volume's noise. checkpoint_s: seconds between two checkpoints. hold_out: share of the
    slices that validation takes; patience: how many of its looks in a row may find nothing better (0: any number).
    start: weights to go on from, of the same network; None: random ones. units: "auto" is as many as slices held out
    show to be worth it. precision: "float32"; "bfloat16" for the network's arithmetic, while weights, their updates and
    the loss stay float32; or "auto", by the device.
    None: 2 units, 16 channels and a rate of 0.02 for NRRN; for its peers what was published, and 0.001. To go on from
    weights, a quarter of the rate.
    """

    units: int | Literal["auto"] | None = None
    channels: int | None = None
    steps: int = 1600
    batch: int = 8
    crop: int = 64
    learning_rate: float | None = None
    halve_every: int | None = None
    seed: int = 0
    device: str = "auto"
    network: str = "nrrn"
    inputs: str | None = None
    loss: str = AUTO
    checkpoint_s: float = 300.0
    hold_out: float = 0.1
    patience: int = 10
    start: str | None = None
    precision: str = AUTO

    def __post_init__(self) -> None:
        """Raises InputError for numbers that no network can be trained with."""
        for name in ("units", "channels", "steps", "batch", "crop"):
            if (value := getattr(self, name)) is None or (name == "units" and value == AUTO):
                continue
            if not isinstance(value, Integral) or value < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible: use 1 or more")
        if not 0 <= self.hold_out <= 0.5:
            raise InputError(f"hold out {self.hold_out} is not possible: use 0 (nothing) to 0.5")
        for name in ("halve_every", "seed", "patience"):
            if not 0 <= (getattr(self, name) or 0) < 2**63:
                raise InputError(f"{name.replace('_', ' ')} {getattr(self, name)} is not possible: use 0 or more")
        if not 0 < self.highest_rate <= 1:
            raise InputError(f"learning rate {self.learning_rate} is not possible: use more than 0 and at most 1")
        if self.units == AUTO and (self.network != "nrrn" or self.start is not None):
            raise InputError(
                "units auto is not possible for "
                + (f"{self.network}: give a number" if self.start is None else "weights to go on from: leave it out")
            )
        if self.loss not in (AUTO, *LOSSES):
            raise InputError(f"loss {self.loss!r} is unknown: use {' or '.join((AUTO, *LOSSES))}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown: use {' or '.join(PRECISIONS)}")
        if self.architecture.kind != "nrrn" and self.loss == "adjacent":
            raise InputError(
                f"loss adjacent is not possible for {self.network}, which has no branch for each neighbour: use "
                "recorrupted, blind-spot or clean"
            )

    @property
    def architecture(self) -> Architecture:
        """The network to train, of one unit while their number is to be chosen. Raises InputError if there is none."""
        kind = KINDS.get(self.network)
        units, channels = (2, 16) if kind is None or self.network == "nrrn" else (kind.units, 64)
        inputs = default_inputs(self.network) if self.inputs is None else self.inputs
        if self.units is not None:
            units = 1 if isinstance(self.units, str) else self.units
        return Architecture(self.network, units, self.channels or channels, inputs)

    @property
    def highest_rate(self) -> float:
        """The learning rate before it falls."""
        if self.learning_rate is not None:
            return self.learning_rate
        return (0.02 if self.network == "nrrn" else 0.001) / (1 if self.start is None else 4)

    def rate_of(self, step: int) -> float:
        """The learning rate that a step is taken with, the first being 1."""
        return self.highest_rate * _rate(self, step - 1)

    @property
    def spelt_out(self) -> Self:
        """The same, with nothing left to be chosen but by the volume. Raises InputError if the device is not there."""
        found = self.architecture
        return replace(
            self,
            units=self.units if self.units == AUTO else found.units,
            channels=found.channels,
            inputs=found.inputs,
            learning_rate=self.highest_rate,
            precision=_settled(self.precision, choose_device(self.device)),
        )


class Training:
    """A network in training. A step depends on the settings, its batch and its number alone: so one can go on later.

    Of several processes each has the same network, and is given its share of every batch: the losses, the gradients
    and so the weights are those of one process with whole batches, but for rounding.
    """

    def __init__(
        self, settings: TrainSettings, start: DenoisingNetwork | None = None, processes: Processes = ALONE
    ) -> None:
        """From the weights of `start`, a network of the same architecture, or from random ones.

        Raises InputError if the device is not there, or as refuse_sharing does; ValueError for loss or units
        auto, which only a volume can settle.
        """
        if settings.loss == AUTO:
            raise ValueError("loss auto is for train(), which sees the volume: name one")
        if settings.units == AUTO:
            raise ValueError("units auto is for train(), which tries them: give a number")
        refuse_sharing(settings, processes)
        self.settings, self.taken, self.processes = settings, 0, processes
        self.device = processes.own(choose_device(settings.device))
        torch.manual_seed(settings.seed)
        self.network = settings.architecture.build().to(self.device)
        if start is not None:
            self.network.load_state_dict(start.state_dict())
        self.precision = _settled(settings.precision, self.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), betas=(0.9, 0.999), eps=1e-8)

    def take(self, batch: Tensor) -> float:
        """One step down the loss on a batch of normalised triplets; that loss.

        Batches are (n, 3, y, x); for loss clean (n, 4, y, x): the triplet, then the clean centre slice, normalised as
        the noisy one is; for recorrupted the centre slice is one recorruption, and last comes the other. Raises
        InputError for crops that are too small, DivergedError if the loss is no finite number any more, in any process:
        the weights are those after the step before, then; LostError if another process is gone.
        """
        pixels = math.prod(-(-length // self.network.architecture.grid) for length in batch.shape[2:])
        if len(batch) * pixels < 2:
            raise InputError(
                f"one crop of {tuple(batch.shape[2:])} is too small for {self.network.architecture}: use more, or "
                "larger"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate_of(self.taken + 1)
        loss = self._loss(batch, LEARNT, self.taken)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach()
        self.processes.average([loss, *(of.grad for of in self.network.parameters() if of.grad is not None)])
        if not torch.isfinite(loss):
            raise DivergedError(
                f"training failed at step {self.taken + 1}: the loss is {loss.item()}; use a lower --learning-rate"
            )
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT)
        self.optimiser.step()
        self.taken += 1
        return loss.item()

    @torch.no_grad()
    def losses(self, batches: Sequence[Tensor]) -> list[float]:
        """Of each batch, which it does not learn from; what is drawn at random is so alike each time.

        Raises DivergedError if one is no finite number, in any process; LostError if another process is gone.
        """
        self.network.eval()
        every = torch.stack([self._loss(batch, HELD_OUT, number) for number, batch in enumerate(batches)])
        self.network.train()
        self.processes.average([every])
        if not torch.isfinite(every).all():
            raise DivergedError(
                f"training failed at step {self.taken}: the loss on slices held out is {every.mean().item()}; use a "
                "lower --learning-rate"
            )
        return [float(loss) for loss in every]

    def measure(self, batches: Sequence[Tensor]) -> float:
        """The mean of `losses`; raises what that does."""
        return float(np.mean(self.losses(batches)))

    def _loss(self, batch: Tensor, *key: int) -> Tensor:
        """The settings' loss on a batch, or a share; differentiable. key: of the batch's random numbers."""
        first = self.processes.rank * len(batch)
        randoms = (_random(self.settings.seed, *key, crop) for crop in range(first, first + len(batch)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return LOSSES[self.settings.loss](self.network, batch.to(self.device), randoms)

    def state(self) -> dict[str, Tensor]:
        """After a step or more, all that the next one depends on, beside the settings and `taken`."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            tensors |= {f"{moment}.{name}": self.optimiser.state[parameter][moment] for moment in MOMENTS}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, taken: int, state: Mapping[str, Tensor]) -> None:
        """Go on where another one with the same settings was. Raises LookupError or RuntimeError for another state."""
        own = self.network.state_dict()
        self.network.load_state_dict({name: state[f"network.{name}"] for name in own})
        for name, parameter in self.network.named_parameters():
            moments = {moment: state[f"{moment}.{name}"].to(self.device) for moment in MOMENTS}
            self.optimiser.state[parameter] = {"step": torch.tensor(float(taken)), **moments}
        self.taken = taken

    def finished(self) -> DenoisingNetwork:
        """The network, ready to infer. Raises DivergedError if its weights are not finite numbers."""
        if not all(torch.isfinite(tensor).all() for tensor in self.network.state_dict().values()):
            raise DivergedError("training failed at its last step: weights are not finite; use a lower --learning-rate")
        return self.network.eval().requires_grad_(False)


def refuse_sharing(settings: TrainSettings, processes: Processes) -> None:
    """Raises InputError if several processes cannot train as one: by unequal shares, or normalising each its own."""
    processes.share(settings.batch)
    if processes.number > 1 and settings.network == "unet":
        raise InputError(
            f"network unet is not possible in {processes.number} processes, as its batch normalisation would see a "
            "share of each batch: train it in one, or another network"
        )


def fit(batches: Iterator[Tensor], settings: TrainSettings, on_step: OnStep) -> DenoisingNetwork:
    """A network trained on `batches`, as Training.take takes and raises; same settings and batches, same weights."""
    training = Training(settings)
    while training.taken < settings.steps:
        loss = training.take(next(batches))
        on_step(training.taken, loss)
    return training.finished()


def _settled(precision: str, device: torch.device) -> str:
    """float32 or bfloat16, which auto takes on GPUs that reckon in it: its range is float32's, so nothing overflows."""
    if precision != AUTO:
        return precision
    fit = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fit else "float32"


def _random(*key: int) -> torch.Generator:
    """Of one crop alone, and on the CPU, so that every device draws the same."""
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _rate(settings: TrainSettings, step: int) -> float:
    """The share of the learning rate that a step takes, the first being 0."""
    if settings.halve_every is None:
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return 0.5 ** (step // settings.halve_every) if settings.halve_every else 1.0


# estimates become float32 before a loss squares and sums them, whatever the network's arithmetic
def _adjacent(network: DenoisingNetwork, triplet: Tensor, _: Randoms) -> Tensor:
    before, centre, after = triplet.split(1, dim=1)
    both = network(torch.cat([before, after]), torch.cat([centre, centre])).float()
    return adjacent_slices_loss(both[: len(both) // 2], both[len(both) // 2 :], triplet)


def _clean(network: DenoisingNetwork, batch: Tensor, _: Randoms) -> Tensor:
    triplet, clean = batch.split([3, 1], dim=1)
    return clean_loss(network.estimate(triplet).float(), clean)


def _blind_spot(network: DenoisingNetwork, triplet: Tensor, randoms: Randoms) -> Tensor:
    blinded, hidden = with_blind_spots(triplet, randoms)
    return blind_spot_loss(network.estimate(blinded).float(), triplet[:, 1:2], hidden)


Loss = Callable[[DenoisingNetwork, Tensor, Randoms], Tensor]
LOSSES: dict[str, Loss] = {
    "adjacent": _adjacent,
    "recorrupted": _clean,  # the other recorruption stands for the clean slice
    "blind-spot": _blind_spot,
    "clean": _clean,
}

PUBLISHED = TrainSettings(
    units=4, channels=64, batch=16, crop=256, learning_rate=1e-4, halve_every=0, loss="adjacent"
)  # it names no number of steps
