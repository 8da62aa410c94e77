"""A run as a job array of Slurm: one script, whose tasks share the work without a scheduler of their own.

When a task's time is nearly over nrrn is told to finish what is in flight, and the task goes back into the queue.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nrrn_pipeline.cluster.jobqueue_settings import seconds_of
from nrrn_pipeline.errors import InputError, RunError, readable
from nrrn_pipeline.members import MAX_MEMBERS

MEMORY = re.compile(r"([1-9]\d{0,8})([KMGT]?)", re.ASCII)
WORD = re.compile(r"[\w.,:@+-]+", re.ASCII)
OURS = {"array", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "time"}  # directives
BODY = """\
denoising=$!
requeue=no
signalled=yes

# the time is nearly over: nrrn finishes what is in flight, or it is done again, and the task goes on in a new job
trap '
    requeue=yes signalled=yes
    kill -TERM "$denoising" 2>/dev/null
    {{ sleep {patience} && kill -KILL "$denoising"; }} >/dev/null 2>&1 &
' USR1

# scancel, or the system itself, which requeues if it wants to
trap '
    requeue=no signalled=yes
    kill -TERM "$denoising" 2>/dev/null
' TERM

while [ "$signalled" = yes ]; do # a signal ends the wait before nrrn has ended
    signalled=no
    wait "$denoising"
    status=$?
done

if [ "$requeue" = yes ] && [ "$status" -gt 128 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


@dataclass(frozen=True)
class ArrayJob:
    """What to ask Slurm for.

    tasks: of the array, at_most: how many of them run at a time. walltime ("2:00:00", hours, minutes, seconds), gpus (0
    or 1), cpus and memory ("16G") are of one task; None is the system's own choice. logs: an absolute folder. prologue:
    lines of shell before the run, such as "module load cuda". directives: what else to tell sbatch, such as
    "--constraint=a100". stop_before: seconds before the walltime ends from which a task begins nothing; None: a tenth
    of it, 300 at most.
    """

    tasks: int
    walltime: str
    logs: str
    at_most: int | None = None
    gpus: int = 0
    cpus: int | None = None
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    name: str = "nrrn"
    prologue: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()
    stop_before: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be."""
        _refuse_counts(self)
        _refuse_texts(self)
        if not 10 <= self.stop_s < self.walltime_s:
            raise InputError(
                f"--stop-before {self.stop_s} does not fit into --time {self.walltime}: give 10 s or more, and less "
                "than the time"
            )

    @property
    def walltime_s(self) -> int:
        """Seconds."""
        return seconds_of(self.walltime) or 0

    @property
    def stop_s(self) -> int:
        """Seconds before the end of a task from which it begins nothing."""
        return max(10, min(300, self.walltime_s // 10)) if self.stop_before is None else self.stop_before

    @property
    def memory_bytes(self) -> int | None:
        """Of one task."""
        match = MEMORY.fullmatch(self.memory or "")
        return int(match[1]) * 1024 ** (" KMGT".index(match[2] or "M")) if match else None


def _refuse_counts(job: ArrayJob) -> None:
    possible = {
        "array": (job.tasks, 1, MAX_MEMBERS),
        "at-most": (job.at_most, 1, MAX_MEMBERS),
        "gpus": (job.gpus, 0, 1),  # a task uses one
        "cpus": (job.cpus, 1, 4096),
    }
    for name, (given, least, most) in possible.items():
        if given is not None and not least <= given <= most:
            raise InputError(f"--{name} {given} is not possible: give {least} to {most}")


def _refuse_texts(job: ArrayJob) -> None:
    if job.walltime_s < 60:
        raise InputError(
            f"--time {job.walltime!r} is no time of a minute or more: give hours:minutes:seconds, such as 2:00:00"
        )
    if job.memory is not None and job.memory_bytes is None:
        raise InputError(f"--memory {job.memory!r} is not understood: give such as 16G or 800M")
    for name, word in (("partition", job.partition), ("account", job.account), ("name", job.name)):
        if word is not None and not WORD.fullmatch(word):
            raise InputError(f"--{name} {word!r} is not possible: give one word of letters, digits and .,:@+-")
    for line in (*job.prologue, *job.directives):
        if not line or not line.isprintable():
            raise InputError(f"{line!r} is empty or more than one line: give --prologue and --directive once a line")
    for line in job.directives:
        if not line.startswith("-") or line.split()[0].partition("=")[0].lstrip("-") in OURS:
            raise InputError(f"--directive {line!r} is not possible: give an option of sbatch that the script lacks")
    if not job.logs.isprintable() or set(job.logs) & set("%\\\"'"):
        raise InputError(f"--logs {job.logs!r} is not possible: sbatch cannot take quotes, \\ and % in names of files")


def render(job: ArrayJob, words: Sequence[str]) -> str:
    """The script of an array whose tasks call nrrn with these words, and with their own share."""
    log = f"{job.logs}/{job.name}-%A_%a.out"
    options = {
        "job-name": job.name,
        "array": f"0-{job.tasks - 1}" + (f"%{job.at_most}" if job.at_most else ""),
        "time": job.walltime,
        "gres": "gpu:1" if job.gpus else None,
        "cpus-per-task": job.cpus,
        "mem": job.memory,
        "partition": job.partition,
        "account": job.account,
        "output": f'"{log}"' if " " in log else log,
        "open-mode": "append",  # a task that goes on in a new job writes to the same file
        "signal": f"B:USR1@{job.stop_s}",
    }
    directives = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in (*directives, "--requeue", *job.directives)), ""]
    lines += [*job.prologue, ""] if job.prologue else []
    lines += ["set -u", *([f"export OMP_NUM_THREADS={job.cpus}"] if job.cpus else []), ""]
    called = shlex.join([sys.executable, "-P", "-m", "nrrn_pipeline.cli"])
    arguments = "".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in map(shlex.quote, words))
    share = f'--shard-of "${{SLURM_ARRAY_TASK_ID}}/{job.tasks}"'
    return "\n".join([*lines, f"{called}{arguments} \\\n    {share} &", BODY.format(patience=job.stop_s * 3 // 4)])


def submit(script: str) -> str:
    """The number of the job that Slurm made of a script.

    Raises InputError if there is no Slurm, or it refuses the script.
    """
    try:
        ended = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(
            f"sbatch cannot be run here ({error.strerror}): submit where Slurm is, such as on a login node, or see the "
            "script with --dry-run"
        ) from error
    if ended.returncode:
        said = " ".join(ended.stderr.split()) or f"exit status {ended.returncode}"
        raise InputError(f"sbatch refused the job: {said}")
    job = ended.stdout.strip().partition(";")[0]  # after it the cluster's name
    if not job.isdecimal():
        raise RunError(f"sbatch answered {readable(ended.stdout)!r}, not a job's number: see squeue --me")
    return job
