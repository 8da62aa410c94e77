"""Workers as jobs of a batch system: submitted, replaced when they end, cancelled when the run does.

dask_jobqueue writes the scripts and submits them, but a job that is gone it does not replace, and it does not say when
one was refused; `Jobs` does both.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import count
from typing import Any

import dask
import psutil
from distributed import Client, Security
from distributed.core import Status

from nrrn_pipeline.cluster.base import DASHBOARD_PORT, DASK_CONFIG, Cluster, free_port, process_environment
from nrrn_pipeline.cluster.jobqueue_settings import JobQueueSettings
from nrrn_pipeline.cluster.keys import make_keys, security_from
from nrrn_pipeline.cluster.worker import GRACE_S, STOP_AT, STOP_WITHIN_S
from nrrn_pipeline.errors import GO_ON, InputError, RunError

TEND_S = 5.0  # between two looks at the jobs
ANSWER_S = 10.0  # for a batch system to list them
REFUSALS = 60  # in a row, when no job is left, before a run is given up


@contextmanager
def jobqueue_cluster(settings: JobQueueSettings, slabs_each: int) -> Iterator[Cluster]:
    """A cluster of worker jobs, one of which runs when the block begins; all are cancelled when it ends.

    Each has `slabs_each` slabs in flight. The scheduler is in this process, which has to run where jobs are submitted,
    for as long as the run takes; it speaks TLS alone.

    Raises InputError if the batch system is not there or refuses the jobs, or none began while `patience` lasted;
    RunError if one job after the other ends without having done anything.
    """
    _refuse_what_is_missing(settings)
    with (
        # Dask would cancel and forget the job of a worker that is away for 15 s
        dask.config.set({**DASK_CONFIG, "distributed.deploy.lost-worker-timeout": "365 days"}),
        _log_folder(settings) as logs,
        _security(settings, logs) as security,
        _scheduler(settings, slabs_each, logs, security) as cluster,
    ):
        jobs = Jobs(settings, cluster, logs)
        jobs.submit()
        jobs.wait_for_worker()
        of_queue = f" of {settings.QUEUE} {settings.queue}" if settings.queue else ""
        noun = "job" if settings.workers == 1 else "jobs"
        dashboard = f"http://127.0.0.1:{cluster.scheduler_info['services']['dashboard']}/status"
        where = f"{settings.kind}, {settings.workers} {noun}{of_queue}, dashboard {dashboard}"
        with Client(cluster) as client:
            yield Cluster(client, where, jobs.tend, settings.patience)


def _refuse_what_is_missing(settings: JobQueueSettings) -> None:
    for command in settings.COMMANDS:
        if shutil.which(command) is None:
            raise InputError(
                f"{command} is not on the PATH, and clusters of kind {settings.kind} need it: run this where jobs are "
                "submitted, such as a login node"
            )
    if settings.interface is not None and settings.interface not in (known := psutil.net_if_addrs()):
        raise InputError(f"this machine has no interface {settings.interface!r}: it has {', '.join(known)}")


@contextmanager
def _log_folder(settings: JobQueueSettings) -> Iterator[str]:
    """Its absolute path; a new one that nothing was written to is deleted again."""
    folder = os.path.abspath(settings.log_directory)
    for path in (folder, *_shared(settings)):
        if len(path.split()) != 1 or not path.isprintable():
            raise InputError(f"job scripts cannot hold the path {path!r}: use a folder without spaces")
    there = os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"log_directory {folder} cannot be made ({error.strerror}): choose another") from error
    try:
        yield folder
    finally:
        if not there:
            with suppress(OSError):
                os.rmdir(folder)


def _shared(settings: JobQueueSettings) -> list[str]:
    """Paths that jobs read keys from, apart from the folder of logs."""
    return [os.path.abspath(path) for path in (settings.keys, settings.shared_directory) if path is not None]


@contextmanager
def _security(settings: JobQueueSettings, logs: str) -> Iterator[Security]:
    """The keys that were given, or new ones, which end with the block."""
    if settings.keys is not None:
        yield security_from(settings.keys)
        return
    shared = logs if settings.shared_directory is None else os.path.abspath(settings.shared_directory)
    folder = os.path.join(shared, f".nrrn-keys-{uuid.uuid4().hex}")
    try:
        yield security_from(make_keys(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _scheduler(settings: JobQueueSettings, slabs_each: int, logs: str, security: Security) -> Iterator[Any]:
    """dask_jobqueue's cluster, without any job yet. Whatever is set here counts more than the user's jobqueue.yaml."""
    try:
        cluster_class = getattr(import_module("dask_jobqueue"), settings.CLUSTER)
    except ImportError as error:
        raise InputError(
            f"clusters of kind {settings.kind} need dask-jobqueue: pip install nrrn-pipeline[jobqueue]"
        ) from error
    try:
        cluster = cluster_class(
            job_cls=_job_class(settings, cluster_class.job_cls),
            cores=slabs_each,  # threads of the worker; a job's own size is in `asked`
            memory="0B",  # of the worker, no limit: nothing can be spilled, and no monitor wakes who leaves
            processes=1,
            nanny=False,
            job_name="nrrn",
            # the worker takes the shell's place: the system's signals reach it, and the job ends with it
            python=f"exec {settings.python or sys.executable}",
            worker_command="distributed.cli.dask_worker",
            worker_extra_args=_worker_words(settings),
            job_script_prologue=[*_environment(settings), *settings.prologue],
            log_directory=logs,
            shebang="#!/usr/bin/env bash",
            death_timeout=60,
            interface=settings.interface,
            protocol="tls://",
            security=security,
            scheduler_options={"dashboard_address": f"127.0.0.1:{free_port(DASHBOARD_PORT)}"},
            silence_logs=logging.CRITICAL,  # what goes wrong reaches the driver as a task's error, and is said once
            **settings.asked(),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the {settings.kind} cluster cannot start ({error}): check its settings") from error
    with cluster:
        yield cluster


def _job_class(settings: JobQueueSettings, known: type) -> type:
    """dask_jobqueue's own, but for LSF, whose errors it would throw away."""

    async def submit(job: Any, script: str) -> Any:
        return await job._call([f"{job.submit_command} < {shlex.quote(script)}"], shell=True)

    return type("LSFJob", (known,), {"_submit_job": submit}) if settings.kind == "lsf" else known


def _worker_words(settings: JobQueueSettings) -> list[str]:
    gpu = ["--resources", "GPU=1"] if settings.gpus else []
    # without an address of its own a worker's HTTP server would listen everywhere, without TLS
    return ["--dashboard-address", "127.0.0.1:0", "--preload", "nrrn_pipeline.cluster.worker", *gpu]


def _environment(settings: JobQueueSettings) -> list[str]:
    """Lines of shell: when the worker has to leave, and what its libraries read when they start."""
    names = {
        GRACE_S: str(settings.grace),
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "false",
        **process_environment(settings.cores),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in names.items()]
    if settings.stop_s:
        stop_after_s = settings.walltime_s - settings.stop_s
        within_s = settings.stop_s * 9 // 10  # what is not done then is given to others while there is time
        lines += [f"export {STOP_AT}=$(($(date +%s) + {stop_after_s}))", f"export {STOP_WITHIN_S}={within_s}"]
    return lines


class Jobs:
    """The worker jobs of one run, of which as many are kept as were asked for, whatever ends them."""

    def __init__(self, settings: JobQueueSettings, cluster: Any, logs: str) -> None:
        self._settings, self._cluster, self._logs = settings, cluster, logs
        self._numbers = count(1)
        self._missing: set[str] = set()
        self._next_look = 0.0
        self._done = self._advances = 0  # the number of slabs that are done, and how often it was another
        self._submitted: dict[str, int] = {}  # how often it had been when a job was submitted
        self._in_vain = self._refusals = 0

    def submit(self) -> None:
        """As many jobs as are lacking. Raises InputError with the system's own words if it refuses one."""
        before = set(self._cluster.workers)
        try:
            self._cluster.sync(self._open)
        except (OSError, RuntimeError, ValueError) as error:
            self._cluster.sync(self._drop, [name for name, job in self._cluster.workers.items() if job.job_id is None])
            said = " ".join((str(error).rpartition("stderr:\n")[2].strip() or str(error)).split())
            raise InputError(
                f"{self._settings.kind} refuses the worker jobs ({said}): correct queue, account, size or time"
            ) from error
        finally:
            self._submitted |= dict.fromkeys(set(self._cluster.workers) - before, self._advances)

    def wait_for_worker(self) -> None:
        """Until there is one. Raises InputError if the patience ends first, RunError if job after job ends."""
        deadline = time.monotonic() + self._settings.patience
        while not self._cluster.scheduler.workers:
            if time.monotonic() > deadline:
                raise InputError(
                    f"no worker job began within {self._settings.patience:.0f} s: ask {self._settings.COMMANDS[-1]} "
                    "why they wait; ask for less, or raise patience"
                )
            self.tend(0)
            time.sleep(0.1)

    def tend(self, done: int) -> None:
        """Replace the jobs that are gone, at most every few seconds; `done`: slabs done so far.

        Raises RunError if one job after the other came and went without a slab done meanwhile, or no job is left and
        the system takes no more.
        """
        if done != self._done:
            self._done, self._advances, self._in_vain = done, self._advances + 1, 0
        if time.monotonic() < self._next_look:
            return
        self._forget_ended()
        if len(self._cluster.worker_spec) < self._settings.workers:
            self._submit_again()
        self._next_look = time.monotonic() + TEND_S

    def _forget_ended(self) -> None:
        # one whose worker is here runs, and if all are here there is no need to ask
        here = {str(worker.name) for worker in list(self._cluster.scheduler.workers.values())}
        unseen = {name: job.job_id for name, job in self._cluster.workers.items() if name not in here}
        listed = self._listed() if unseen else set()
        if listed is None:
            return
        missing = {name for name, number in unseen.items() if number not in listed}
        # twice, as some systems answer from a copy of their tables that is seconds old
        gone, self._missing = missing & self._missing, missing - self._missing
        self._cluster.sync(self._drop, sorted(gone))
        self._in_vain += sum(self._submitted.pop(name) == self._advances for name in gone)
        if self._in_vain >= self._settings.replacements:
            raise RunError(
                f"{self._in_vain} worker jobs of {self._settings.kind} ended and no slab was done meanwhile: what they "
                f"printed is in {self._logs}. Mend this; {GO_ON}"
            )

    def _submit_again(self) -> None:
        try:
            self.submit()
        except InputError as error:
            self._refusals += 1
            if self._refusals >= REFUSALS and not self._cluster.workers:
                raise RunError(f"{error}; {GO_ON}") from error
        else:
            self._refusals = 0

    def _listed(self) -> set[str] | None:
        """Numbers of the user's jobs that are queued or run; None if the system does not say, and so nobody knows."""
        try:
            answer = subprocess.run(
                self._settings.listing(), capture_output=True, text=True, errors="replace", timeout=ANSWER_S
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        nothing = "No unfinished job found" in answer.stderr  # LSF's way to list none, an error in some versions
        if answer.returncode != 0 and not nothing:
            return None
        return set(re.findall(r"^\s*(\d+)", answer.stdout, re.MULTILINE))

    async def _open(self) -> None:
        while len(self._cluster.worker_spec) < self._settings.workers:
            # never a name twice: the scheduler refuses one that it has not seen go
            self._cluster.worker_spec[f"nrrn-{next(self._numbers)}"] = self._cluster.new_spec
        await self._cluster

    async def _drop(self, names: list[str]) -> None:
        for name in names:
            self._cluster.worker_spec.pop(name, None)
            self._cluster.workers.pop(name).status = Status.closed  # or Dask's close() would miss its end
