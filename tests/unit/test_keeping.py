"""Chunks that are kept: voxels as if each slab read for itself, each chunk as often as planned, memory bounded."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nrrn_pipeline import keeping
from nrrn_pipeline.geometry import Box, Cut, Shape, Span, spans_of
from nrrn_pipeline.keeping import (
    READ_SHARE,
    Keeping,
    Shelf,
    axes_shared,
    drop_shelf,
    fetched_by,
    kept_bytes,
    using_shelf,
)
from nrrn_pipeline.slabs import Slabs
from nrrn_pipeline.volume import Volume

MUCH = 10**9
SIZES = st.integers(2, 9)


@dataclass
class Case:
    """A source, slabs on it, and what was read of it, in voxels."""

    voxels: NDArray[np.uint16]
    source: Volume
    slabs: Slabs
    fetched: int = 0
    read: list[Box] = field(default_factory=list)

    def read_box(self, volume: Volume, box: Box) -> NDArray[np.uint16]:
        """In whole chunks, as storage gives them."""
        self.read.append(box)
        whole = [
            min(-(-span.stop // chunk) * chunk, length) - span.start // chunk * chunk
            for span, chunk, length in zip(box.spans, volume.chunk, volume.shape, strict=True)
        ]
        self.fetched += prod(whole)
        return self.voxels[box.within(volume.box)].copy()

    @property
    def layer_bytes(self) -> int:
        return keeping._wanted_bytes(self.source, self.slabs)[-1]


def case_of(shape: Shape, chunk: Shape, slab: Shape, halo: int, roi: Box | None = None) -> Case:
    voxels = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    source = Volume("/raw.zarr", shape, "uint16", chunk, chunk)
    axes = [
        [Cut(keep, keep.grown(reach, bound)) for keep in spans_of(part, step)]
        for part, bound, step, reach in zip(
            (roi or source.box).spans, source.box.spans, slab, (1, halo, halo), strict=True
        )
    ]
    return Case(voxels, source, Slabs(*axes))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(*(st.integers(1, 16),) * 3))
    starts = [draw(st.integers(0, length - 1)) for length in shape]
    roi = Box(*(Span(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True)))
    sizes = st.tuples(SIZES, SIZES, SIZES)
    return case_of(shape, draw(sizes), draw(sizes), draw(st.integers(0, 5)), draw(st.sampled_from([None, roi])))


@dataclass(frozen=True)
class Fixed(Keeping):
    """As much as asked for, whatever memory there is."""

    def room(self, held_bytes: int, for_others: int = 0) -> int:
        return self.most_bytes


@pytest.fixture(autouse=True)
def _nothing_is_left() -> object:
    yield
    drop_shelf()


def shelf_for(case: Case, most_bytes: int, patch: pytest.MonkeyPatch) -> Shelf:
    patch.setattr(keeping, "read_box", case.read_box)
    return Shelf(case.source, case.slabs, Fixed("a", most_bytes))


@settings(deadline=None)
@given(cases(), st.integers(0, 40_000), st.randoms(use_true_random=False))
def test_voxels_are_those_of_the_source_in_any_order_within_any_memory(case: Case, most: int, random: object) -> None:
    order = list(case.slabs) * 2
    random.shuffle(order)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        shelf = shelf_for(case, most, patch)
        for slab in order:
            np.testing.assert_array_equal(shelf.read(slab), case.voxels[slab.read.within(case.source.box)])
            assert shelf.held_bytes <= most
            assert shelf.held_bytes == sum(chunk.nbytes for chunk in shelf._kept.values())


@settings(deadline=None)
@given(cases())
def test_with_memory_enough_each_chunk_is_read_once_and_no_more_is_held_than_planned(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shelf = shelf_for(case, MUCH, patch)
        for slab in case.slabs:
            shelf.read(slab)
            assert shelf.held_bytes <= case.layer_bytes
    assert case.fetched == fetched_by(case.source, case.slabs, MUCH)
    assert shelf.held_bytes == 0, "nothing is wanted after the last slab"


@settings(deadline=None)
@given(cases(), st.floats(0, 1), st.integers(1, 5))
def test_several_workers_with_less_memory_read_no_more_than_planned(case: Case, part: float, workers: int) -> None:
    most = int(part * (case.layer_bytes + READ_SHARE * layer_bytes(case)))
    with pytest.MonkeyPatch.context() as patch:
        for number in range(workers):
            shelf = shelf_for(case, most, patch)
            for slab in case.slabs[len(case.slabs) * number // workers : len(case.slabs) * (number + 1) // workers]:
                shelf.read(slab)
    assert case.fetched <= fetched_by(case.source, case.slabs, most, workers)


def layer_bytes(case: Case) -> int:
    return keeping._layer_bytes(case.source, case.slabs, max)


def test_more_memory_spares_one_axis_after_the_other() -> None:
    case = case_of((24, 24, 96), (4, 4, 4), (4, 4, 4), 1)
    of_slab, of_row, of_layer = keeping._wanted_bytes(case.source, case.slabs)
    assert of_slab < of_row < of_layer
    assert axes_shared(case.source, case.slabs, 3 * of_slab) == 1
    fetched = [fetched_by(case.source, case.slabs, most) for most in (0, 3 * of_slab, of_row, of_layer)]
    assert fetched == sorted(fetched, reverse=True)
    assert len({*fetched}) == 4
    assert fetched[-1] == 24 * 24 * 96
    assert kept_bytes(case.source, case.slabs, 0) == 0
    assert kept_bytes(case.source, case.slabs, MUCH) == of_layer + 2 * of_slab


def test_chunks_too_large_to_be_read_whole_are_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((8, 20, 20), (8, 20, 20), (4, 4, 4), 1)
    shelf = shelf_for(case, case.source.box.size * case.source.itemsize * READ_SHARE - 1, monkeypatch)
    for slab in case.slabs:
        shelf.read(slab)
    assert case.read == [slab.read for slab in case.slabs]
    assert shelf.held_bytes == 0


def test_of_another_run_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that was made anew in between, under the same name, is read anew."""
    case = case_of((8, 8, 8), (4, 4, 4), (4, 4, 4), 1)
    monkeypatch.setattr(keeping, "read_box", case.read_box)
    first, second = Fixed("a", MUCH), Fixed("b", MUCH)
    with using_shelf(case.source, case.slabs, first) as of_first:
        of_first.read(case.slabs[0])
    with using_shelf(case.source, case.slabs, first) as again:
        assert again is of_first
        assert again.held_bytes > 0
        case.voxels[:] = 7
        with using_shelf(case.source, case.slabs, second) as of_second:
            assert (of_second.read(case.slabs[1]) == 7).all()
    with using_shelf(case.source, case.slabs, first) as again:
        assert again is of_first, "two runs at work have one each"
    with using_shelf(case.source, case.slabs, Fixed("c", MUCH)):
        assert [*keeping._shelves] == ["c"], "of runs that are not at work nothing is kept"
        drop_shelf()
        assert not keeping._shelves


def test_runs_in_one_process_hold_no_more_together_than_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((16, 16, 16), (4, 4, 4), (4, 4, 4), 1)
    monkeypatch.setattr(keeping, "read_box", case.read_box)
    monkeypatch.setattr(keeping, "free_memory_bytes", lambda: MUCH)
    with ExitStack() as stack:
        most = 20 * 4**3 * case.source.itemsize
        shelves = [stack.enter_context(using_shelf(case.source, case.slabs, Keeping(run, most))) for run in "abc"]
        for slab in case.slabs:
            for shelf in shelves:
                shelf.read(slab)
                assert sum(each.held_bytes for each in shelves) <= most
        assert shelves[0].held_bytes == 0, "the last slab's"


def test_what_nobody_asks_for_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((8, 8, 8), (4, 4, 4), (4, 4, 4), 1)
    monkeypatch.setattr(keeping, "IDLE_S", 0.01)
    with using_shelf(case.source, case.slabs, Fixed("a", MUCH)):
        time.sleep(0.1)
        assert [*keeping._shelves] == ["a"], "a slab takes as long as it takes"
    timer = keeping._shelves["a"].timer
    assert timer is not None
    timer.join(60)
    assert keeping._shelves == {}


def test_slabs_further_back_do_not_make_it_hold_what_is_wanted_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((16, 16, 64), (4, 4, 4), (4, 4, 4), 1)
    shelf = shelf_for(case, MUCH, monkeypatch)
    for start in range(len(case.slabs) - 16, 0, -16):
        for slab in case.slabs[start : start + 16]:
            shelf.read(slab)
            assert shelf.held_bytes <= case.layer_bytes


def test_a_worker_keeps_no_more_than_its_memory_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(keeping, "memory_limit_bytes", lambda: 3 * gib)
    monkeypatch.setattr(keeping, "free_memory_bytes", lambda: 4 * gib)
    assert Keeping("a", 9 * gib).room(0) == gib, "a part of what is free"
    assert Keeping("a", 9 * gib).room(gib) == 2 * gib
    assert Keeping("a", 9 * gib).room(8 * gib) == 3 * gib, "what the process may take"
    assert Keeping("a", 9 * gib, 2 * gib).room(gib) == gib, "with what it takes beside"
    assert Keeping("a", 9 * gib, 4 * gib).room(0) == 0
    assert Keeping("a", 5).room(gib) == 5
