"""The workers of a Dask cluster, as their driver sees them: who is there, and how much each can do at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from distributed import Client

HALF_A_GPU = {"GPU": 0.5}  # for one item: while one slab computes, the next is read
PAUSED_S = 3600.0  # longer than any slab takes; a worker that is paused for that long may not have begun with it


class Crew:
    """Looked at anew whenever that matters; workers come and go.

    resources: what an item asks for, on a cluster whose workers declare GPUs. places: how many items each worker that
    takes some can run at a time: one a thread, or two a GPU. No more are sent: one that waits behind another would be
    suspected too when that kills their worker.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._workers: Mapping[str, dict[str, Any]] = {}
        self._taking: dict[str, float] = {}  # when each, also of those that are gone, was last seen to take items
        self._last_status: dict[str, str] = {}
        self.resources: dict[str, float] | None = None
        self.places: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """Ask the scheduler; of one that does not answer it is not known that anybody went."""
        scheduler = self._client.scheduler
        if scheduler is not None and self._client.status in ("running", "connecting"):
            with suppress(OSError):
                # not client.scheduler_info, whose answer is overwritten now and then by one without workers
                self._workers = self._client.sync(scheduler.identity, n_workers=-1)["workers"]
        if any("GPU" in worker.get("resources", {}) for worker in self._workers.values()):
            self.resources = HALF_A_GPU
        self._last_status |= {address: worker.get("status", "running") for address, worker in self._workers.items()}
        taking = [address for address in self._workers if self._last_status[address] == "running"]
        self._taking |= dict.fromkeys(taking, monotonic())
        self.places = {address: places for address in taking if (places := self._places(address))}

    def _places(self, address: str) -> int:
        worker = self._workers[address]
        if self.resources is None:
            return int(worker["nthreads"])
        return int(worker.get("resources", {}).get("GPU", 0) / self.resources["GPU"])

    def freest(self, load: Mapping[str | None, int]) -> str | None:
        """The worker that can take the most beside what each has; None: none can take anything."""
        free = {address: places - load.get(address, 0) for address, places in self.places.items()}
        best = max(free, key=lambda address: free[address], default=None)
        return best if best is not None and free[best] > 0 else None

    def has_lost(self, address: str | None) -> bool:
        """Whether what only that worker may do will not be done: it is gone, or has been paused for long."""
        if address is None:
            return False
        return address not in self._workers or monotonic() - self._taking[address] > PAUSED_S

    def died(self, address: str | None) -> bool:
        """Whether it went without a word; one that has to go takes no more items first."""
        return address not in self._workers and self._last_status.get(address or "") == "running"
