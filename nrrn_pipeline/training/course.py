"""A training from its first step to its last: how it does on slices that are held out, and its best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from nrrn_pipeline.network import DenoisingNetwork
from nrrn_pipeline.training.fit import Training

LOOKS = 20  # at slices held out, spread evenly over the steps
LOOKED_AT = 4  # batches, the same ones every time


class Course:
    """A training, and what is known of it so far.

    held_out: batches to look at, as Training.take takes them. losses: of each step. looks: (step, loss on what is held
    out). best: the network's state at the least of these; if nothing is held out, the last weights are the best.
    """

    def __init__(self, training: Training, held_out: Sequence[Tensor] = ()) -> None:
        self.training, self.held_out = training, held_out
        self.losses: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self._before_s, self._started = 0.0, perf_counter()

    @property
    def seconds(self) -> float:
        """That it took, those before an interruption included."""
        return self._before_s + perf_counter() - self._started

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or the last looks, as many as the settings' patience, saw nothing better."""
        settings = self.training.settings
        if self.training.taken >= settings.steps:
            return True
        best = self.best_look()
        return best is not None and 0 < settings.patience <= len(self.looks) - 1 - self.looks.index(best)

    def best_look(self) -> tuple[int, float] | None:
        """Step and loss; None before the first look."""
        return min(self.looks, key=lambda look: look[1], default=None)

    def take(self, batch: Tensor) -> None:
        """One step, and a look if it is time for one. Raises as Training.take and measure do."""
        self.losses.append(self.training.take(batch))
        taken, steps = self.training.taken, self.training.settings.steps
        if self.held_out and (taken == steps or taken % -(-steps // LOOKS) == 0):
            self.looks.append((taken, self.training.measure(self.held_out)))
            if self.best_look() == self.looks[-1]:
                self.best = {name: tensor.clone() for name, tensor in self.training.network.state_dict().items()}

    def finished(self) -> DenoisingNetwork:
        """The network at its best, ready to infer; no further steps can be taken. Raises as Training.finished does."""
        if self.best:
            self.training.network.load_state_dict(self.best)
        return self.training.finished()

    def state(self) -> dict[str, Tensor]:
        """After a step or more, all of it but the settings, the number of steps and seconds."""
        told = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        told["looks"] = torch.tensor(self.looks, dtype=torch.float64).reshape(-1, 2)
        best = {f"best.{name}": tensor.cpu().contiguous() for name, tensor in self.best.items()}
        return self.training.state() | told | best

    def restore(self, taken: int, seconds: float, state: Mapping[str, Tensor]) -> None:
        """Go on where another one was. Raises LookupError, ValueError or RuntimeError for another state."""
        self.losses = np.asarray(state["losses"]).tolist()
        self.looks = [(int(step), float(loss)) for step, loss in np.asarray(state["looks"]).tolist()]
        self.best = {name.removeprefix("best."): of for name, of in state.items() if name.startswith("best.")}
        self.training.restore(taken, state)
        self._before_s, self._started = seconds, perf_counter()
