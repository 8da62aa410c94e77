"""What a benchmark found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nrrn_pipeline import storage
from nrrn_pipeline.benchmark.measuring import Benchmark
from nrrn_pipeline.cost import bytes_text


def columns_of(benchmark: Benchmark) -> list[list[str]]:
    """A line for each program, ours first, after one of names."""
    ours = benchmark.measured[0]
    names = "program,seconds,Mvoxel/s,ours is faster,peak memory,ours takes,largest difference,differ by > 1"
    lines = [names.split(",")]
    for each in benchmark.measured:
        if each.run.failure:
            lines.append([each.name, "failed", each.run.failure, "", "", "", "", ""])
            continue
        ratios = ["", ""]
        if each is not ours and not ours.run.failure:
            memory = ours.run.peak_bytes / max(1, each.run.peak_bytes)
            ratios = [f"{each.run.seconds / ours.run.seconds:.2f} times", f"{memory:.2f} of it"]
        difference = ["", ""] if each.most is None else [f"{each.most:g}", f"{each.far or 0:.2%}"]
        speed, peak = f"{each.speed / 1e6:.4f}", bytes_text(each.run.peak_bytes)
        lines.append([each.name, f"{each.run.seconds:.1f}", speed, ratios[0], peak, ratios[1], *difference])
    return lines


def write_benchmark(benchmark: Benchmark, folder: str, facts: Mapping[str, Any]) -> list[str]:
    """benchmark.json and benchmark.md in a folder; their URLs."""
    header, *lines = columns_of(benchmark)
    rows = [header, ["---"] * len(header), *lines]
    told = [f"- {name}: {value}" for name, value in facts.items()]
    page = "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *told, ""])
    texts = {
        "benchmark.json": json.dumps({**benchmark.facts(), "facts": dict(facts)}, indent=1) + "\n",
        "benchmark.md": page,
    }
    for name, text in texts.items():
        storage.write_file(f"{folder}/{name}", text.encode())
    return [f"{folder}/{name}" for name in texts]
