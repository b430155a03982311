"""The lower bound on cost: worked out by hand where that is possible, and never above what a run did cost."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.baselines import EVERY_POLICY, run
from lab.bounds.linear import lower_bound
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from simulator.workload import Workload
from tests.builders import recorded

ONE = recorded("fleets/one.yaml")

MIXED = recorded("fleets/mixed.yaml")


def one(rows: list[dict[str, Any]], *, curve: str, start: float = 0, batch: int = 1) -> Workload:
    """Requests for one class whose devices cost a dollar a second."""
    document = ONE.replace("CURVE", curve).replace("START", str(start)).replace("BATCH", str(batch))
    return prepare(make_trace([{"model": "m", "size": 2, **row} for row in rows]), parse_fleet(document), seed=0)


def test_what_has_time_runs_in_the_fullest_batch_and_what_has_none_in_the_batch_that_it_has_time_for() -> None:
    curve = "{base: 1, slope: 0.5}"
    patient = one([{"arrival": 0, "deadline": 1000}] * 6, curve=curve, batch=8)
    urgent = one([{"arrival": 0, "deadline": 4}] * 6, curve=curve, batch=8)
    assert lower_bound(patient).cost == pytest.approx(6 * (1 + 1 / 8), rel=1e-4)
    assert lower_bound(urgent).cost == pytest.approx(6 * (1 + 1 / 3), rel=1e-4)


def test_a_device_is_paid_from_its_start_until_its_work_is_done() -> None:
    rows = [{"arrival": 0, "deadline": 0.5}, {"arrival": 100, "deadline": 19.5}, {"arrival": 200, "deadline": 19.5}]
    bound = lower_bound(one(rows, curve="{base: 19, slope: 0}", start=60))
    assert bound.asked == {"live": 1, "standard": 2, "bulk": 0}
    assert bound.cost == pytest.approx(3 * 19 + 19, rel=1e-4)  # three windows of 20 s at 19/20 of a device, then bare


def test_what_no_class_can_answer_in_time_costs_nothing_and_counts_as_missed() -> None:
    rows = [{"arrival": 0, "deadline": deadline, "service": 0} for deadline in (1, 3)]
    bound = lower_bound(one(rows, curve="{base: 2, slope: 0}"))
    assert bound.summary().attainment == {"live": 0.5, "standard": None, "bulk": None}
    assert bound.cost == pytest.approx(2)


def test_a_share_of_the_answers_costs_what_the_cheapest_of_them_do() -> None:
    rows = [{"arrival": 0, "deadline": 30, "size": size} for size in (3, 1, 2)]
    bound = lower_bound(one(rows, curve="{base: 0, slope: 1}"))
    costs = [bound.of({"live": 0, "standard": share / 3, "bulk": None}) for share in range(4)]
    assert costs == pytest.approx([0, 1, 3, 6])


requests = st.fixed_dictionaries(
    {
        "arrival": st.floats(0, 150),
        "model": st.sampled_from(["chat", "chat", "embed", "rank"]),
        "size": st.integers(1, 3000),
        "output": st.integers(0, 300),
    },
    optional={"deadline": st.floats(0.2, 200)},
)


@pytest.mark.parametrize("name", EVERY_POLICY)
@settings(max_examples=6, deadline=None)
@given(rows=st.lists(requests, min_size=1, max_size=25), seed=st.integers(0, 3), surge=st.sampled_from([1, 10]))
def test_no_run_costs_less_than_the_answers_that_it_gave_in_time(
    name: str, rows: list[dict[str, Any]], seed: int, surge: int
) -> None:
    workload = prepare(make_trace(rows * surge), parse_fleet(MIXED), seed=seed)
    found = run(name, EVERY_POLICY[name], workload, seed)
    assert found.cost_usd >= lower_bound(workload).of(found.attainment) * (1 - 1e-9)
