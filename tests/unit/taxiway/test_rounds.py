"""Whose result is read without a notification, round after round."""

from hypothesis import given
from hypothesis import strategies as st

from taxiway.client.valkey_results import MOST_PER_PASS, Rounds


def test_nothing_is_read_before_it_has_waited_for_a_look_or_if_it_was_announced_meanwhile() -> None:
    rounds = Rounds()
    assert rounds.take({"a", "b"}) == []
    assert sorted(rounds.take({"a", "b", "c"})) == ["a", "b"]
    assert sorted(rounds.take({"b", "c"})) == ["b", "c"]
    assert rounds.take({"b"}) == ["b"]


@given(st.integers(0, 3 * MOST_PER_PASS))
def test_each_of_many_has_its_turn_before_any_comes_again(count: int) -> None:
    waiting, rounds = {str(number): None for number in range(count)}, Rounds()
    rounds.take(waiting)
    looks = [rounds.take(waiting) for _ in range(-(-count // MOST_PER_PASS))]
    assert sorted(job for look in looks for job in look) == sorted(waiting)
    assert all(len(look) <= MOST_PER_PASS for look in looks)
