"""Items dealt to workers: each once, neighbours to one worker, and nobody without while there are any."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nrrn_pipeline.dealing import Deal


@given(st.integers(0, 60), st.integers(0, 5), st.lists(st.integers(0, 7), min_size=60, max_size=60))
def test_each_number_is_taken_once_whoever_asks(count: int, workers: int, askers: list[int]) -> None:
    deal = Deal(count, [f"w{number}" for number in range(workers)])
    taken = [deal.take(f"w{asker}") for asker in askers[:count]]
    assert sorted(number for number in taken if number is not None) == list(range(count))
    assert deal.take("w0") is None


def test_each_worker_gets_a_part_of_neighbours_and_then_half_of_what_another_has_left() -> None:
    deal = Deal(12, ["a", "b", "c"])
    assert [[deal.take(who) for _ in range(2)] for who in "abc"] == [[0, 1], [4, 5], [8, 9]]
    assert [deal.take("a") for _ in range(2)] == [2, 3]
    assert deal.take("a") == 7, "b goes on with 6"
    assert [deal.take("new") for _ in range(2)] == [11, 6]
    assert deal.take("b") == 10
    assert deal.take("c") is None


def test_what_one_has_left_who_is_gone_is_taken_too() -> None:
    deal = Deal(6, ["a", "gone"])
    assert [deal.take("a") for _ in range(6)] == [0, 1, 2, 4, 5, 3]
