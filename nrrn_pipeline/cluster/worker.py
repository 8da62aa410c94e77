"""What every local worker process does first; Dask loads this module by its name."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:  # noqa: ARG001  (Dask's signature)
    """Leave Ctrl-C to the driver: a terminal sends it to all processes, and the driver ends the workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
