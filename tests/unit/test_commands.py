"""The table of commands: each is there, and none is loaded before it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nrrn_pipeline.cli.lazy import COMMANDS, loaded
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
