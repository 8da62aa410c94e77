"""What training has reached, in a file beside its weights-to-be: killed, it goes on there.

The file is safetensors: reading it runs no code. It is replaced in one move, so that there is always a whole one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.network import parse_metadata
from nrrn_pipeline.training.course import Course

FORMAT = "nrrn-training-2"
MAX_BYTES = 2**33  # of a network and three times as much
DAMAGE = (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, AttributeError)  # what it is noticed by


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training; `asked`: settings, source and noise, in JSON, which must be the same to go on."""

    url: str
    asked: dict[str, Any]

    def write(self, course: Course) -> None:
        """Replace it. Raises RunError if that fails: the one before is still there."""
        taken = course.training.taken
        header = {"format": FORMAT, "taken": taken, "seconds": course.seconds, "asked": self.asked}
        try:
            storage.write_file(self.url, save(course.state(), metadata={"nrrn": json.dumps(header)}))
        except OSError as error:
            raise RunError(
                f"the checkpoint {self.url} cannot be written at step {taken}: {error.strerror or error}; "
                "make room and run it again: it goes on from the checkpoint before, if there is one"
            ) from error

    def kept(self) -> str:
        """What is there to go on with, in short: "step 40, " and a digest; "step 0" without a file.

        Raises InputError if the file is of a training that asked for something else, or is damaged.
        """
        kept = self._kept()
        return "step 0" if kept is None else f"step {kept[0]['taken']}, {kept[2]}"

    def restore(self, course: Course) -> None:
        """Put a course where the file is; without one it begins.

        Raises InputError if the file is of a training that asked for something else, or is damaged.
        """
        kept = self._kept()
        if kept is None:
            return
        header, tensors, _ = kept
        try:
            course.restore(int(header["taken"]), float(header["seconds"]), tensors)
        except DAMAGE as error:
            raise self._damaged(error) from error

    def _kept(self) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
        """Header, tensors and the file's digest; None if there is no file."""
        data = storage.read_agreed(self.url, MAX_BYTES)
        if data is None:
            return None
        try:
            header, tensors = _parsed(data)
            asked = header["asked"]
            differ = [name for name in {**self.asked, **asked} if asked.get(name) != self.asked.get(name)]
        except DAMAGE as error:
            raise self._damaged(error) from error
        if differ:
            changes = "; ".join(f"{name} was {asked.get(name)}, now {self.asked.get(name)}" for name in differ)
            raise InputError(
                f"{self.url} is of another training: {changes}. Ask for the same, to go on with it, or delete it"
            )
        return header, tensors, storage.digest(data)

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"the checkpoint {self.url} is damaged ({error}): delete it, to begin anew")

    def remove(self) -> None:
        """It is of no use any more."""
        storage.remove_file(self.url)


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises what safetensors and json do, and ValueError for a file of another kind."""
    header = parse_metadata(data)
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r:.40}")
    return header, load(data)
