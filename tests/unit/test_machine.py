from __future__ import annotations

from nrrn_pipeline.machine import peak_memory_bytes


def test_a_process_knows_the_most_memory_it_held() -> None:
    before = peak_memory_bytes()
    held = bytearray(before + 2**26)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_bytes() >= before + 2**26
