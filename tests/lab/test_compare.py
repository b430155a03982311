"""`python -m lab.compare`: every policy on a trace, beside the bounds."""

from lab.baselines import EVERY_POLICY
from lab.compare import compared
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from lab.trials.trial import TRIALS
from lab.yielding import PLACED, WAYS, yielded
from tests.builders import recorded


def test_every_policy_and_both_bounds_are_compared_and_no_score_is_below_them() -> None:
    edge = TRIALS["edge"]
    *runs, least, whole = compared(edge.workload(edge.trace(7).at_load(0.02, seed=1)), seed=1)
    assert [run.policy for run in runs] == [*EVERY_POLICY]
    assert (least.policy, whole.policy) == ("lp-bound", "whole-bound")
    assert min(run.score for run in runs) >= max(least.score, whole.score)


def test_generations_that_yield_and_go_on_let_live_ones_be_in_time_and_cost_less_than_evicted_ones() -> None:
    one_slot = recorded("fleets/device.yaml").replace(
        "start: 10, max_batch: 8,\n        roof", "start: 10, max_batch: 1,\n        roof"
    )
    fleet = parse_fleet(one_slot.replace("gpu: {count: 2", "gpu: {count: 1"))
    bulk = {"arrival": 0.0, "model": "chat", "size": 100, "output": 1000, "service": 2, "deadline": 3600, "priority": 2}
    live = {**bulk, "arrival": 1.0, "output": 20, "service": 0, "deadline": 10, "priority": 0}
    runs = list(yielded(prepare(make_trace([bulk, live]), fleet, seed=1), seed=1))
    assert [run.policy for run in runs] == [f"{placed}: {way}" for placed in PLACED for way in WAYS]
    for _, staying, evicted, going_on in (runs[:4], runs[4:]):
        assert (staying.attainment["live"], evicted.attainment["live"], going_on.attainment["live"]) == (0, 1, 1)
        assert staying.cost_usd < going_on.cost_usd < evicted.cost_usd
