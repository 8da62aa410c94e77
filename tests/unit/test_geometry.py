from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.geometry import Box, Span, boxes_of, hull_of, joined, tiles_of

spans = st.builds(lambda start, length: Span(start, start + length), st.integers(0, 9), st.integers(1, 40))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Span, Span, int, int]:
    halo = draw(st.integers(0, 12))
    bounds = Span(draw(st.integers(0, 5)), draw(st.integers(6, 600)))
    start = draw(st.integers(bounds.start, bounds.stop - 1))
    keep = Span(start, draw(st.integers(start + 1, bounds.stop)))
    return keep, bounds, draw(st.integers(2 * halo + 1, 300)), halo


@given(tilings())
def test_tiles_keep_every_voxel_once_and_read_its_whole_halo(tiling: tuple[Span, Span, int, int]) -> None:
    keep, bounds, window, halo = tiling
    cuts = tiles_of(keep, bounds, window, halo)
    assert [i for cut in cuts for i in range(cut.keep.start, cut.keep.stop)] == list(range(keep.start, keep.stop))
    for cut in cuts:
        needed = cut.keep.grown(halo, bounds)
        assert cut.read.start <= needed.start
        assert needed.stop <= cut.read.stop
        assert bounds.start <= cut.read.start
        assert cut.read.stop <= bounds.stop


@given(tilings())
def test_tiles_are_equally_long_and_no_longer_than_the_window(tiling: tuple[Span, Span, int, int]) -> None:
    cuts = tiles_of(*tiling)
    assert len({len(cut.read) for cut in cuts}) == 1
    assert len(cuts[0].read) <= tiling[2]


@given(tilings())
def test_one_tile_fewer_would_not_fit_the_window(tiling: tuple[Span, Span, int, int]) -> None:
    keep, bounds, window, halo = tiling
    pieces = len(tiles_of(*tiling)) - 1
    if pieces:
        edges = [keep.start + i * len(keep) // pieces for i in range(pieces + 1)]
        reads = [Span(a, b).grown(halo, bounds) for a, b in itertools.pairwise(edges)]
        assert max(map(len, reads)) > window


def test_a_slice_no_larger_than_the_window_is_one_tile_without_padding() -> None:
    (cut,) = tiles_of(Span(0, 9), Span(0, 9), window=10, halo=7)
    assert (cut.keep, cut.read) == (Span(0, 9), Span(0, 9))


def test_a_window_that_its_halo_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="tile of 14 voxels with a halo of 7 on each side keeps nothing"):
        tiles_of(Span(0, 100), Span(0, 100), window=14, halo=7)


@given(st.tuples(*[st.integers(1, 20)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_boxes_cover_every_voxel_once(shape: tuple[int, ...], step: tuple[int, ...], start: tuple[int, ...]) -> None:
    box = Box(*(Span(a, a + n) for a, n in zip(start, shape, strict=True)))
    boxes = list(boxes_of(box, step))  # type: ignore[arg-type]
    assert sum(part.size for part in boxes) == box.size
    assert len(set(boxes)) == len(boxes)
    for part in boxes:
        assert all(
            a.start <= b.start < b.stop <= a.stop and (b.start - a.start) % n == 0
            for a, b, n in zip(box.spans, part.spans, step, strict=True)
        )


def test_a_halo_stops_at_the_bounds() -> None:
    assert Span(2, 8).grown(3, Span(0, 10)) == Span(0, 10)
    assert Span(4, 5).grown(3, Span(0, 10)) == Span(1, 8)


def test_a_box_reads_back_from_its_text() -> None:
    box = Box(Span(0, 8), Span(5, 512), Span(7, 9))
    assert str(box) == "0:8,5:512,7:9"
    assert Box.parse(str(box)) == box


@pytest.mark.parametrize("text", ["", "0:8", "0:8,0:9", "0:8,0:9,0:9,0:9", "a:8,0:9,0:9", "0:8:2,0:9,0:9", "8,9,9"])
def test_other_text_is_no_box(text: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|invalid literal|does not give"):
        Box.parse(text)


@given(tilings(), st.integers(2, 16))
def test_on_a_grid_every_tile_begins_at_a_multiple_and_reads_its_halo(
    tiling: tuple[Span, Span, int, int], grid: int
) -> None:
    keep, bounds, window, halo = tiling
    bounds = bounds.aligned(grid)
    cuts = tiles_of(keep, bounds, window + grid, halo, grid)
    assert [i for cut in cuts for i in range(cut.keep.start, cut.keep.stop)] == list(range(keep.start, keep.stop))
    for cut in cuts:
        needed = cut.keep.grown(halo, bounds)
        assert cut.read.start % grid == 0
        assert bounds.start <= cut.read.start <= needed.start
        assert needed.stop <= cut.read.stop <= bounds.stop
        assert len(cut.read) <= window + grid


@given(spans, st.integers(-5, 40), st.integers(1, 30))
def test_a_window_lies_within_its_span_as_near_to_its_place_as_can_be(span: Span, at: int, side: int) -> None:
    found = span.around(at, side)
    assert len(found) == min(side, len(span))
    assert span.start <= found.start
    assert found.stop <= span.stop
    if span.start + side <= at < span.stop - side:
        assert found == Span(at - side // 2, at - side // 2 + side)


@given(spans, st.integers(1, 30))
def test_as_much_is_left_out_on_both_sides_of_the_middle(span: Span, side: int) -> None:
    found = span.middle(side)
    assert len(found) == min(side, len(span))
    assert 0 <= (span.stop - found.stop) - (found.start - span.start) <= 1


@given(st.sets(st.integers(0, 30)))
def test_joined_spans_hold_the_same_voxels_and_do_not_touch(voxels: set[int]) -> None:
    found = joined(Span(at, at + 1) for at in voxels)
    assert [at for span in found for at in range(span.start, span.stop)] == sorted(voxels)
    assert all(before.stop < after.start for before, after in itertools.pairwise(found))


def test_the_hull_holds_all_boxes_and_no_more() -> None:
    boxes = Box(Span(0, 1), Span(5, 9), Span(2, 3)), Box(Span(4, 6), Span(6, 7), Span(0, 1))
    assert hull_of(boxes) == Box(Span(0, 6), Span(5, 9), Span(0, 3))
    assert hull_of(boxes[:1]) == boxes[0]


def test_what_is_moved_there_and_back_is_what_it_was() -> None:
    box = Box(Span(1, 2), Span(5, 9), Span(2, 3))
    assert box.moved((3, -2, 0)) == Box(Span(4, 5), Span(3, 7), Span(2, 3))
    assert box.moved((1, 5, 2)).shifted(box) == box
