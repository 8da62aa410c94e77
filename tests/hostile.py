"""What tests of hostile input share: any JSON, bounds on time and memory, and the line that a refusal must be."""

from __future__ import annotations

import copy
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st

from nrrn_pipeline.cli import main
from nrrn_pipeline.errors import InputError

SECONDS, MEMORY, LINE = 2.0, 64 << 20, 1000
HUGE = 2**60
DEEP = 100_000
EVIL = "evil\nnrrn: all is well\x1b[2J"
Value = TypeVar("Value")


def frugal(action: Callable[[], Value]) -> Value | None:
    """What the action gives, None if it refuses; it must do so in little time, and, done again, in little memory."""
    started = time.process_time()
    found = _unless_refused(action)
    assert time.process_time() - started < SECONDS
    tracemalloc.start()
    try:
        _unless_refused(action)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    return found


def _unless_refused(action: Callable[[], Value]) -> Value | None:
    try:
        return action()
    except InputError:
        return None


def refusal(action: Callable[[], object]) -> str:
    """The message that the action is refused with; it must be one line that a terminal can show."""
    with pytest.raises(InputError) as error:
        action()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < LINE
    return str(error.value)


def refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> None:
    """The command line, in this process, says one line to standard error and nothing else."""
    monkeypatch.setattr(sys, "argv", ["nrrn", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) in [(1, ""), (2, "")]
    assert err.startswith("nrrn: ")
    assert err[-1] == "\n"
    assert err[:-1].isprintable()
    assert len(err) < LINE


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def changed(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value in one place; Ellipsis takes it away."""
    document = copy.deepcopy(document)
    inner: Any = document
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 8, 1.5, 2**31, 2**63, HUGE, 10**30, 1e300, math.inf, -math.inf, math.nan])
WORDS = st.sampled_from(
    ["", "..", "/etc", "s3://x", "a/../../b", "zstd", "bytes", "sharding_indexed", "end", "uint8", "x" * 10_000, EVIL]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["name", "id", "configuration", "shape", "path", "scale"]), inner, max_size=3)
        | st.integers(0, 2000).map(lambda n: [1] * n)
    ),
    max_leaves=8,
)
