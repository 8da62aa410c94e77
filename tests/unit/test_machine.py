from __future__ import annotations

from pathlib import Path

import pytest

from nrrn_pipeline.machine import group_limits, memory_limit_bytes, peak_memory_bytes


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/memory.max": "max", "slurm/job_7/memory.max": "4000"}),
        (
            "9:cpu:/\n4:memory,hugetlb:/slurm/job_7\n0::/\n",
            {"memory/slurm/job_7/memory.limit_in_bytes": "4000", "memory/slurm/memory.limit_in_bytes": "max"},
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_limit_of_a_control_group_some_levels_down_is_seen(
    own: str, limits: dict[str, str], tmp_path: Path
) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    assert group_limits(tmp_path, tmp_path / "own") == [4000]
    assert group_limits(tmp_path, tmp_path / "none") == []


def test_a_slurm_jobs_memory_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_limit_bytes.cache_clear()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert memory_limit_bytes() == 100 * 2**20
    memory_limit_bytes.cache_clear()


def test_a_process_knows_the_most_memory_it_held() -> None:
    before = peak_memory_bytes()
    held = bytearray(before + 2**26)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_bytes() >= before + 2**26
