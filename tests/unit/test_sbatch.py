"""The script of a job array: what it asks for, that its words arrive as they are, and what it makes of signals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline.cluster import sbatch
from nrrn_pipeline.cluster.sbatch import ArrayJob, render
from nrrn_pipeline.errors import InputError, RunError

GOLDEN = Path(__file__).parent / "golden/array.sbatch"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
WORDS = ["denoise", "/lab/raw.zarr", "s3://lab/clean.zarr", "--weights", "/lab/w.safetensors"]
SOON_S = 30.0
# what stands for python: notes its words and its environment, then does as it is told
FAKE = """\
import json, os, pathlib, signal, sys, time

folder = pathlib.Path({folder!r})
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.sleep({ends_after})))
(folder / "called.json").write_text(json.dumps([sys.argv[1:], os.environ.get("OMP_NUM_THREADS")]))
deadline = time.monotonic() + {works}
while not told and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(143 if told else {status})
"""


def job(**changes: Any) -> ArrayJob:
    return ArrayJob(**{"tasks": 64, "walltime": "2:00:00", "logs": "/lab/logs", **changes})


@dataclass(frozen=True)
class Task:
    """A script under bash, as Slurm would run it for task 3 of job 70, with something else in python's place."""

    folder: Path
    process: subprocess.Popen[str]

    def wait_for_call(self) -> tuple[list[str], str | None]:
        called, deadline = self.folder / "called.json", time.monotonic() + SOON_S
        while not (called.exists() and called.read_text()):
            assert time.monotonic() < deadline
            assert self.process.poll() is None or called.exists()
            time.sleep(0.01)
        words, threads = json.loads(called.read_text())
        return words, threads

    def send(self, number: int) -> None:
        """Once bash waits: before that it has no traps yet."""
        self.wait_for_call()
        until_bash_waits(self.process.pid)
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Its exit status, and what Slurm was asked for."""
        self.process.wait(SOON_S)
        asked = self.folder / "scontrol.txt"
        return self.process.returncode, asked.read_text().strip() if asked.exists() else ""


def until_bash_waits(pid: int) -> None:
    deadline = time.monotonic() + SOON_S
    mask = 1 << (signal.SIGTERM - 1)
    while not int(status_of(pid, "SigCgt"), 16) & mask:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(pid: int, name: str) -> str:
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return lines[name]


def executable(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines))
    path.chmod(0o755)


def started(
    folder: Path, script: str, works: float = 0.0, status: int = 0, ends_after: float = 0.0, **environment: str
) -> Task:
    (folder / "fake.py").write_text(FAKE.format(folder=str(folder), works=works, status=status, ends_after=ends_after))
    executable(folder / "python", "#!/bin/bash", f'exec {shlex.quote(sys.executable)} {folder / "fake.py"} "$@"')
    executable(folder / "scontrol", "#!/bin/bash", f'echo "$@" >> {folder / "scontrol.txt"}')
    (folder / "script").write_text(script.replace(f"{shlex.quote(sys.executable)} -P", f"{folder / 'python'} -P"))
    variables = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "PATH": f"{folder}:{os.environ['PATH']}"}
    environment = {**os.environ, **variables, **environment}
    return Task(folder, subprocess.Popen(["/bin/bash", str(folder / "script")], env=environment, text=True))


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/lab/venv/bin/python")
    whole = job(
        at_most=16,
        gpus=1,
        cpus=4,
        memory="16G",
        partition="gpu",
        account="em",
        name="fly",
        prologue=("module load cuda",),
        directives=("--constraint=h100",),
    )
    assert render(whole, [*WORDS, "--slab", "64,512,512", "--no-prefetch"]) == GOLDEN.read_text()


def test_what_is_not_given_is_not_asked_for() -> None:
    assert directives(render(job(tasks=3), WORDS)) == [
        "--job-name=nrrn",
        "--array=0-2",
        "--time=2:00:00",
        "--output=/lab/logs/nrrn-%A_%a.out",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--requeue",
    ]
    assert "OMP_NUM_THREADS" not in render(job(), WORDS)


@pytest.mark.parametrize(
    ("walltime", "stop_before", "stop_s"),
    [
        ("2:00:00", None, 300),
        ("0:10:00", None, 60),
        ("0:01:00", None, 10),
        ("1-00:00:00", None, 300),
        ("0:01:00", 59, 59),
    ],
)
def test_a_task_is_told_in_time(walltime: str, stop_before: int | None, stop_s: int) -> None:
    script = render(job(walltime=walltime, stop_before=stop_before), WORDS)
    assert f"#SBATCH --signal=B:USR1@{stop_s}\n" in script
    assert f"sleep {stop_s * 3 // 4} &&" in script  # before Slurm would end all


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": 0}, "--array 0 is not possible: give 1 to 100000"),
        ({"tasks": 100_001}, "--array 100001 is not possible"),
        ({"at_most": 0}, "--at-most 0 is not possible"),
        ({"gpus": 2}, "--gpus 2 is not possible: give 0 to 1"),
        ({"gpus": -1}, "--gpus -1 is not possible"),
        ({"cpus": 0}, "--cpus 0 is not possible"),
        ({"walltime": "2h"}, "--time '2h' is no time of a minute or more"),
        ({"walltime": "0:00:59"}, "--time '0:00:59' is no time of a minute or more"),
        ({"walltime": "2:00:00\n#SBATCH --x"}, "is no time of a minute or more"),
        ({"memory": "lots"}, "--memory 'lots' is not understood: give such as 16G or 800M"),
        ({"memory": "0G"}, "--memory '0G' is not understood"),
        ({"partition": "a b"}, "--partition 'a b' is not possible"),
        ({"account": ""}, "--account '' is not possible"),
        ({"name": "a/b"}, "--name 'a/b' is not possible"),
        ({"name": "%u"}, "--name '%u' is not possible"),
        ({"prologue": ("a\nb",)}, "is empty or more than one line"),
        ({"directives": ("",)}, "is empty or more than one line"),
        ({"directives": ("constraint=h100",)}, "--directive 'constraint=h100' is not possible"),
        ({"directives": ("--array=0-9",)}, "--directive '--array=0-9' is not possible"),
        ({"directives": ("--no-requeue",)}, "--directive '--no-requeue' is not possible"),
        ({"directives": ("--time 1",)}, "--directive '--time 1' is not possible"),
        ({"logs": '/a"b'}, "sbatch cannot take quotes"),
        ({"logs": "/a%b"}, "sbatch cannot take quotes"),
        ({"logs": "/a\nb"}, "sbatch cannot take quotes"),
        ({"walltime": "0:01:00", "stop_before": 60}, "--stop-before 60 does not fit into --time 0:01:00"),
        ({"stop_before": 9}, "--stop-before 9 does not fit into --time 2:00:00: give 10 s or more"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        job(**changes)
    assert said in str(refused.value)


@pytest.mark.parametrize(("memory", "held"), [("16G", 16 * 2**30), ("800M", 800 * 2**20), ("512", 512 * 2**20)])
def test_memory_is_read_as_slurm_reads_it(memory: str, held: int) -> None:
    assert job(memory=memory).memory_bytes == held
    assert job().memory_bytes is None


@pytest.mark.parametrize("prologue", [(), ("module() { echo; }", "module load cuda")])
@pytest.mark.parametrize("changes", [{}, {"cpus": 4, "gpus": 1, "at_most": 2, "logs": "/a b"}])
def test_shellcheck_finds_nothing(tmp_path: Path, changes: dict[str, Any], prologue: tuple[str, ...]) -> None:
    (tmp_path / "script").write_text(render(job(**changes, prologue=prologue), [*WORDS, "--roi", "a 'c'"]))
    checked = subprocess.run([SHELLCHECK, tmp_path / "script"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_words_arrive_as_they_are(tmp_path: Path) -> None:
    hostile = ["/a b/it's.zarr", '"$HOME"', "$(touch broken)", "`touch broken`", "\\", "*", "ä;é", "", "#", "!x", "~"]
    task = started(tmp_path, render(job(cpus=3), [*WORDS, *hostile]))
    words, threads = task.wait_for_call()
    assert words == ["-P", "-m", "nrrn_pipeline.cli", *WORDS, *hostile, "--shard-of", "3/64"]
    assert threads == "3"
    assert task.end() == (0, "")
    assert not (tmp_path / "broken").exists()


@given(words=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), max_size=5))
@settings(deadline=None, max_examples=200)
def test_bash_reads_each_word_as_it_was(words: list[str]) -> None:
    script = render(job(), words)
    called = script.partition("nrrn_pipeline.cli")[2].partition("    --shard-of")[0]
    told = subprocess.run(
        ["/bin/bash", "-c", f"printf '%s\\0' {called.rstrip().removesuffix(chr(92))}"], capture_output=True, check=True
    ).stdout
    assert told.decode().split("\0")[: len(words)] == words


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_the_jobs_exit_status_is_nrrns(tmp_path: Path, status: int) -> None:
    assert started(tmp_path, render(job(), WORDS), status=status).end() == (status, "")


def test_a_prologue_comes_first_and_may_use_what_is_not_set(tmp_path: Path) -> None:
    lines = ('echo "$MODULE_THAT_IS_NOT_SET"', "export OMP_NUM_THREADS=7")
    task = started(tmp_path, render(job(prologue=lines), WORDS))
    assert task.wait_for_call()[1] == "7"
    assert task.end() == (0, "")


@pytest.mark.parametrize("ends_after", [0.0, 0.5])
def test_when_the_time_is_nearly_over_the_task_is_requeued_once_nrrn_has_ended(
    tmp_path: Path, ends_after: float
) -> None:
    task = started(tmp_path, render(job(), WORDS), works=600, ends_after=ends_after)
    task.send(signal.SIGUSR1)
    assert task.end() == (143, "requeue 70_3")


def test_a_task_that_does_not_end_in_time_is_killed_and_requeued(tmp_path: Path) -> None:
    script = render(job(stop_before=10), WORDS).replace("sleep 7 ", "sleep 0.5 ")
    task = started(tmp_path, script, works=600, ends_after=600)
    task.send(signal.SIGUSR1)
    assert task.end() == (137, "requeue 70_3")


def test_a_task_that_has_just_finished_is_not_requeued(tmp_path: Path) -> None:
    script = render(job(), WORDS).replace('kill -TERM "$denoising"', "sleep 2 #")
    task = started(tmp_path, script, works=1)
    task.send(signal.SIGUSR1)
    assert task.end() == (0, "")


def test_a_task_that_is_cancelled_lets_nrrn_end_in_order_and_is_not_requeued(tmp_path: Path) -> None:
    task = started(tmp_path, render(job(), WORDS), works=600, ends_after=0.5)
    task.send(signal.SIGTERM)
    assert task.end() == (143, "")


def test_a_task_that_is_cancelled_when_its_time_is_nearly_over_is_not_requeued(tmp_path: Path) -> None:
    task = started(tmp_path, render(job(), WORDS), works=600, ends_after=1.5)
    task.send(signal.SIGUSR1)
    time.sleep(0.5)  # bash does one after the other
    task.process.send_signal(signal.SIGTERM)
    assert task.end() == (143, "")


@pytest.mark.parametrize("answer", ["1234", "1234;cluster"])
def test_the_jobs_number_is_what_sbatch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    executable(
        tmp_path / "sbatch",
        "#!/bin/bash",
        f'echo "$@" > {tmp_path}/words',
        f"cat > {tmp_path}/script",
        f"echo '{answer}'",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sbatch.submit("#!/bin/bash\nä\n") == "1234"
    assert (tmp_path / "words").read_text() == "--parsable\n"
    assert (tmp_path / "script").read_text() == "#!/bin/bash\nä\n"


def test_what_sbatch_says_against_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "sbatch", "#!/bin/bash", "echo 'sbatch: error: no such\npartition' >&2", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match="sbatch refused the job: sbatch: error: no such partition"):
        sbatch.submit("")


def test_an_answer_that_is_no_number_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "sbatch", "#!/bin/bash", "echo hello")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RunError, match="not a job's number: see squeue --me"):
        sbatch.submit("")


def test_where_there_is_no_slurm_one_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("sbatch") is None
    with pytest.raises(InputError, match=r"sbatch cannot be run here .* or see the script with --dry-run"):
        sbatch.submit("")
