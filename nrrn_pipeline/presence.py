"""Signs of life: a small file that a process renews while it is at work, and how others tell that it is gone.

They judge by their own watch alone: a file that has not changed for LEASE_S is a dead process's. No two clocks are
compared, so one that is set wrong does no harm. On one machine nobody need wait: the process is seen to be gone.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.errors import GO_ON, RunError
from nrrn_pipeline.retrying import reason_of

RENEW_S = 10.0
LEASE_S = 60.0
LOOK_S = 1.0  # how often one who waits looks

_held: set[str] = set()  # owners in this process, which may be alive and hold none any more


@dataclass
class Presence:
    """This process's sign of life, under the name `owner`. `facts` go out with each renewal: how the run goes."""

    facts: dict[str, Any] = field(default_factory=dict)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    lost: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def announce(self) -> None:
        """To be called before others can see the file."""
        _held.add(self.owner)

    def withdraw(self) -> None:
        """There is no file any more, or it says that this process has ended."""
        _held.discard(self.owner)

    def document(self, state: str) -> dict[str, Any]:
        """What the file holds."""
        return {"owner": self.owner, "state": state, "renewed": time.time(), **_this_process(), **self.facts}

    def keep(self, url: str, trouble: Callable[[], str]) -> None:
        """Renew the file in a thread, until `end`, or until `trouble` tells why this process should stop its work."""
        self._thread = threading.Thread(target=self._renew, args=(url, trouble), name="sign of life", daemon=True)
        self._thread.start()

    def end(self) -> bool:
        """Renew no more; whether it was ever kept."""
        self._stop.set()
        if self._thread is None:
            return False
        self._thread.join(timeout=5)
        self.withdraw()
        return True

    def check(self) -> None:
        """Raises RunError if this process should stop its work: another has taken over, or the output is gone."""
        if self.lost:
            raise RunError(f"{self.lost}; {GO_ON}")

    def is_owner_of(self, url: str) -> bool:
        """Whether a file is this one's."""
        try:
            return (storage.read_document(url) or {}).get("owner") == self.owner
        except ValueError:
            return False

    def _renew(self, url: str, trouble: Callable[[], str]) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if lost := trouble():
                    self.lost = lost
                    return
                if not self._stop.is_set():
                    storage.write_document(url, self.document("running"))
            except Exception as error:  # storage is away: the slabs will say so; the next renewal may succeed
                self.facts["renewal"] = reason_of(error)


@dataclass
class Watch:
    """Looks at others' files, again and again, and tells who is alive."""

    _seen: dict[str, tuple[Any, float]] = field(default_factory=dict)  # a file's content, and since when it is so

    def is_alive(self, url: str) -> bool:
        """Whether the process of a file may be alive: it says so, it is not seen to be gone, and it was renewed."""
        try:
            document = storage.read_document(url)
        except ValueError:
            document = {}
        if document is None or (document and has_ended(document)):
            return False
        content, since = self._seen.get(url, (None, 0.0))
        if content != document:
            since = time.monotonic()
            self._seen[url] = document, since
        return time.monotonic() - since < LEASE_S


def has_ended(document: dict[str, Any]) -> bool:
    """Whether it says so itself, or its process is seen to be gone."""
    return document.get("state") != "running" or process_is_gone(document)


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
