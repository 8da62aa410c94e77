"""The kinds of storage that a law about files holds for, and storage that goes wrong."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import settings

from nrrn_pipeline import retrying, storage
from nrrn_pipeline.places import files_of
from tests.servers import ObjectStore

settings.register_profile("unit", deadline=None)  # other work on the machine is no failure
settings.load_profile("unit")

Meddler = Callable[[Callable[[], Any], int], Any]


class Meddling:
    """A file system of which one method goes through `meddle`: given what makes the true answer, and its number."""

    def __init__(self, files: Any, method: str, meddle: Meddler) -> None:
        self._files, self._method, self._meddle = files, method, meddle
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._files, name)
        if name != self._method:
            return real

        def method(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._meddle(lambda: real(*args, **kwargs), self.calls)

        return method


Meddle = Callable[[str, str, Meddler], Meddling]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a folder that does not exist yet, on each kind of storage."""
    name = uuid.uuid4().hex
    if request.param == "local":
        yield str(tmp_path / name)
    elif request.param == "memory":
        yield f"memory://{name}/folder"
        files = fsspec.filesystem("memory")
        if files.exists(f"/{name}"):
            files.rm(f"/{name}", recursive=True)
    else:
        store: ObjectStore = request.getfixturevalue("moto_s3")
        store.make_bucket("unit-tests")
        with store.in_use():
            yield f"s3://unit-tests/{name}"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 0.0)


@pytest.fixture
def meddle(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Meddle:
    """From now on a method of the file system that holds `url` goes through a function."""

    def begin(url: str, method: str, function: Meddler) -> Meddling:
        meddling = Meddling(files_of(url)[0], method, function)
        monkeypatch.setattr(storage, "files_of", lambda url, fresh=False: (meddling, files_of(url)[1]))
        return meddling

    return begin
