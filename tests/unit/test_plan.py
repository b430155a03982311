"""A plan: where a cell's requests go while classes change, and that it crosses the store unchanged."""

from __future__ import annotations

import msgspec

from router.decide.plan import STALE, Cell, ClassPlan, Handover, Plan, preferred_class
from router.decide.scaling_rule import Density, Depth

MOVING = Cell(
    model="m", service="live", classes=("new", "old"), handover=Handover(former="old", devices=2, latest=100.0)
)


def test_a_cell_that_moves_stays_until_its_new_class_serves() -> None:
    assert preferred_class(MOVING, {"old": 3, "new": 1}, 50.0) == "old"
    assert preferred_class(MOVING, {"old": 3, "new": 2}, 50.0) == "new"
    assert preferred_class(MOVING, {"old": 3}, 100.5) == "new"


def test_a_plan_crosses_the_store_unchanged_and_becomes_stale() -> None:
    classes = {"new": ClassPlan(rule=Density(target=0.8), devices=2), "old": ClassPlan(rule=Depth(jobs=4), devices=0)}
    plan = Plan(number=3, made=50.0, cells=(MOVING,), classes=classes, score=1.5)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    assert plan.cell("m", "live") == MOVING
    assert plan.cell("m", "bulk") is None
    assert not plan.stale(50.0 + STALE)
    assert plan.stale(51.0 + STALE)
