"""The lines that benchmarks print, which name the commit that they measured."""

from benchmarks.harness.measure import answer
from benchmarks.suite.table import tables


def test_an_answer_states_the_median_and_spread_with_their_digits() -> None:
    line = answer("how many", [1234.5678, 0.5, 2000.4])

    assert (line["repeats"], line["median"], line["spread"]) == (3, 1235.0, 2000.0)


def test_a_table_has_a_row_a_contestant_and_its_share_of_the_limit() -> None:
    lines = [
        answer(f"W1 paced: {name} {measure}", [figure], workload="W1", contestant=name, measure=measure)
        for name, measure, figure in [
            ("limit", "saturated", 4000.0),
            ("taxiway", "saturated", 3900.0),
            ("taxiway", "idle p50", 6.25),
            ("taxiway", "idle p99", 7.0),
            ("taxiway", "cpu client", 20.0),
            ("taxiway", "cpu worker", 40.0),
        ]
    ]

    (table,) = tables(lines)

    assert "### W1 paced" in table
    assert "| taxiway | 3,900 | 0.97 | 6.25 / 7 |  | 60 |" in table
