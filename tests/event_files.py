"""TensorBoard's event files, read by the description of their format."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c


def checked(content: BinaryIO, size: int) -> bytes:
    """So many bytes, which the masked CRC-32C behind them fits."""
    data = content.read(size)
    crc = google_crc32c.value(data)
    assert content.read(4) == struct.pack("<I", ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32)
    return data


def events(file: Path) -> list[Any]:
    """By the description of the format, a length and the data, each with its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found, size = [], file.stat().st_size
    with open(file, "rb") as content:
        while content.tell() < size:
            (length,) = struct.unpack("<Q", checked(content, 8))
            found.append(Event.FromString(checked(content, length)))
    assert found[0].file_version == "brain.Event:2"
    return found


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and step, as TensorBoard shows them: a session's start hides what is there of its step and later."""
    tags: dict[str, dict[int, float]] = {}
    for file in sorted(folder.iterdir()):
        for event in events(file):
            if event.HasField("session_log"):
                tags = {tag: {s: v for s, v in of.items() if s < event.step} for tag, of in tags.items()}
            for value in event.summary.value:
                assert event.step not in tags.setdefault(value.tag, {})
                tags[value.tag][event.step] = value.simple_value
    return tags
