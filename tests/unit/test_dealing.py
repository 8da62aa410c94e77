"""Items dealt to hands: each once, neighbours to one hand, and none idle while there are any."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.dealing import Deal, dealt


@given(st.integers(0, 60), st.integers(0, 5), st.lists(st.integers(0, 7), min_size=60, max_size=60))
def test_each_number_is_taken_once_whoever_asks(count: int, hands: int, askers: list[int]) -> None:
    deal = Deal(count, range(hands))
    taken = [deal.take(hand) for hand in askers[:count]]
    assert sorted(number for number in taken if number is not None) == list(range(count))
    assert deal.take(0) is None


def test_each_hand_gets_a_part_of_neighbours_and_then_half_of_what_another_has_left() -> None:
    deal = Deal(12, range(3))
    assert [[deal.take(hand) for _ in range(2)] for hand in range(3)] == [[0, 1], [4, 5], [8, 9]]
    assert [deal.take(0) for _ in range(2)] == [2, 3]
    assert deal.take(0) == 7, "hand 1 goes on with 6"
    assert [deal.take(9) for _ in range(2)] == [11, 6]
    assert deal.take(1) == 10
    assert deal.take(2) is None


def test_what_a_hand_has_left_that_stops_is_taken_too() -> None:
    deal = Deal(6, range(2))
    assert [deal.take(0) for _ in range(6)] == [0, 1, 2, 4, 5, 3]


def test_of_what_is_no_sequence_each_gets_what_comes_and_nothing_is_taken_before_it_is_asked_for() -> None:
    taken = []
    following = dealt((taken.append(item) or item for item in [None, 7]), range(2))
    assert taken == []
    assert (following(1), following(0), following(0)) == ((None,), (7,), None)
    assert (dealt([None], range(1))(0), dealt([], [])(None)) == ((None,), None)
