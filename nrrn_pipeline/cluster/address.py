"""A Dask cluster that is running already.

Dask runs whatever code it is sent, and its clients run what they are answered: a connection is either encrypted, with
certificates on both sides, or does not leave the machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import dask
from distributed import Client, Security
from distributed.comm.core import FatalCommClosedError
from distributed.core import rpc
from distributed.utils import LoopRunner

from nrrn_pipeline.cluster.base import ClusterSettings
from nrrn_pipeline.cluster.keys import HOST_NAME, HOW_TO_MAKE, security_from
from nrrn_pipeline.errors import InputError

WAIT_S = 60
ANSWER_S = 10
LOCATION = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^\[\]:]+):(?P<port>[0-9]{1,5})", re.ASCII | re.IGNORECASE)
HOW_TO_FIND = "give the address that dask scheduler printed, such as tls://10.0.0.1:8786"
INPROC = re.compile(r"[0-9a-f.:]+/[0-9]+/[0-9]+", re.ASCII)


class AddressSettings(ClusterSettings):
    """A scheduler that runs already, such as tls://host:8786, and the folder with the keys for it."""

    kind: Literal["address"] = "address"
    address: str
    keys: str | None = None


@contextmanager
def address_client(address: str, keys: str | os.PathLike[str] | None = None) -> Iterator[Client]:
    """A client of the scheduler at `address`; the cluster stays when the block ends.

    tls://host:8786 is for any host, with the folder `keys` or with certificates that Dask's configuration names;
    tcp://host:8786 is for this machine's loopback alone, where other users of the machine can reach it. Without a
    scheme an address is tls:// if there are keys, else what Dask's configuration says, which is tcp:// unless set.

    Raises InputError if the address is none of these, no scheduler answers there, it has other keys, or it has no
    worker within a minute.
    """
    full = _refuse_unsafe(address, keys is not None)
    with _connected(full, _security(full, keys)) as client:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError as error:
            raise InputError(f"the scheduler at {address} had no worker for {WAIT_S} s: start some first") from error
        yield client


def _refuse_unsafe(address: str, keys: bool) -> str:
    """The address with its scheme. Raises InputError if it is malformed, or open to whoever reaches it."""
    shown = repr(address[:100])
    scheme, found, location = address.rpartition("://")
    if not found:
        scheme = "tls" if keys else dask.config.get("distributed.comm.default-scheme")
    if scheme == "inproc" and INPROC.fullmatch(location):
        return address
    if scheme not in ("tcp", "tls", "ws"):
        raise InputError(f"address {shown} is of an unknown kind: use tls://host:8786")
    match = LOCATION.fullmatch(location)
    if not match or not _is_host(host := match["host"]) or not 1 <= int(match["port"]) <= 65535:
        raise InputError(
            f"address {shown} is malformed: expected tls://host:8786, and IPv6 as tls://[2001:db8::1]:8786"
        )
    if scheme == "ws" or (scheme == "tcp" and not _is_loopback(host)):
        raise InputError(
            f"address {shown} is refused: whoever reaches a scheduler without TLS can run code there. Start it with "
            f"keys ({HOW_TO_MAKE}) and use tls://"
        )
    if scheme == "tcp" and (keys or dask.config.get("distributed.comm.require-encryption")):
        raise InputError(f"address {shown} is not encrypted, but keys or Dask's configuration ask for it: use tls://")
    return f"{scheme}://{location}"


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return HOST_NAME.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _security(address: str, keys: str | os.PathLike[str] | None) -> Security:
    """The certificates to show and to trust. Raises InputError if there are none for TLS, or they cannot be used."""
    encrypted = address.startswith("tls")
    try:
        security = security_from(keys) if keys is not None else Security(require_encryption=encrypted)
        usable = security.get_connection_args("client")["ssl_context"] is not None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"the TLS settings of Dask's configuration (distributed.comm.tls) cannot be used ({error}): correct them"
        ) from error
    if encrypted and not usable:
        raise InputError(f"{address} needs keys: {HOW_TO_MAKE}")
    return security


def _connected(address: str, security: Security) -> Client:
    try:
        _refuse_other_than_scheduler(address, security)
        return Client(address, timeout=ANSWER_S, security=security)
    except FatalCommClosedError as error:  # Dask's word for an error of TLS
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"the scheduler at {address} has other keys than given here, or none ({cause}): give --keys the folder "
            "that it was started with"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({type(error).__name__}): {HOW_TO_FIND}, or use local or serial"
        ) from error


def _refuse_other_than_scheduler(address: str, security: Security) -> None:
    """Ask who is there, for seconds at most: a Client would wait for ever on one that connects and says nothing.

    Raises InputError if it is not a scheduler, and OSError if nobody answers.
    """

    async def identity() -> Any:
        connection = security.get_connection_args("client")
        async with rpc(address, timeout=ANSWER_S, connection_args=connection) as there:
            return await asyncio.wait_for(there.identity(), ANSWER_S + 1)

    try:
        found = LoopRunner().run_sync(identity)["type"]
    except OSError:
        raise
    except Exception as error:  # Dask fails in many ways on what others than Dask say
        spoken = "Dask over TLS" if address.startswith("tls") else "Dask"
        raise InputError(f"what answers at {address} is not {spoken}: {HOW_TO_FIND}") from error
    if found != "Scheduler":
        raise InputError(f"what answers at {address} is {str(found)[:30]!r}, not a scheduler: {HOW_TO_FIND}")
