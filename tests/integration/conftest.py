"""The command line as a fixture."""

import pytest

from tests.commands import Nrrn, caller


@pytest.fixture
def nrrn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nrrn:
    return caller(monkeypatch, capsys)
