"""What training has reached, in a file beside its weights-to-be: killed, it goes on there.

The file is safetensors: reading it runs no code. It is replaced in one move, so that there is always a whole one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.network import parse_metadata
from nrrn_pipeline.training.fit import Training

FORMAT = "nrrn-training-1"
MAX_BYTES = 2**33  # of a network and twice as much


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training; `asked`: settings, source and noise, in JSON, which must be the same to go on."""

    url: str
    asked: dict[str, Any]

    def write(self, training: Training, losses: list[float], seconds: float) -> None:
        """Replace it. Raises RunError if that fails: the one before is still there."""
        header = {"format": FORMAT, "taken": training.taken, "seconds": seconds, "asked": self.asked}
        tensors = training.state() | {"losses": torch.tensor(losses, dtype=torch.float64)}
        try:
            storage.write_file(self.url, save(tensors, metadata={"nrrn": json.dumps(header)}))
        except OSError as error:
            raise RunError(
                f"the checkpoint {self.url} cannot be written at step {training.taken}: {error.strerror or error}; "
                "make room and run it again: it goes on from the checkpoint before, if there is one"
            ) from error

    def restore(self, training: Training) -> tuple[list[float], float]:
        """Put a training where the file is; its losses and seconds so far. None and 0 without a file.

        Raises InputError if the file is of a training that asked for something else, or is damaged.
        """
        data = storage.read_agreed(self.url, MAX_BYTES)
        if data is None:
            return [], 0.0
        try:
            header, tensors = _parsed(data)
            asked, taken, seconds = header["asked"], int(header["taken"]), float(header["seconds"])
            losses = np.asarray(tensors.pop("losses")).tolist()
            differ = [name for name, now in self.asked.items() if asked.get(name) != now]
            changes = [f"{name} was {asked.get(name)}, now {self.asked[name]}" for name in differ]
            if not changes:
                training.restore(taken, tensors)
        except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(f"the checkpoint {self.url} is damaged ({error}): delete it, to begin anew") from error
        if changes:
            raise InputError(
                f"{self.url} is of another training: {'; '.join(changes)}. Ask for the same, to go on with it, or "
                "delete it"
            )
        return losses, seconds

    def remove(self) -> None:
        """The weights are written."""
        storage.remove_file(self.url)


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises what safetensors and json do, and ValueError for a file of another kind."""
    header = parse_metadata(data)
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r:.40}")
    return header, load(data)
