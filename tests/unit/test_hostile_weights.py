"""Whatever stands in a weights file: a network or a refusal, soon, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nrrn_pipeline.network import NRRN, parse_header, parse_weights, weights_bytes
from tests.hostile import DEEP, EVIL, JSON, frugal, refusal, refused_in_one_line
from tests.support import bare_zarr, image_like, tiny_network

WEIGHTS = weights_bytes(tiny_network(), {"note": "x"})


def safetensors(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=100)
    | st.tuples(st.integers(0, len(WEIGHTS) - 1), st.binary(min_size=1, max_size=9)).map(
        lambda change: WEIGHTS[: change[0]] + change[1] + WEIGHTS[change[0] + len(change[1]) :]
    )
    | JSON.map(safetensors)
    | JSON.map(lambda value: safetensors({"__metadata__": {"nrrn": json.dumps(value)}}))
    | JSON.map(lambda value: safetensors({"__metadata__": value}))
)
def test_any_bytes_are_a_network_or_refused(data: bytes) -> None:
    network = frugal(lambda: parse_weights(data, "w"))
    assert network is None or isinstance(network, NRRN)


def described(**changes: Any) -> bytes:
    header = {"format": "nrrn-1", "units": 1, "channels": 4, "training": {}} | changes
    return save({"a": torch.zeros(1)}, {"nrrn": json.dumps(header)})


NO_WEIGHTS: dict[str, bytes] = {
    "units of 10^9": described(units=10**9),
    "channels of 10^9": described(channels=10**9),
    "as many as are allowed": described(units=64, channels=4096),
    "a true unit": described(units=True),
    "units of text": described(units="x" * 10**6),
    "channels of evil": described(channels=EVIL),
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + WEIGHTS[8:],
    "a tensor of 2^63 bytes": safetensors({"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}}),
    "a tensor of 2^60 numbers": safetensors(
        {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "nested JSON": safetensors(b"[" * DEEP + b"]" * DEEP),
    "nested JSON in the metadata": save({"a": torch.zeros(1)}, {"nrrn": "[" * DEEP}),
    "an evil layer": save(
        {EVIL: torch.zeros(1)}, {"nrrn": json.dumps({"format": "nrrn-1", "units": 1, "channels": 4})}
    ),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
@pytest.mark.parametrize("parse", [parse_header, parse_weights])
def test_hostile_weights_are_refused_in_one_short_line_in_no_time(parse: Callable[..., Any], case: str) -> None:
    frugal(lambda: parse(NO_WEIGHTS[case], "w.safetensors"))
    assert "w.safetensors" in refusal(lambda: parse_weights(NO_WEIGHTS[case], "w.safetensors"))


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "U64", "BOOL", "C64", "X"])
def test_weights_of_any_number_type_are_a_network_or_refused(dtype: str) -> None:
    bits = {"F4": 4, "BOOL": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16}.get(dtype, 64)
    header: dict[str, Any] = {"__metadata__": {"nrrn": json.dumps({"format": "nrrn-1", "units": 1, "channels": 4})}}
    end = 0
    for name, tensor in tiny_network().state_dict().items():
        length = tensor.numel() * bits // 8
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + length]}
        end += length
    network = frugal(lambda: parse_weights(safetensors(header, bytes(end)), "w"))
    assert network is None or {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_nrrn_plan_refuses_hostile_weights_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    source, weights = bare_zarr(tmp_path / "a.zarr", image_like((4, 16, 16))), tmp_path / "w.safetensors"
    weights.write_bytes(NO_WEIGHTS[case])
    refused_in_one_line(monkeypatch, capsys, "plan", source, tmp_path / "out.zarr", "--weights", weights)
