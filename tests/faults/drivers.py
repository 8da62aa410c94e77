"""Drivers that are processes of their own, forked from one that has imported all: they start in no time.

What a test asks for is one line of JSON to that process, and one back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Ask = Callable[[dict[str, Any]], Any]


@dataclass
class Driver:
    """One `nrrn denoise`, leader of a process group; dead or alive."""

    pid: int
    log: Path
    ask: Ask
    status: int | None = None  # minus the signal's number, if it was killed

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.ask({"poll": self.pid})
        return self.status

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"no end after {timeout} s: {self.err}"
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it may have ended just before
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()


@dataclass(frozen=True)
class Nursery:
    """Starts drivers, whose output goes to files in a folder."""

    folder: Path
    ask: Ask

    def start(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> Driver:
        log = self.folder / f"{time.monotonic_ns()}"
        request = {"arguments": arguments, "folder": str(folder), "environment": environment or {}, "log": str(log)}
        return Driver(self.ask(request), log, self.ask)


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", "from tests.faults.drivers import serve; serve()"]
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1) as parent:
        assert parent.stdin
        assert parent.stdout
        told, telling = parent.stdout, parent.stdin

        def ask(request: dict[str, Any]) -> Any:
            telling.write(json.dumps(request) + "\n")
            return json.loads(told.readline())

        yield Nursery(folder, ask)


def serve() -> None:
    """What the parent of all drivers does until its standard input ends."""
    import distributed.dashboard.scheduler  # noqa: F401
    import s3fs  # noqa: F401

    from nrrn_pipeline.cli import main
    from nrrn_pipeline.cli.lazy import loaded

    loaded("denoise")

    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        for descriptor, name in enumerate((os.devnull, f"{request['log']}.out", f"{request['log']}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
        sys.argv = ["nrrn", *request["arguments"]]
        main()
