"""What every worker process that we start does first; Dask loads this module by its name.

A worker that is a job has an end: when its time is nearly over, or a signal says so, it takes no more slabs, finishes
those that it holds if there is time, and leaves. Dask counts no such death against the slabs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from contextlib import suppress
from typing import Any

from distributed.core import Status

# in the environment of a worker that is a job
STOP_AT = "NRRN_STOP_AT"  # when to take no more slabs, in seconds since 1970
STOP_WITHIN_S = "NRRN_STOP_WITHIN_S"  # how long those that it holds may take then
GRACE_S = "NRRN_GRACE_S"  # how long they may take after a signal
GPUS = "NRRN_GPUS"  # of a local worker's machine, which share them: the n-th takes the n-th
# Grid Engine and LSF announce an end by the second
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
POLL_S = 0.1
ANSWER_S = 10


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C and failed tasks to the driver; in a job, leave when its time is over.

    A terminal sends Ctrl-C to all processes, and the driver ends the workers in order. A task's error reaches the
    driver, which says it in one line; the worker would print its traceback besides.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # what it says of itself stays: Dask's ssh waits for the words that a worker started
    logging.getLogger("distributed.worker").addFilter(lambda record: record.levelno < logging.WARNING)
    if (gpus := int(os.environ.get(GPUS, "0"))) > 1:
        _take_gpu(int(worker.name), gpus)
    leaving, loop = Leaving(worker), asyncio.get_running_loop()
    if GRACE_S in os.environ:
        for announced in SIGNALS:
            loop.add_signal_handler(announced, leaving.begin, float(os.environ[GRACE_S]))
    if STOP_AT in os.environ:
        left_s = float(os.environ[STOP_AT]) - time.time()
        loop.call_later(max(0.0, left_s), leaving.begin, float(os.environ[STOP_WITHIN_S]))


def _take_gpu(number: int, gpus: int) -> None:
    """See one GPU alone: torch takes the first that it sees. Before its first use; afterwards this has no effect."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = visible if len(visible) == gpus else [str(gpu) for gpu in range(gpus)]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[number % gpus]


class Leaving:
    """How one worker goes away without a slab lost, or suspected."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._until = math.inf
        self._task: asyncio.Task[None] | None = None

    def begin(self, within_s: float) -> None:
        """Take no more slabs, and go when those that are held are done, at most `within_s` from now."""
        self._until = min(self._until, time.monotonic() + within_s)
        if self._task is None:
            self._task = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        worker = self._worker
        while worker.status == Status.init:  # closed in mid-start it might hang
            await asyncio.sleep(POLL_S)
        if worker.status == Status.running:
            # the scheduler gives nothing to a paused worker, and its memory monitor, which could wake it, is off
            worker.status = Status.paused
        while self._holds_slabs() and time.monotonic() < self._until:
            await asyncio.sleep(POLL_S)
        # expected: whatever is still held goes to others, with no worker's death to its name
        expected = {"address": worker.address, "expected": True, "close": False, "stimulus_id": "nrrn-worker-leaves"}
        with suppress(Exception):  # a scheduler that is gone, or does not answer, gives nothing to anybody
            await asyncio.wait_for(worker.scheduler.unregister(**expected), ANSWER_S)
        if self._holds_slabs():
            os._exit(0)  # Dask would wait for their threads, which nothing can stop; files get their names when whole
        await worker.close(reason="nrrn-worker-leaves")

    def _holds_slabs(self) -> bool:
        """Whether any is at work, or its record has not been fetched, which would have it done again."""
        state = self._worker.state
        return bool(state.executing_count or state.long_running or self._worker.data)
