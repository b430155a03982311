"""A plan that does not keep what it promised for two periods is dropped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.tuning.tuner import PERIODS, WORSE, Answers, Trust, measured
from simulator.tuning.twin import FLOOR

PENALTIES = (48.0, 24.0, 12.0)
CELLS = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 2)),
    st.integers(0, 50).flatmap(lambda n: st.builds(Answers, st.just(n), st.integers(0, n))),
)


@given(scores=st.lists(st.integers(0, 100), max_size=8), predicted=st.integers(0, 40).map(lambda usd: usd + 0.1))
def test_trust_is_lost_after_periods_in_a_row_that_were_worse_than_predicted(
    scores: list[int], predicted: float
) -> None:
    trust, spent = Trust(), 0.0
    for number, score in enumerate(scores):
        spent += score
        last = scores[max(number + 1 - PERIODS, 0) : number + 1]
        lost = trust.is_lost(3600.0 * (number + 1), spent, PENALTIES, predicted)
        assert lost == (len(last) == PERIODS and min(last) > WORSE * predicted)


@given(cost=st.floats(0, 100), answers=CELLS)
def test_a_score_is_at_least_the_cost_and_at_most_all_penalties_more(cost: float, answers: dict) -> None:  # type: ignore[type-arg]
    score = measured(cost, answers, PENALTIES)
    models = {cell[0] for cell in answers}
    assert cost <= score <= cost + sum(PENALTIES) + len(models) * FLOOR * PENALTIES[0] / 2 + 1e-9
    if not any(found.late for found in answers.values()):
        assert score == cost


@given(answers=CELLS, cell=st.tuples(st.integers(0, 3), st.integers(0, 2)))
def test_one_more_late_answer_makes_no_score_better(answers: dict, cell: tuple[int, int]) -> None:  # type: ignore[type-arg]
    more = answers | {cell: answers.get(cell, Answers()).with_one(timely=False)}
    assert measured(1.0, more, PENALTIES) >= measured(1.0, answers, PENALTIES) - 1e-9


def test_a_period_is_scored_by_what_it_cost_and_what_was_late_in_it() -> None:
    trust = Trust(100.0, 2.0)
    trust.note((0, 1), timely=True)
    trust.note((1, 1), timely=False)
    assert trust.score(460.0, 2.5, PENALTIES) == 5.0 + 12.0
    assert not trust.is_lost(460.0, 2.5, PENALTIES, predicted=10.0)
    assert trust.score(820.0, 2.5, PENALTIES) == 0.0
