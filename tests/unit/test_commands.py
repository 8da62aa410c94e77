"""The table of commands: each is there, and none is loaded before it is called."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

from nrrn_pipeline.cli.lazy import COMMANDS, PANELS, loaded
from tests.commands import Nrrn, caller


@pytest.fixture
def nrrn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nrrn:
    return caller(monkeypatch, capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_there_under_its_name(name: str, nrrn: Nrrn) -> None:
    assert loaded(name).name == name
    said = nrrn(name, "--help")
    assert said.status == 0
    assert f"nrrn {name}" in said.out


def test_help_names_every_command_with_its_line(nrrn: Nrrn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = " ".join(nrrn("--help").out.split())
    assert all(f"{name} {line}" in said for name, (_, _, line) in COMMANDS.items())


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, or those of a group."""
    for below, each in getattr(command, "commands", {"": command}).items():
        yield f"{name} {below}".rstrip(), each


LEAVES = dict(pair for name in COMMANDS for pair in leaves(name, loaded(name)))


@pytest.mark.parametrize("name", LEAVES)
def test_every_help_has_an_example_that_the_command_takes(name: str) -> None:
    _, found, example = str(LEAVES[name].help).partition(f"Example: nrrn {name}")
    assert found
    words = shlex.split(example.partition("\n")[0])
    LEAVES[name].make_context(name, words).close()


@pytest.mark.parametrize("name", LEAVES)
def test_options_of_a_panel_of_help_are_options_of_some_command(name: str) -> None:
    known = {param.name for command in LEAVES.values() for param in command.params}
    assert set().union(*PANELS.values()) <= known
    assert {"--quiet", "-q"} <= {word for param in LEAVES[name].params for word in param.opts}


def test_the_version_is_said(nrrn: Nrrn) -> None:
    assert nrrn("--version").out == f"nrrn-pipeline {metadata.version('nrrn-pipeline')}\n"


@pytest.mark.parametrize("words", [["--help"], ["denois"]])
def test_help_and_mistakes_load_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from nrrn_pipeline.cli import main
sys.argv = ["nrrn", *{words!r}]
try:
    main()
finally:
    print("torch" in sys.modules, "distributed" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.stdout.endswith("False False\n")


@pytest.mark.parametrize(("line", "found"), [("nrrn ing", "ingest"), ("nrrn denoise --prec", "--precision")])
def test_a_shell_completes_commands_and_options(line: str, found: str) -> None:
    words = {"_NRRN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'nrrn'; from nrrn_pipeline.cli import main; main()"]
    said = subprocess.run(command, env={**words, "PATH": ""}, capture_output=True, text=True, check=False)
    assert said.stdout.split() == [found]
