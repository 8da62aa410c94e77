"""How many building units a volume is worth: one more as long as slices that are held out show that it helps.

Source: Giannios et al., Fig. 5C: the first one to three do most, and heavy noise takes up to five.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from nrrn_pipeline import storage
from nrrn_pipeline.errors import DivergedError, InputError, RunError
from nrrn_pipeline.training.fit import NOBODY, OnStep, Training, TrainSettings
from nrrn_pipeline.training.processes import ALONE, Processes
from nrrn_pipeline.training.triplets import Triplets

MOST = 5  # units
SHARE = 4  # a trial takes this part of all steps
HELD_OUT_BATCHES = 16  # that a trial is judged by
SURE = 2.0  # standard errors by which one more unit must lower the loss

Losses = list[float]  # of each batch held out


@dataclass(frozen=True)
class Trials:
    """Short trainings of 1, 2, ... units, whose losses are kept in a file: killed, they go on with the next.

    asked: what the whole training was asked for; what was tried for another one counts for nothing.
    """

    url: str
    asked: dict[str, Any]

    def run(self, crops: Triplets, processes: Processes = ALONE, on_trial: OnStep = NOBODY.trial) -> list[Losses]:
        """The losses of 1, 2, ... units, up to the first that were no better than one less, or MOST.

        One that diverges is no better. Raises InputError if no slices are held out, DivergedError if not even one unit
        can be trained, RunError if a trial cannot be kept.
        """
        held_out = crops.validation(HELD_OUT_BATCHES)
        if not held_out:
            raise InputError(
                "units auto is not possible here: it is slices held out that tell how many are worth it, and of "
                f"{len(crops.learnt)} none is (--hold-out is {crops.settings.hold_out:g}): name the --units, or give "
                "more slices"
            )
        tried = self.tried()
        while len(tried) < MOST and chosen(tried) == len(tried):
            units = len(tried) + 1
            try:
                tried.append(_losses(replace(crops.settings, units=units), crops, held_out, processes))
            except DivergedError:
                if not tried:
                    raise
                break
            if processes.is_first:
                self._keep(tried)
            on_trial(units, float(np.mean(tried[-1])))
        return tried

    def _keep(self, tried: list[Losses]) -> None:
        try:
            storage.write_document(self.url, {"asked": json.dumps(self.asked), "tried": tried})
        except OSError as error:
            raise RunError(
                f"the trials in {self.url} cannot be written: {error.strerror or error}; make room and run it again: "
                "it goes on with those that were kept, if there are any"
            ) from error

    def remove(self) -> None:
        """They are of no use any more."""
        storage.remove_file(self.url)

    def tried(self) -> list[Losses]:
        """What is kept of these trials. Raises InputError if it is damaged."""
        try:
            document = storage.read_document(self.url)
        except ValueError as error:
            raise InputError(f"{error}: delete it, to try anew how many units are worth it") from error
        return document["tried"] if document and document.get("asked") == json.dumps(self.asked) else []


def chosen(tried: Sequence[Losses]) -> int:
    """Of the losses of 1, 2, ... units on the same batches, the number from which on one more does not help for sure.

    It helps if it lowers the loss by SURE standard errors of the difference, batch by batch. 0 if nothing was tried.
    """
    for units in range(1, len(tried)):
        gained = np.subtract(tried[units - 1], tried[units])
        if not gained.mean() > SURE * gained.std(ddof=1) / np.sqrt(len(gained)):
            return units
    return len(tried)


def _losses(settings: TrainSettings, crops: Triplets, held_out: Sequence[Tensor], processes: Processes) -> Losses:
    """Of a network of settings.units after a part of the steps, along a learning rate of its own."""
    training = Training(replace(settings, steps=-(-settings.steps // SHARE)), processes=processes)
    with closing(crops.batches()) as batches:
        while training.taken < training.settings.steps:
            training.take(next(batches))
    return training.losses(held_out)
