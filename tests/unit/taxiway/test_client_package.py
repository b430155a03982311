import pytest
from hypothesis import given
from hypothesis import strategies as st

import taxiway
from taxiway import errors
from taxiway.backoff import Backoff
from taxiway.client.valkey_results import MOST_PER_PASS, Rounds
from taxiway.errors import InvalidRequestError


def test_every_name_that_is_promised_is_there_and_every_error_is_promised() -> None:
    assert [getattr(taxiway, name).__name__ for name in taxiway.__all__] == [*taxiway.__all__]
    tree = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert tree <= set(taxiway.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        taxiway.nothing  # noqa: B018


@pytest.mark.parametrize("url", ["amqp://localhost", "localhost:6379", "", "redis://localhost:port"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="url"):
        taxiway.Client(url)


@pytest.mark.parametrize("interface", ["redis://127.0.0.1:9", "http://127.0.0.1:9"])
def test_one_idempotency_key_for_a_map_is_refused(interface: str) -> None:
    with taxiway.Client(interface) as client, pytest.raises(InvalidRequestError, match="idempotency_key"):
        next(client.map("echo", [1, 2], idempotency_key="one"))


def test_what_only_a_router_knows_is_not_asked_of_a_broker() -> None:
    with taxiway.Client("redis://127.0.0.1:9") as client, pytest.raises(InvalidRequestError, match="http"):
        client.fleet()


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


SECONDS = st.floats(1e-3, 1e4)
DRAWS = st.floats(0, 1)


def test_a_pause_doubles_with_each_failure_and_is_bounded_however_many_there_are() -> None:
    backoff = Backoff(0.5, 30.0)
    assert [backoff.pause(failures) for failures in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert backoff.pause(1_000_000) == 30.0


@given(first=SECONDS, factor=st.floats(1, 1e4), spread=st.floats(0, 1), failures=st.integers(1, 10_000), draw=DRAWS)
def test_jitter_shortens_by_its_spread(first: float, factor: float, spread: float, failures: int, draw: float) -> None:
    full = Backoff(first, first * factor)
    pause = Backoff(first, first * factor, spread).pause(failures, draw)
    assert full.pause(failures) * (1 - spread) <= pause * 1.001
    assert pause <= full.pause(failures) <= full.pause(failures + 1) <= full.longest
