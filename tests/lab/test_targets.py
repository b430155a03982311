"""What the questions about policies say of figures: which targets hold, and which terms are worth nothing."""

from dataclasses import replace
from typing import Any

import pytest

from lab.ablations import TERMS, Term, Without
from lab.changes import simulate
from lab.fleet_file import parse_fleet, prepare
from lab.policies import Figure, targets
from lab.rows import synthetic_trace
from router.decide import placement
from simulator.policies.taxiway import Taxiway
from simulator.workload import Workload
from tests.lab.test_bound import MIXED

OURS = Figure("conv", 1.0, 17.0, "taxiway", live=0.95, standard=1.0, bulk=1.0, cost=11.0, bound=10.0)


@pytest.mark.cases("ours, other, holds")
def test_a_target_fails_where_a_baseline_is_as_good_and_cheaper_or_the_bound_far_below(
    ours: dict[str, Any], other: dict[str, Any] | None, holds: list[bool]
) -> None:
    figures = [replace(OURS, **ours), *([replace(OURS, **other)] if other else [])]
    assert [target.holds for target in targets("conv", figures)] == holds


def work() -> Workload:
    return prepare(synthetic_trace("poisson:rate=4,duration=20,seed=3", model="chat"), parse_fleet(MIXED), seed=1)


def test_the_model_without_nothing_decides_as_the_product() -> None:
    workload = work()
    shipped, same = Taxiway(workload), Without(workload, TERMS[0])
    assert simulate("t", workload, shipped, seed=1) == simulate("t", workload, same, seed=1)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_is_back_after_it_was_switched_off(term: Term) -> None:
    before = (placement.NEAR, placement.WARM_PREFERENCE)
    workload = work()
    with term.switched_off():
        found = simulate("t", workload, Without(workload, term), seed=1)
    assert found.requests == len(workload)
    assert before == (placement.NEAR, placement.WARM_PREFERENCE)
