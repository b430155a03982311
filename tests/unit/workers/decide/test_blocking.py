from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import ANY
from workers.decide.occupation import BATCHES_COUNT, RARE, blocking_by_model

NOW = 1000.0

batches = st.lists(st.tuples(st.floats(NOW - 2 * BATCHES_COUNT, NOW), st.sampled_from("abc"), st.floats(0.001, 30.0)))


def newest_first(seen: list[tuple[float, str, float]]) -> list[tuple[float, str, float]]:
    return sorted(seen, reverse=True)


def test_a_model_waits_for_the_batches_of_others_and_never_for_its_own() -> None:
    seen = [(NOW - 1 - n, "a", 2.0) for n in range(10)] + [(NOW - 20 - n, "b", 0.2) for n in range(10)]

    assert blocking_by_model(newest_first(seen), NOW) == {"a": 0.2, "b": 2.0, ANY: 2.0}


def test_rare_batches_and_those_of_before_the_last_minute_are_ignored() -> None:
    old, rare = (NOW - BATCHES_COUNT - 1, "a", 30.0), (NOW - 5, "b", RARE * BATCHES_COUNT)

    assert blocking_by_model([rare, old], NOW) == {"b": 0.0, ANY: 0.0}
    assert blocking_by_model([rare], NOW, devices=1)["b"] == 0.0
    assert blocking_by_model([(NOW - 5, "b", 2 * RARE * BATCHES_COUNT)], NOW, devices=2)[ANY] == 0.0


@given(seen=batches, devices=st.integers(1, 5))
def test_a_job_never_waits_longer_than_the_longest_batch_of_another_model(
    seen: list[tuple[float, str, float]], devices: int
) -> None:
    for model, seconds in blocking_by_model(newest_first(seen), NOW, devices).items():
        others = [taken for _, name, taken in seen if name != model]
        assert 0.0 <= seconds <= max(others, default=0.0) * 1.005  # told to three digits
