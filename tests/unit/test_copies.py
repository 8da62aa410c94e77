"""What workers load that only copy; how a slab is encoded."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.geometry import Box, Span, box_of, boxes_of
from nrrn_pipeline.volume import Volume
from nrrn_pipeline.writing import ENCODED_BYTES, encoded_at_once

ROOT = Path(__file__).parents[2]


def test_workers_that_copy_load_no_torch() -> None:
    code = "import sys, nrrn_pipeline.cluster.worker, nrrn_pipeline.writing, nrrn_pipeline.ingest_plan; "
    code += "import nrrn_pipeline.export_plan; "
    code += "print([name for name in ('torch', 'scipy', 'skimage') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


@given(
    unit=st.tuples(st.integers(1, 64), st.integers(1, 700), st.integers(1, 700)),
    counts=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(["uint8", "float32"]),
)
def test_what_is_encoded_together_is_whole_units_and_bounded(
    unit: tuple[int, int, int], counts: tuple[int, int, int], dtype: str
) -> None:
    slab = tuple(size * count for size, count in zip(unit, counts, strict=True))
    target = Volume("v", slab, dtype, unit, unit)
    step = encoded_at_once(target, slab)
    assert all(size % own == 0 for size, own in zip(step, unit, strict=True))
    itemsize = np.dtype(dtype).itemsize
    assert prod(step) * itemsize <= max(ENCODED_BYTES, prod(unit) * itemsize)
    parts = list(boxes_of(box_of(slab), step))
    assert sum(part.size for part in parts) == prod(slab)


def test_a_small_slab_is_encoded_at_once() -> None:
    target = Volume("v", (64, 512, 512), "uint8", (16, 256, 256), (16, 256, 256))
    box = Box(Span(0, 64), Span(0, 512), Span(0, 512))
    assert list(boxes_of(box, encoded_at_once(target, box.shape))) == [box]
