"""The command line, called as a user does, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from nrrn_pipeline.cli import main


class Said(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


Nrrn = Callable[..., Said]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nrrn:
    """`nrrn` with some words."""

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["nrrn", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = Said(int(end.value.code or 0), *capsys.readouterr())
        assert "Traceback" not in said.err
        return said

    return call
