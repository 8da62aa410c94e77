"""nrrn submit: what it refuses before anything is queued, what it prints, and what it gives to sbatch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nrrn_pipeline.cli.lazy import loaded
from nrrn_pipeline.cluster import SlurmSettings, load_settings
from tests.commands import Nrrn, Said
from tests.support import bare_zarr, image_like, tiny_weights

DEPLOY = Path(__file__).parents[2] / "deploy/slurm"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
ASKED = ("--array", "4", "--time", "2:00:00")


Submit = Callable[..., Said]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nrrn: Nrrn) -> Submit:
    """`nrrn submit slurm raw.zarr out.zarr --weights w.safetensors` and more, in a folder where these are."""
    bare_zarr(tmp_path / "raw.zarr", image_like((8, 64, 64)))
    tiny_weights(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def call(*words: str, source: str = "raw.zarr", output: str = "out.zarr", weights: str = "w.safetensors") -> Said:
        return nrrn("submit", "slurm", source, output, "--weights", weights, *words)

    return call


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where what is submitted lies; sbatch answers 1234."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\necho "$@" > {folder}/words\ncat > {folder}/script\necho 1234\n')
    (folder / "sbatch").chmod(0o755)
    return folder


def called(script: str) -> list[str]:
    """The words of the command that the tasks run, after the module."""
    command = script.partition("-m nrrn_pipeline.cli ")[2].partition(" &\n")[0]
    return shlex.split(command.replace("\\\n", " "))


def test_a_dry_run_prints_the_script_and_leaves_nothing(submit: Submit, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    said = submit(*ASKED, "--dry-run")
    assert said.status == 0, said.err
    assert said.out.startswith("#!/bin/bash\n#SBATCH --job-name=nrrn\n#SBATCH --array=0-3\n")
    assert f"#SBATCH --output={tmp_path}/nrrn-logs/nrrn-%A_%a.out\n" in said.out
    paths = [str(tmp_path / name) for name in ("raw.zarr", "out.zarr", "w.safetensors")]
    share = ["--shard-of", "${SLURM_ARRAY_TASK_ID}/4"]
    assert called(said.out) == ["denoise", *paths[:2], "--weights", paths[2], *share]
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_denoise_are_passed_on_wherever_they_stand(submit: Submit, nrrn: Nrrn) -> None:
    layout = ("--slab=4,32,64", "--chunk", "4,16,32", "--shard", "4,32,64")
    more = ("--tile", "40", "--device", "cuda", "--no-prefetch", "--roi", "0:4,0:32,0:64", "--images", "2")
    words = ("--weights", "w.safetensors", *ASKED, "raw.zarr", "out.zarr", *more, "--dry-run")
    said = nrrn("submit", "slurm", *layout, *words)
    assert said.status == 0, said.err
    passed_on = called(said.out)[5:-2]
    for option, value in (("--slab", "4,32,64"), ("--chunk", "4,16,32"), ("--tile", "40"), ("--device", "cuda")):
        assert passed_on[passed_on.index(option) + 1] == value
    assert "--no-prefetch" in passed_on
    assert "--level" not in passed_on


def test_what_is_submitted_is_what_a_dry_run_prints(
    submit: Submit, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = submit(*ASKED, "--name", "fly", "--logs", "a/logs", "--dry-run").out
    monkeypatch.setenv("PATH", f"{sbatch}:/usr/bin:/bin")
    said = submit(*ASKED, "--name", "fly", "--logs", "a/logs")
    assert said.status == 0, said.err
    assert (sbatch / "script").read_text() == printed
    assert (tmp_path / "a/logs/fly-1234.sbatch").read_text() == printed
    assert "job 1234: 4 tasks for 1 slab" in said.out
    assert f"to watch: nrrn status {tmp_path}/out.zarr; squeue --jobs 1234" in said.out
    assert "to stop: scancel 1234" in said.out
    assert not (tmp_path / "out.zarr").exists()


def test_tasks_that_would_but_wait_are_told_of(submit: Submit) -> None:
    assert "note: 4 tasks for 1 slab: some will but wait" in submit(*ASKED, "--dry-run").err
    assert submit("--array", "1", "--time", "2:00:00", "--dry-run").err == ""


@pytest.mark.parametrize("path", ["it's a $HOME `x`.zarr", "a  b.zarr", "ä;é.zarr", ":warning:.zarr", "[bold].zarr"])
def test_any_path_arrives(submit: Submit, path: str, tmp_path: Path) -> None:
    said = submit(*ASKED, "--dry-run", output=path)
    assert said.status == 0, said.err
    assert called(said.out)[2] == str(tmp_path / path)


def test_storage_options_go_with_the_tasks_however_they_were_given(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "options.json").write_text('{"anon": true}')
    by_file = called(submit(*ASKED, "--dry-run", "--storage-options", "@options.json").out)
    monkeypatch.setenv("NRRN_STORAGE_OPTIONS", '{"anon": true}')
    by_environment = called(submit(*ASKED, "--dry-run").out)
    assert by_file == by_environment
    assert by_file[by_file.index("--storage-options") + 1] == '{"": {"anon": true}}'


def test_no_credentials_are_in_the_script(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    assert "very-secret" not in submit(*ASKED, "--dry-run").out
    said = submit(*ASKED, "--dry-run", "--storage-options", '{"secret": "very-secret"}')
    assert said.status == 2
    assert "storage option 'secret' is refused" in said.err
    assert "very-secret" not in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shard-of", "0/4"), "--shard-of does not go with a job array: each task gets its own"),
        (("--cluster", "local"), "--cluster does not go with a job array: the tasks of an array share the work"),
        (("--cluster", "slurm.toml"), "--cluster does not go with a job array"),
        (("--workers", "4"), "--workers does not go with a job array"),
        (("--keys", "keys"), "--keys does not go with a job array"),
        (("--overwrite",), "--overwrite does not go with a job array: a task that begins late would delete"),
        (("--follow",), "--follow does not go with a job array: an array is for one run"),
        (("--slab", "3,5,7"), "slab"),
        (("--slab", "x"), "--slab 'x' is not understood"),
        (("--roi", "0:99,0:64,0:64"), "roi"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--level", "3"), "level"),
        (("--gpus", "2"), "--gpus 2 is not possible"),
        (("--memory", "100M"), "--memory 100M cannot hold a task, which takes"),
        (("--name", "a/b"), "--name 'a/b' is not possible"),
        (("--blah", "3"), "No such option: --blah"),
        (("more.zarr",), "unexpected extra argument"),
    ],
)
def test_what_denoise_would_refuse_is_refused_before_anything_is_queued(
    submit: Submit, sbatch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("PATH", f"{sbatch}:/usr/bin:/bin")
    before = sorted(tmp_path.iterdir())
    refused = submit(*ASKED, *words)
    assert refused.status == 2
    assert said.lower() in " ".join(refused.err.replace("│", " ").split()).lower()
    assert "Traceback" not in refused.err
    assert sorted(tmp_path.iterdir()) == before
    assert not (sbatch / "script").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "none.zarr"}, "none.zarr"),
        ({"weights": "none.safetensors"}, "none.safetensors"),
        ({"weights": "raw.zarr"}, "raw.zarr"),
        ({"output": "raw.zarr"}, "lies on top of the input"),
        ({"output": "."}, "lies on top of"),
        ({"output": "w.safetensors"}, "was not made by nrrn"),
        ({"output": "s3://key:secret@lab/out.zarr"}, "holds a password"),
    ],
)
def test_wrong_paths_are_refused_as_denoise_refuses_them(
    submit: Submit, nrrn: Nrrn, changes: dict[str, str], said: str
) -> None:
    refused = submit(*ASKED, **changes)
    assert refused.status == 2
    assert said in refused.err
    paths = {"source": "raw.zarr", "output": "out.zarr", "weights": "w.safetensors"} | changes
    by_denoise = nrrn("denoise", paths["source"], paths["output"], "--weights", paths["weights"], "--cluster", "serial")
    assert (by_denoise.status, by_denoise.err) == (2, refused.err)


def test_a_run_with_other_settings_is_not_joined(submit: Submit, nrrn: Nrrn) -> None:
    begun = nrrn("denoise", "raw.zarr", "out.zarr", "--weights", "w.safetensors", "--cluster", "serial")
    assert begun.status == 0, begun.err
    refused = submit(*ASKED, "--images", "2")
    assert refused.status == 2
    assert "was begun with other settings: images was 3, now 2" in refused.err


def test_without_slurm_or_when_it_refuses_nothing_is_left(
    submit: Submit, sbatch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    said = submit(*ASKED)
    assert said.status == 2
    assert "sbatch cannot be run here (No such file or directory): submit where Slurm is" in said.err
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{sbatch}:/usr/bin:/bin")
    said = submit(*ASKED)
    assert said.status == 2
    assert said.err.endswith("nrrn: sbatch refused the job: sbatch: error: invalid partition\n")
    assert sorted(tmp_path.iterdir()) == before


def test_logs_that_cannot_be_written_are_said_before_anything_is_queued(
    submit: Submit, sbatch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", f"{sbatch}:/usr/bin:/bin")
    said = submit(*ASKED, "--logs", "file/logs")
    assert said.status == 2
    assert "--logs" in said.err
    assert "cannot be written to (Not a directory)" in said.err
    assert not (sbatch / "script").exists()


def test_no_option_of_submit_hides_one_of_denoise() -> None:
    own, theirs = (
        {name for option in c.params for name in option.opts if name.startswith("--")}
        for c in (loaded("submit").commands["slurm"], loaded("denoise"))
    )
    assert own & theirs == {"--quiet"}  # which all commands have


def example() -> list[str]:
    """The words of the README's example."""
    text = (DEPLOY / "README.md").read_text()
    found = re.search(r"```bash\nnrrn (submit slurm .*?)\n```", text, re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", " "))


def test_the_example_is_what_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nrrn: Nrrn) -> None:
    bare_zarr(tmp_path / "raw.zarr", image_like((8, 64, 64)))
    tiny_weights(tmp_path / "lab.safetensors")
    monkeypatch.chdir(tmp_path)
    said = nrrn(*example(), "--dry-run")
    assert said.status == 0, said.err
    printed = said.out.replace(str(tmp_path), "/lab").replace(sys.executable, "/lab/venv/bin/python")
    assert printed == (DEPLOY / "array.sbatch").read_text()


@pytest.mark.parametrize("name", ["array.sbatch", "nightly.sbatch"])
def test_shellcheck_finds_nothing(name: str) -> None:
    checked = subprocess.run([SHELLCHECK, DEPLOY / name], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_nightly_job_says_what_denoise_understands(tmp_path: Path) -> None:
    (tmp_path / "nrrn").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/words\nexit 3\n')
    (tmp_path / "nrrn").chmod(0o755)
    paths = {"SRC": "s3://lab/a b.zarr", "DST": "$x", "WEIGHTS": "w", "NRRN": str(tmp_path / "nrrn")}
    ended = subprocess.run(["/bin/bash", DEPLOY / "nightly.sbatch"], env=os.environ | paths, check=False)
    assert ended.returncode == 3
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words[0] == "denoise"
    with loaded("denoise").make_context("nrrn denoise", words[1:]) as context:  # type: ignore[attr-defined]
        given = context.params
    assert (given["source"], given["output"], given["weights"]) == ("s3://lab/a b.zarr", "$x", "w")
    assert (given["follow"], given["every"]) == (True, 0)


def test_the_example_of_settings_is_a_cluster() -> None:
    settings = load_settings(DEPLOY / "slurm.toml")
    assert isinstance(settings, SlurmSettings)
    assert (settings.workers, settings.gpus, settings.queue) == (16, 1, "gpu")
