"""Numbers of a training while it goes on, in the files that TensorBoard reads."""

from __future__ import annotations

import os
import socket
import struct
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, RunError

if TYPE_CHECKING:
    from nrrn_pipeline.training.fit import TrainSettings

LEARNT, HELD_OUT, RATE = "loss/learnt_from", "loss/held_out", "learning_rate"


class Scalars:
    """A file in a folder on disk that grows by each step and each look of a training.

    A training that is resumed adds a file, which tells TensorBoard to forget what an earlier one has of the same steps.
    """

    def __init__(self, folder: str, settings: TrainSettings) -> None:
        """Raises InputError if tensorboardX is missing, or nothing can be written to the folder; writes nothing yet."""
        if find_spec("tensorboardX") is None:
            raise InputError("writing for TensorBoard needs tensorboardX: pip install nrrn-pipeline[tensorboard]")
        if "://" in folder or not folder:
            raise InputError(f"{folder!r} is no folder on disk: give one for TensorBoard's files")
        self.folder, self.settings = os.path.abspath(folder), settings
        self._file: str | None = None
        try:
            storage.check_writable(self.folder)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written to: {error.strerror or error}; choose another folder for TensorBoard"
            ) from error

    def step(self, number: int, loss: float) -> None:
        """A step, the first being 1, with its loss. Raises RunError if it cannot be written."""
        self._write(number, {LEARNT: loss, RATE: self.settings.rate_of(number)})

    def look(self, number: int, loss: float) -> None:
        """After that step, the loss on slices that are held out. Raises RunError if it cannot be written."""
        self._write(number, {HELD_OUT: loss})

    def _write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        events = [Event(step=step, summary=summary)]
        if self._file is None:
            # TensorBoard reads a folder's files in the order of their names
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = f"{self.folder}/{name}"
            start = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(step=step, session_log=start), *events]
        for event in events:
            event.wall_time = time.time()
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(self._file, "ab") as file:  # closed each time: a killed training keeps all that it told
                file.write(b"".join(_record(event.SerializeToString()) for event in events))
        except OSError as error:
            raise RunError(
                f"nothing more can be written for TensorBoard to {self.folder} ({error.strerror or error}): make room, "
                "or leave it out, and run the same command again to go on from the last checkpoint"
            ) from error


def _record(data: bytes) -> bytes:
    """TFRecord: a length and the data, each with its masked CRC-32C."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
