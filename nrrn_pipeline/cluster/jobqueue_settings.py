"""What to ask of a batch system: a worker job's size, time and queue, as Slurm, PBS, LSF and Grid Engine say it."""

from __future__ import annotations

import getpass
import math
import re
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from dask.utils import parse_bytes
from pydantic import AfterValidator, Field, model_validator

from nrrn_pipeline.cluster.base import ClusterSettings

DURATION = re.compile(r"(?:(\d{1,4})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", re.ASCII)
AMOUNT = re.compile(r"\d{1,9}(?:\.\d{1,3})? ?[kMGT]i?B", re.ASCII)
A_DAY_S = 86400


def _memory(text: str) -> str:
    if not AMOUNT.fullmatch(text) or not parse_bytes(text):
        raise ValueError(f"{text!r} is no amount of memory: give such as 16GB or 16GiB")
    return text


def _walltime(text: str) -> str:
    if (seconds := seconds_of(text)) is None or seconds < 60:
        raise ValueError(f"{text!r} is no time of a minute or more: give hours:minutes:seconds, such as 2:00:00")
    return text


def seconds_of(text: str) -> int | None:
    """Of a time such as 2:00:00 or 1-00:00:00; None for any other text."""
    match = DURATION.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _line(text: str) -> str:
    # else it would end its line of the script, and begin another
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is empty or more than one line: give one line")
    return text


def _word(text: str) -> str:
    if not text.isprintable() or len(text.split()) != 1:
        raise ValueError(f"{text!r} is not one word: job scripts cannot hold it")
    return text


Line = Annotated[str, AfterValidator(_line)]
Seconds = Annotated[int, Field(ge=0)]
Word = Annotated[str, AfterValidator(_word)]


class JobQueueSettings(ClusterSettings):
    """Workers as jobs of a batch system, each one process.

    workers: jobs to keep queued or running. cores, memory ("16GB"), gpus (0 or 1) and walltime ("2:00:00", hours,
    minutes, seconds; "1-00:00:00" is a day) are of one job. queue (Slurm: partition) and account: None is the system's
    own choice. interface: the network between machines, such as "ib0"; None: that of the machine's name; "lo" keeps all
    on this machine.

    keys: a folder that `nrrn cluster keys` made, on a disk that all machines share; None makes keys for this run in
    shared_directory (None: log_directory) and deletes them at its end. log_directory: where jobs write what they print.
    python: on the machines of the jobs; None is this one. prologue: lines of shell before the worker starts, such as
    "module load cuda". directives: what else to tell the system, a line each, such as "--constraint=a100".

    stop_before: seconds before the walltime ends from which a worker takes no more slabs, so that none is lost; None: a
    tenth of it, 300 at most; 0: none. grace: seconds to finish what is held after SIGTERM, fewer than the system leaves
    until SIGKILL (Slurm: KillWait, 30 by default). replacements: jobs that may come and go without a slab done
    meanwhile before the run is given up. patience: seconds that a run may be without any worker, as when all queue.
    """

    workers: Annotated[int, Field(ge=1)]
    cores: Annotated[int, Field(ge=1)]
    memory: Annotated[str, AfterValidator(_memory)]
    gpus: Annotated[int, Field(ge=0)] = 0
    walltime: Annotated[str, AfterValidator(_walltime)]
    queue: Word | None = None
    account: Word | None = None
    keys: str | None = None
    shared_directory: str | None = None
    interface: Word | None = None
    log_directory: str = "nrrn-logs"
    python: Word | None = None
    prologue: tuple[str, ...] = ()
    directives: tuple[Line, ...] = ()
    stop_before: Seconds | None = None
    grace: Seconds = 20
    replacements: Annotated[int, Field(ge=1)] = 10
    patience: Annotated[float, Field(gt=0)] = A_DAY_S

    kind: str  # which one, each kind says
    CLUSTER: ClassVar[str]  # its class in dask_jobqueue
    COMMANDS: ClassVar[tuple[str, ...]]  # to submit, to cancel, to list
    QUEUE: ClassVar[str] = "queue"

    @model_validator(mode="after")
    def _possible(self) -> JobQueueSettings:
        if self.gpus > 1:
            raise ValueError(f"gpus {self.gpus}: a worker uses one; ask for one, and for more workers")
        if self.stop_s >= self.walltime_s:
            raise ValueError(f"stop_before {self.stop_before} leaves nothing of the walltime {self.walltime}")
        return self

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """What dask_jobqueue's class is told of a job's size and time, and the directives that it has no word for."""

    def listing(self) -> tuple[str, ...]:
        """The command that prints one line for each of the user's jobs that is queued or runs, its number first."""
        return self.COMMANDS[-1:]

    @property
    def memory_bytes(self) -> int:
        """What a worker may take."""
        return int(parse_bytes(self.memory))

    @property
    def walltime_s(self) -> int:
        """Seconds."""
        return seconds_of(self.walltime) or 0

    @property
    def stop_s(self) -> int:
        """Seconds before the end of a job from which its worker takes no more slabs."""
        return min(300, self.walltime_s // 10) if self.stop_before is None else self.stop_before

    @property
    def _mebibytes(self) -> int:
        return math.ceil(parse_bytes(self.memory) / 2**20)

    @property
    def _clock(self) -> str:
        """The walltime as all systems but LSF read it, without days."""
        minutes, seconds = divmod(self.walltime_s, 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class SlurmSettings(JobQueueSettings):
    """Jobs of Slurm."""

    kind: Literal["slurm"] = "slurm"
    CLUSTER = "SLURMCluster"
    COMMANDS = ("sbatch", "scancel", "squeue")
    QUEUE = "partition"

    def asked(self) -> dict[str, Any]:
        """As above. A job that Slurm started again by itself would meet its own name: we replace it instead."""
        return {
            "job_cpu": self.cores,
            "job_mem": f"{self._mebibytes}M",
            "walltime": self._clock,
            "queue": self.queue,
            "account": self.account,
            "job_extra_directives": ["--no-requeue", *(["--gres=gpu:1"] if self.gpus else []), *self.directives],
        }

    def listing(self) -> tuple[str, ...]:
        """As above."""
        return ("squeue", "--me", "--noheader", "--format=%A")


class PbsSettings(JobQueueSettings):
    """Jobs of PBS Professional, OpenPBS and others with `select`."""

    kind: Literal["pbs"] = "pbs"
    grace: Seconds = 8  # PBS leaves 10 unless its kill_delay says otherwise
    CLUSTER = "PBSCluster"
    COMMANDS = ("qsub", "qdel", "qselect")

    def asked(self) -> dict[str, Any]:
        """As above."""
        gpu = ":ngpus=1" if self.gpus else ""
        return {
            "resource_spec": f"select=1:ncpus={self.cores}:mem={self._mebibytes}mb{gpu}",
            "walltime": self._clock,
            "queue": self.queue,
            "account": self.account,
            "job_extra_directives": ["-S /bin/bash", "-r n", *self.directives],
        }

    def listing(self) -> tuple[str, ...]:
        """As above. Without states Torque would list jobs that ended minutes ago."""
        return ("qselect", "-u", getpass.getuser(), "-s", "EHQRSTW")


class LsfSettings(JobQueueSettings):
    """Jobs of LSF; `account` is its project."""

    kind: Literal["lsf"] = "lsf"
    grace: Seconds = 8  # LSF leaves 10 unless its JOB_TERMINATE_INTERVAL says otherwise
    CLUSTER = "LSFCluster"
    COMMANDS = ("bsub", "bkill", "bjobs")

    def asked(self) -> dict[str, Any]:
        """As above."""
        hours, minutes = divmod(self.walltime_s // 60, 60)
        return {
            "ncpus": self.cores,
            "mem": parse_bytes(self.memory),
            "walltime": f"{hours}:{minutes:02}",
            "queue": self.queue,
            "project": self.account,
            "use_stdin": True,  # bsub reads no directives from a file that is named to it
            "job_extra_directives": [*(['-gpu "num=1"'] if self.gpus else []), *self.directives],
        }

    def listing(self) -> tuple[str, ...]:
        """As above."""
        return ("bjobs", "-noheader", "-o", "jobid")


class SgeSettings(JobQueueSettings):
    """Jobs of Grid Engine; `account` is its project.

    Its resources are named by each site: parallel_environment gives several cores of one machine, memory_resource is
    asked for per core, gpu_resource per job.
    """

    kind: Literal["sge"] = "sge"
    parallel_environment: Word = "smp"
    memory_resource: Word = "mem_free"
    gpu_resource: Word = "gpu"
    CLUSTER = "SGECluster"
    COMMANDS = ("qsub", "qdel", "qstat")

    def asked(self) -> dict[str, Any]:
        """As above. Without -notify the system kills with no word before."""
        gpu = f",{self.gpu_resource}=1" if self.gpus else ""
        own = ["-S /bin/bash", "-r n", "-notify", f"-pe {self.parallel_environment} {self.cores}"]
        return {
            "resource_spec": f"{self.memory_resource}={math.ceil(self._mebibytes / self.cores)}M{gpu}",
            "walltime": self._clock,
            "queue": self.queue,
            "project": self.account,
            "job_extra_directives": [*own, *self.directives],
        }

    def listing(self) -> tuple[str, ...]:
        """As above, after a header."""
        return ("qstat", "-u", getpass.getuser())
