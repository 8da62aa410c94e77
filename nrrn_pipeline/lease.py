"""One driver at a time: who is at work on an output, told by small files that only their owner writes.

    DST/0/nrrn/drivers/0000012.json     the highest number is the driver at work, or the last that was

A driver takes the next number, which storage grants to one alone (conditional write), and renews its file every
RENEW_S. Another takes over when the file has not changed for LEASE_S by its own watch: no two clocks are compared, so
one that is set wrong does no harm. Where both run on one machine it need not wait: it sees that the process is gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import GO_ON, InputError, RunError
from nrrn_pipeline.retrying import reason_of

RENEW_S = 10.0
LEASE_S = 60.0
LOOK_S = 1.0  # how often a driver that waits looks

_held: set[str] = set()  # owners in this process, which may be alive and hold none any more


def last_driver(ledger_url: str) -> dict[str, Any] | None:
    """What the driver at work, or the last one, says of itself; None if there was none or it cannot be read."""
    names = _names(ledger_url)
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
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    lost: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def take(self) -> Generator[float, None, None]:
        """Take the lease, yielding the seconds waited so far while another's has to run out.

        Raises InputError if another driver is at work.
        """
        _held.add(self.owner)  # before others can see the file
        try:
            yield from self._take()
        except BaseException:
            _held.discard(self.owner)
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> Generator[float, None, None]:
        while True:
            names = yield from wait_for_end(self.ledger_url)
            self.number = int(names[-1].partition(".")[0]) + 1 if names else 1
            if storage.write_document(self._url, self._document("running"), new=True) or self._is_ours():
                if _names(self.ledger_url)[-1:] == [f"{self.number:07}.json"]:
                    break
                storage.remove_file(self._url)  # while we were asleep others came and went: our number was free again
        for name in names:
            storage.remove_file(f"{self.ledger_url}/drivers/{name}")

    def check(self) -> None:
        """Raises RunError if the lease is lost: another driver has taken over, or the output is gone."""
        if self.lost:
            raise RunError(f"{self.lost}; {GO_ON}")

    def release(self, state: str) -> None:
        """Let others take over at once; the state (complete, interrupted, failed) stays for nrrn status to show."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=5)
        _held.discard(self.owner)
        with suppress(OSError):  # where storage is away, or full, the lease runs out by itself
            if not self.lost and self._is_ours():
                storage.write_document(self._url, self._document(state))

    @property
    def _url(self) -> str:
        return f"{self.ledger_url}/drivers/{self.number:07}.json"

    def _document(self, state: str) -> dict[str, Any]:
        return {"owner": self.owner, "state": state, "renewed": time.time(), **_this_process(), **self.facts}

    def _is_ours(self) -> bool:
        try:
            return (storage.read_document(self._url) or {}).get("owner") == self.owner
        except ValueError:
            return False

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                names = _names(self.ledger_url)
                if not names or names[-1] != f"{self.number:07}.json":
                    self.lost = "another driver has taken over" if names else "the output was deleted under the run"
                    return
                if not self._stop.is_set():
                    storage.write_document(self._url, self._document("running"))
            except Exception as error:  # storage is away: the slabs will say so; the next renewal may succeed
                self.facts["renewal"] = reason_of(error)


def wait_for_end(ledger_url: str) -> Generator[float, None, list[str]]:
    """Returns the drivers' files, as it saw them, once nobody holds the lease.

    Raises InputError as soon as its holder gives a sign of life.
    """
    started, first = time.monotonic(), None
    while names := _names(ledger_url):
        holder = last_driver(ledger_url)
        if holder is not None and (holder.get("state") != "running" or process_is_gone(holder)):
            return names
        first = first or (names, holder)
        if holder is not None and (names, holder) != first:
            raise InputError(
                f"another nrrn denoise is at work on this output: process {holder.get('pid')} on {holder.get('host')}. "
                "Let it finish, or stop it; nrrn status shows how far it is"
            )
        waited = time.monotonic() - started
        if waited >= LEASE_S:
            return names
        yield waited
        time.sleep(LOOK_S)
    return []


def _names(ledger_url: str) -> list[str]:
    return sorted(
        name for name in storage.list_sizes(f"{ledger_url}/drivers") if name.removesuffix(".json").isdecimal()
    )


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, and whether another one could see it end."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _start_of(os.getpid()),
        "machine": _machine(),
    }


def _machine() -> str:
    """The machine's boot and the container's process numbers: processes that share both see each other end."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.exists() and namespace.is_symlink() else ""


def _start_of(pid: int) -> int | None:
    """When a process began, in ticks since the machine's boot, whatever its clock says; None if there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None  # gone, or hidden from us
    return None if after_name[0] == "Z" else int(after_name[19])


def process_is_gone(document: dict[str, Any]) -> bool:
    """Whether its process has surely ended: it ran here, and is not among this machine's."""
    machine, pid = _machine(), document.get("pid")
    if not machine or document.get("machine") != machine or type(pid) is not int:
        return False
    if pid == os.getpid() and document.get("owner") not in _held:
        return True
    if (began := _start_of(pid)) is not None:
        return began != document.get("began")
    try:
        os.kill(pid, 0)  # where other users' processes are hidden they still answer
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return Path(f"/proc/{pid}").exists()  # a zombie
