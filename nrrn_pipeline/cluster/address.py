"""A Dask cluster that is running already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

from nrrn_pipeline.errors import InputError

WAIT_S = 60


@contextmanager
def address_client(address: str) -> Iterator[Client]:
    """A client of the scheduler at `address`, such as tcp://10.0.0.1:8786; the cluster stays when the block ends.

    Raises InputError if no scheduler answers there, or it has no worker within a minute.
    """
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({type(error).__name__}): give local, serial, or the address "
            "that dask scheduler printed, such as tcp://10.0.0.1:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError as error:
            raise InputError(f"the scheduler at {address} had no worker for {WAIT_S} s: start some first") from error
        yield client
