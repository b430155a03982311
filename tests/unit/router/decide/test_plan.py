"""A plan: where a cell's requests go while classes change, and that it crosses the store unchanged."""

import msgspec
import pytest

from router.decide.plan import (
    NO_PLAN,
    PLAN_AT_MOST,
    STALE,
    Cell,
    ClassPlan,
    Density,
    Depth,
    Handover,
    Plan,
    follow,
    preferred_class,
)

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


NO_RULE = b'{"number":1,"made":0,"cells":[],"classes":{"a":{"devices":1,"rule":{"type":"depth","jobs":0}}}}'
STORED = msgspec.json.encode(Plan(number=3, made=50.0, cells=(MOVING,), classes={}))


def test_a_stored_plan_is_followed_until_it_is_stale() -> None:
    followed = follow(STORED, 60.0)
    assert followed.plan is not None
    assert followed.plan.number == 3
    again = follow(STORED, 51.0 + STALE, followed)
    assert (again.plan, again.stored) == (None, followed.plan)
    assert again.why == "plan 3 is stale (older than 600 s)"
    assert follow(b"", 60.0, followed) == NO_PLAN


@pytest.mark.parametrize(
    "raw", [b"{", b"{}", b"x" * (PLAN_AT_MOST + 1), STORED.replace(b'["new","old"]', b"[]"), NO_RULE]
)
def test_a_plan_that_cannot_be_read_is_not_followed(raw: bytes) -> None:
    followed = follow(raw, 60.0)
    assert followed.plan is None
    assert followed.why.startswith("the stored plan cannot be read: ")
    assert follow(raw, 61.0, followed).why == followed.why
