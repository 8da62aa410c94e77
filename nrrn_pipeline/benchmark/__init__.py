"""How fast this machine denoises, and in how much memory: whole programs side by side, and the network alone."""

from nrrn_pipeline.benchmark.measuring import Benchmark, Measured, Task, run_benchmark
from nrrn_pipeline.benchmark.programs import Program, parse_programs
from nrrn_pipeline.benchmark.showing import columns_of, write_benchmark
from nrrn_pipeline.benchmark.volume import make_volume

__all__ = [
    "Benchmark",
    "Measured",
    "Program",
    "Task",
    "columns_of",
    "make_volume",
    "parse_programs",
    "run_benchmark",
    "write_benchmark",
]
