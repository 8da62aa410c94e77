"""What every worker process that we start does first; Dask loads this module by its name."""

from __future__ import annotations

import logging
import signal
from typing import Any


def dask_setup(worker: Any) -> None:  # noqa: ARG001  (Dask's signature)
    """Leave Ctrl-C and failed tasks to the driver.

    A terminal sends Ctrl-C to all processes, and the driver ends the workers in order. A task's error reaches the
    driver, which says it in one line; the worker would print its traceback besides.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
