"""`python -m lab.compare`: every policy on a trace, beside the bounds."""

from lab.baselines import EVERY_POLICY
from lab.compare import compared
from lab.trials.trial import TRIALS


def test_every_policy_and_both_bounds_are_compared_and_no_score_is_below_them() -> None:
    edge = TRIALS["edge"]
    *runs, least, whole = compared(edge.workload(edge.trace(7).at_load(0.02, seed=1)), seed=1)
    assert [run.policy for run in runs] == [*EVERY_POLICY]
    assert (least.policy, whole.policy) == ("lp-bound", "whole-bound")
    assert min(run.score for run in runs) >= max(least.score, whole.score)
