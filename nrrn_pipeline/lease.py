"""One driver at a time: who is at work on an output, told by small files that only their owner writes.

    DST/0/nrrn/drivers/0000012.json     the highest number is the driver at work, or the last that was
    DST/0/nrrn/members/OWNER.json       processes that share a run without a driver (members.py)

A driver takes the next number, which storage grants to one alone (conditional write), and renews its file every
RENEW_S. Another takes over when the file has not changed for LEASE_S, or its process is seen to be gone (presence.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nrrn_pipeline import presence, storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.presence import Presence, Watch, has_ended

DRIVER, MOST_DRIVERS = re.compile(r"[0-9]{7}\.json"), 9_999_999


def last_driver(ledger_url: str) -> dict[str, Any] | None:
    """What the driver at work, or the last one, says of itself; None if there was none or it cannot be read."""
    names = driver_names(ledger_url)
    if not names:
        return None
    try:
        return storage.read_document(f"{ledger_url}/drivers/{names[-1]}")
    except ValueError:
        return None


@dataclass
class Lease:
    """The right to drive an output's run, until `release`. `facts` go out with each renewal: how the run goes."""

    ledger_url: str
    facts: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    presence: Presence = field(init=False)

    def __post_init__(self) -> None:
        self.presence = Presence(self.facts)

    @property
    def owner(self) -> str:
        """What tells this lease from all others."""
        return self.presence.owner

    def take(self) -> Generator[float, None, None]:
        """Take the lease, yielding the seconds waited so far while another's has to run out.

        Raises InputError if another driver is at work.
        """
        self.presence.announce()
        try:
            yield from self._take()
        except BaseException:
            self.presence.withdraw()
            raise
        self.presence.keep(self._url, self._trouble)

    def _take(self) -> Generator[float, None, None]:
        while True:
            names = yield from wait_for_end(self.ledger_url)
            self.number = int(names[-1].partition(".")[0]) + 1 if names else 1
            if self.number > MOST_DRIVERS:
                raise InputError(f"{self.ledger_url}/drivers holds {names[-1]}: no run has had so many; delete it")
            written = storage.write_document(self._url, self.presence.document("running"), new=True)
            if written or self.presence.is_owner_of(self._url):
                if driver_names(self.ledger_url)[-1:] == [self._name] and not members(self.ledger_url):
                    break
                storage.remove_file(self._url)  # while we were asleep others came and went: our number was free again
        for name in names:
            storage.remove_file(f"{self.ledger_url}/drivers/{name}")

    def check(self) -> None:
        """Raises RunError if the lease is lost: another driver has taken over, or the output is gone."""
        self.presence.check()

    def release(self, state: str) -> None:
        """Let others take over at once; the state (complete, interrupted, failed) stays for nrrn status to show."""
        if not self.presence.end():
            return
        with suppress(OSError):  # where storage is away, or full, the lease runs out by itself
            if not self.presence.lost and self.presence.is_owner_of(self._url):
                storage.write_document(self._url, self.presence.document(state))

    @property
    def _name(self) -> str:
        return f"{self.number:07}.json"

    @property
    def _url(self) -> str:
        return f"{self.ledger_url}/drivers/{self._name}"

    def _trouble(self) -> str:
        names = driver_names(self.ledger_url)
        if names and names[-1] == self._name:
            return ""
        return "another driver has taken over" if names else "the output was deleted under the run"


def wait_for_end(ledger_url: str) -> Generator[float, None, list[str]]:
    """Returns the drivers' files, as it saw them, once nobody holds the lease, and no process shares the run.

    Files of processes that are gone are deleted. Raises InputError as soon as one gives a sign of life.
    """
    yield from _wait_for_members(ledger_url)
    return (yield from wait_for_driver(ledger_url))


def wait_for_driver(ledger_url: str) -> Generator[float, None, list[str]]:
    """The same, whoever shares the run."""
    started, first = time.monotonic(), None
    while names := driver_names(ledger_url):
        holder = last_driver(ledger_url)
        if holder is not None and has_ended(holder):
            return names
        first = first or (names, holder)
        if holder is not None and (names, holder) != first:
            raise _at_work(holder)
        waited = time.monotonic() - started
        if waited >= presence.LEASE_S:
            return names
        yield waited
        time.sleep(presence.LOOK_S)
    return []


def _wait_for_members(ledger_url: str) -> Generator[float, None, None]:
    watch, started, first = Watch(), time.monotonic(), dict[str, dict[str, Any]]()
    while now := members(ledger_url):
        for owner, document in [*now.items()]:
            if document != first.setdefault(owner, document) and not has_ended(document):
                raise _at_work(document)
            if not watch.is_alive(member_url(ledger_url, owner)):
                storage.remove_file(member_url(ledger_url, owner))
                del now[owner]
        if not now:
            return
        yield time.monotonic() - started
        time.sleep(presence.LOOK_S)


def members(ledger_url: str) -> dict[str, dict[str, Any]]:
    """What each process that shares the run says of itself, by owner; {} of one that cannot be read."""
    found = {}
    for name in storage.list_sizes(f"{ledger_url}/members"):
        try:
            document = storage.read_document(f"{ledger_url}/members/{name}")
        except ValueError:
            document = {}
        if document is not None:  # it has left just now
            found[name.removesuffix(".json")] = document
    return found


def member_url(ledger_url: str, owner: str) -> str:
    """Its sign of life."""
    return f"{ledger_url}/members/{owner}.json"


def _at_work(holder: dict[str, Any]) -> InputError:
    return InputError(
        f"another nrrn denoise is at work on this output: process {holder.get('pid')} on {holder.get('host')}. "
        "Let it finish, or stop it; nrrn status shows how far it is"
    )


def driver_names(ledger_url: str) -> list[str]:
    """Names of the files of drivers, the last one's last; whatever else lies there is none of ours."""
    return sorted(name for name in storage.list_sizes(f"{ledger_url}/drivers") if DRIVER.fullmatch(name))
