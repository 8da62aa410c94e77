"""Worker jobs of each batch system: what is submitted, and what becomes of jobs that queue, end, or cannot be asked."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pytest

from nrrn_pipeline.cluster import jobqueue, started
from nrrn_pipeline.cluster.jobqueue import Jobs
from nrrn_pipeline.cluster.kinds import parse_settings
from nrrn_pipeline.errors import InputError, RunError

KINDS = ["slurm", "pbs", "lsf", "sge"]
GOLDEN = Path(__file__).parent / "golden"
SAID = {"slurm": "Submitted batch job $n", "pbs": "$n.head.lab", "lsf": "Job <$n> is submitted to queue <gpu>."}
SAID["sge"] = "Your job $n (nrrn) has been submitted"
COMMANDS = {
    "slurm": ("sbatch", "scancel", "squeue"),
    "pbs": ("qsub", "qdel", "qselect"),
    "lsf": ("bsub", "bkill", "bjobs"),
    "sge": ("qsub", "qdel", "qstat"),
}
SUBMIT = """\
exec 9>$system/lock; flock 9
if [ -e $system/refuses ]; then cat $system/refuses >&2; exit 1; fi
n=$(($(ls $system/scripts | wc -l) + 100))
cat "$@" > $system/scripts/$n
touch $system/jobs/$n
echo "{said}"
"""
CANCEL = 'for n in "$@"; do rm $system/jobs/$n; done\n'
LIST = {
    "slurm": "ls $system/jobs",
    "pbs": "for n in $(ls $system/jobs); do echo $n.head.lab; done",
    "lsf": 'if [ -z "$(ls $system/jobs)" ]; then echo "No unfinished job found" >&2; exit 255; fi; ls $system/jobs',
    "sge": "echo 'job-ID  prior   name'; echo -----; for n in $(ls $system/jobs); do echo \" $n 0.5 nrrn 7 qw\"; done",
}
ASKED = {
    "workers": 2,
    "cores": 4,
    "memory": "16GB",
    "walltime": "2:00:00",
    "queue": "gpu",
    "account": "lab",
    "gpus": 1,
    "interface": "lo",
    "python": "/opt/nrrn/bin/python",
    "prologue": ["module load cuda", "source /opt/nrrn/activate"],
    "directives": ["--one-more=1"],
}


@dataclass(frozen=True)
class System:
    """A batch system whose commands are shell scripts; each job is a file, and none ever runs."""

    folder: Path
    kind: str

    def numbers(self) -> list[int]:
        return sorted(int(file.name) for file in (self.folder / "jobs").iterdir())

    def end(self, *numbers: int) -> None:
        for number in numbers:
            (self.folder / "jobs" / str(number)).unlink()

    def begin_again(self, number: int) -> None:
        (self.folder / "jobs" / str(number)).touch()

    def refuse(self, words: str) -> None:
        (self.folder / "refuses").write_text(words)

    def script(self, number: int) -> str:
        return (self.folder / "scripts" / str(number)).read_text()

    def listed(self) -> int:
        """How often it was asked for jobs."""
        return len((self.folder / "asked").read_text().splitlines()) if (self.folder / "asked").exists() else 0

    def command(self, name: str, code: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(f"#!/bin/bash\nsystem={self.folder}\n{code}\n")
        file.chmod(0o755)


@pytest.fixture(params=["slurm"])
def system(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    there = System(tmp_path / "system", request.param)
    for name in ("bin", "jobs", "scripts"):
        (there.folder / name).mkdir(parents=True)
    submit, cancel, listing = COMMANDS[there.kind]
    there.command(submit, SUBMIT.format(said=SAID[there.kind]))
    there.command(cancel, CANCEL)
    there.command(listing, f"echo >> $system/asked; {LIST[there.kind]}")
    monkeypatch.setenv("PATH", f"{there.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(jobqueue, "TEND_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return there


def settings_of(system: System, **changes: Any) -> Any:
    return parse_settings({"kind": system.kind, **ASKED, **changes}, "test")


@contextmanager
def begun(system: System, **changes: Any) -> Iterator[Jobs]:
    """The jobs of a cluster whose workers never come."""
    settings = settings_of(system, **changes)
    with (
        dask.config.set(jobqueue.DASK_CONFIG),
        jobqueue._log_folder(settings) as logs,
        jobqueue._security(settings, logs) as security,
        jobqueue._scheduler(settings, 2, logs, security) as cluster,
    ):
        jobs = Jobs(settings, cluster, logs)
        jobs.submit()
        yield jobs


every_kind = pytest.mark.parametrize("system", KINDS, indirect=True)


@every_kind
def test_the_script_is_what_it_was(system: System, tmp_path: Path) -> None:
    with begun(system):
        script = system.script(100)
    for pattern, instead in (
        (re.escape(str(tmp_path)), "HERE"),
        (r"keys-[0-9a-f]{32}", "keys-RANDOM"),
        (r"127\.0\.0\.1:[1-9]\d+", "127.0.0.1:PORT"),
        (r"nrrn-[12]\b", "nrrn-NUMBER"),
    ):
        script = re.sub(pattern, instead, script)
    assert script == (GOLDEN / f"{system.kind}.sh").read_text()


@every_kind
def test_a_job_that_is_gone_is_replaced_once_and_those_that_queue_are_left_alone(system: System) -> None:
    with begun(system) as jobs:
        for _ in range(5):
            jobs.tend(0)
        assert system.numbers() == [100, 101]
        system.end(101)
        for _ in range(5):
            jobs.tend(0)
        assert system.numbers() == [100, 102]
        system.end(100, 102)
        for _ in range(5):
            jobs.tend(0)
        assert system.numbers() == [103, 104]
        names = [re.search(r"--name (\S+)", system.script(number)) for number in range(100, 105)]
        assert len({name[1] for name in names if name}) == 5
    assert system.numbers() == []


def test_nothing_is_left_of_keys_and_logs(system: System, tmp_path: Path) -> None:
    with begun(system):
        (key,) = tmp_path.glob("**/key.pem")
        assert key.parent.parent == tmp_path / "nrrn-logs"
        assert key.stat().st_mode & 0o777 == 0o600
        assert key.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(file.name for file in tmp_path.iterdir()) == ["system"]


@pytest.mark.parametrize("answer", ["exit 1", "sleep 30", "echo no; kill -9 $$", "exec 1>&-; exit 3"])
def test_a_system_that_does_not_answer_has_lost_no_job(
    system: System, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobqueue, "ANSWER_S", 0.3)
    with begun(system) as jobs:
        system.command("squeue", answer)
        for _ in range(3):
            jobs.tend(0)
        (system.folder / "bin/squeue").unlink()
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(system.folder / "bin"))  # where this machine's own squeue is not
            for _ in range(3):
                jobs.tend(0)
        assert system.numbers() == [100, 101]


def test_a_job_that_is_missing_in_one_listing_alone_is_left_alone(system: System) -> None:
    with begun(system) as jobs:
        for _ in range(3):
            system.end(100)
            jobs.tend(0)
            system.begin_again(100)
            jobs.tend(0)
        assert system.numbers() == [100, 101]


def test_the_system_is_asked_every_few_seconds_at_most(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobqueue, "TEND_S", 60.0)
    with begun(system) as jobs:
        for done in range(50):
            jobs.tend(done)
        assert system.listed() == 1


def test_jobs_that_come_and_go_in_vain_end_the_run(system: System, tmp_path: Path) -> None:
    with begun(system, replacements=5) as jobs:
        message = rf"6 worker jobs of slurm ended and no slab was done meanwhile: .* in {tmp_path}/nrrn-logs\. .*again"
        for _ in range(2):
            system.end(*system.numbers())
            jobs.tend(0)
            jobs.tend(0)
        system.end(*system.numbers())
        jobs.tend(0)
        with pytest.raises(RunError, match=message):
            jobs.tend(0)


def test_jobs_whose_time_is_over_do_not_count_and_a_slab_that_is_done_forgives_the_others(system: System) -> None:
    with begun(system, replacements=2) as jobs:
        for done in range(1, 20):
            jobs.tend(done)  # while these jobs ran
            system.end(*system.numbers())
            jobs.tend(done)
            jobs.tend(done)
        system.end(system.numbers()[0])
        jobs.tend(19)
        jobs.tend(19)
        jobs.tend(20)
        system.end(system.numbers()[1])
        jobs.tend(20)
        jobs.tend(20)
        assert len(system.numbers()) == 2


def test_replacements_that_are_refused_are_asked_for_again(system: System) -> None:
    with begun(system) as jobs:
        system.end(100)
        system.refuse("sbatch: error: not now")
        for _ in range(jobqueue.REFUSALS + 5):
            jobs.tend(0)
        assert system.numbers() == [101]
        (system.folder / "refuses").unlink()
        jobs.tend(0)
        assert system.numbers() == [101, 102]


def test_a_system_that_takes_no_more_jobs_ends_the_run_when_none_is_left(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobqueue, "REFUSALS", 4)
    with begun(system) as jobs:
        system.end(100, 101)
        system.refuse("sbatch: error: your allocation is used up")
        for _ in range(1 + 3):
            jobs.tend(0)
        with pytest.raises(
            RunError, match=r"\(sbatch: error: your allocation is used up\).*run the same command again"
        ):
            jobs.tend(0)


@every_kind
def test_what_the_system_refuses_at_first_is_said_in_its_own_words(system: System, tmp_path: Path) -> None:
    system.refuse("error: no such queue 'gpu'")
    with (
        pytest.raises(InputError, match=rf"^{system.kind} refuses the worker jobs \(error: no such queue 'gpu'\): .*"),
        started(settings_of(system), 2),
    ):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["system"]


def test_what_has_no_number_is_refused_too(system: System) -> None:
    system.command("sbatch", "echo welcome to the cluster")
    with pytest.raises(InputError, match=r"Could not parse job id .* welcome"), started(settings_of(system), 2):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interface": "ib7"}, r"no interface 'ib7': it has .*lo"),
        ({"log_directory": "my logs"}, r"cannot hold the path '/.*/my logs'"),
        ({"log_directory": "system/lock/logs"}, r"log_directory /.*/logs cannot be made \(Not a directory\)"),
        ({"keys": "nowhere"}, r"there are no keys in /.*/nowhere"),
    ],
)
def test_settings_that_this_machine_cannot_carry_out_are_refused(
    system: System, changes: dict[str, Any], message: str
) -> None:
    (system.folder / "lock").touch()
    with pytest.raises(InputError, match=message), started(settings_of(system, **changes), 2):
        pass
    assert not list((system.folder / "scripts").iterdir())


@every_kind
def test_a_missing_command_is_named(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS[system.kind]:
        (system.folder / "bin" / command).rename(system.folder / "away")
        monkeypatch.setenv("PATH", str(system.folder / "bin"))
        with pytest.raises(InputError, match=f"^{command} is not on the PATH"), started(settings_of(system), 2):
            pass
        (system.folder / "away").rename(system.folder / "bin" / command)


def test_without_dask_jobqueue_it_says_what_to_install(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(InputError, match=r"pip install nrrn-pipeline\[jobqueue\]"), started(settings_of(system), 2):
        pass


def test_patience_ends_and_the_jobs_are_cancelled(system: System) -> None:
    begin = time.monotonic()
    with (
        pytest.raises(InputError, match="no worker job began within 1 s: ask squeue"),
        started(settings_of(system, patience=1), 2),
    ):
        pass
    assert time.monotonic() - begin < 20
    assert os.listdir(system.folder / "scripts")
    assert system.numbers() == []
