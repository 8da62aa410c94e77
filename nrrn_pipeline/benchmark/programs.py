"""Programs that denoise, run as a user would run them: their time from start to end, and the memory of all processes.

A program is any command. It is given three words more: the source (a Zarr array), the output to write (a Zarr array, or
an OME-Zarr group) and the weights.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from nrrn_pipeline.errors import InputError

OURS = "nrrn"
LOOK_S = 0.2  # how often memory is looked at
TOLD = 2000  # characters of what a program says that are looked at


@dataclass(frozen=True)
class Program:
    """A command by its name."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds, the most memory that its processes together held, and why it failed, if it did."""

    seconds: float
    peak_bytes: int
    failure: str = ""


def parse_program(text: str) -> Program:
    """NAME=COMMAND, as a shell would split it. Raises InputError for any other text."""
    name, equals, command = text.partition("=")
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise InputError(f"--against {text!r} is not understood: {error}") from None
    if not equals or not words or not name.replace("-", "").replace("_", "").isalnum() or name == OURS:
        raise InputError(
            f"--against {text!r} is not understood: expected NAME=COMMAND such as 'lab=python lab.py', the name of "
            f"letters and digits, not {OURS}"
        )
    if shutil.which(words[0]) is None:
        raise InputError(f"{name}: there is no command {words[0]} here: name one, or its path")
    return Program(name, words)


def parse_programs(texts: Sequence[str]) -> list[Program]:
    """Several of them. Raises InputError if two have one name."""
    programs = [parse_program(text) for text in texts]
    names = [program.name for program in programs]
    if len({*names}) < len(names):
        raise InputError(f"programs need names of their own, not {', '.join(names)}")
    return programs


def ours(device: str) -> Program:
    """Nrrn denoise."""
    return Program(OURS, (sys.executable, "-m", "nrrn_pipeline.cli", "denoise", "--device", device, "--overwrite"))


def run(program: Program, source: str, output: str, weights: str) -> Run:
    """Run it to its end."""
    words = [*program.command, source, output, *(("--weights",) if program.name == OURS else ()), weights]
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        peak = _watch(process)
        seconds = time.perf_counter() - started
        said.seek(max(0, said.seek(0, 2) - TOLD))
        lines = said.read().decode(errors="replace").strip().splitlines()
    failure = "" if process.returncode == 0 else f"exit status {process.returncode}: {lines[-1] if lines else ''}"
    return Run(seconds, peak, failure)


def best_of(runs: Sequence[Run]) -> Run:
    """The time of the fastest, with the most memory of any; or the last, if that failed."""
    if runs[-1].failure:
        return runs[-1]
    return Run(min(each.seconds for each in runs), max(each.peak_bytes for each in runs))


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for its end; the most bytes that it and its children held together. Interrupted, all of them are ended."""
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            for each in _family(process.pid):
                each.kill()
            process.wait()
    return peak


def _family(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold; what several share, such as libraries, once (on Linux)."""
    total = 0
    for process in _family(pid):
        rollup = Path(f"/proc/{process.pid}/smaps_rollup")
        try:
            lines = rollup.read_text().splitlines() if rollup.exists() else []
            shares = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
            total += sum(shares) if lines else process.memory_info().rss
        except (OSError, psutil.Error):  # it has just ended
            continue
    return total
