from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.valkey.holding import Line
from router.decide.classify import Constraints
from router.decide.fairness import FairOrder, HeldKind, Turn, kind_of
from tasks.topology import Tenant

names = st.text(min_size=1, max_size=12)
kinds = st.builds(
    HeldKind,
    tenant=names,
    model=names,
    constraints=st.builds(
        Constraints,
        service=names,
        locality=st.none() | names,
        min_accuracy=st.none() | st.floats(0, 1),
        preemptible=st.booleans(),
        classes=st.none() | st.lists(names, min_size=1).map(tuple),
    ),
)


def turn(tenant: str, due: float = 1e10, model: str = "m:1") -> Turn:
    kind = HeldKind(tenant, model, Constraints())
    return Turn(Line(kind.queue, due, level=3, jobs=10), kind)


@given(kind=kinds)
def test_a_holding_queues_name_says_what_its_jobs_have_in_common(kind: HeldKind) -> None:
    assert kind_of(kind.queue) == kind


@given(kind=kinds, other=kinds)
def test_jobs_of_unlike_kinds_are_held_apart(kind: HeldKind, other: HeldKind) -> None:
    assert (kind.queue == other.queue) == (kind == other)


def test_a_queue_that_another_release_named_is_left_alone() -> None:
    assert kind_of("bulk|lab") is None


def test_a_tenants_own_jobs_leave_by_deadline() -> None:
    turns = FairOrder({})
    turns.set_present(["lab"])
    assert turns.next([turn("lab", due=20.0), turn("lab", due=10.0, model="n:1")]).line.due == 10.0


@given(weight=st.integers(1, 8), steps=st.integers(100, 300))
def test_tenants_have_device_time_in_proportion_to_their_weights(weight: int, steps: int) -> None:
    turns = FairOrder({"shop": Tenant(weight=weight)})
    turns.set_present(["lab", "shop"])
    had = {"lab": 0, "shop": 0}
    for _ in range(steps):
        tenant = turns.next([turn("lab"), turn("shop")]).kind.tenant
        turns.charge(tenant, 1.0)
        had[tenant] += 1
    assert had["shop"] == pytest.approx(weight * had["lab"], abs=weight + 1)


def test_a_tenant_that_comes_back_has_saved_up_no_turns() -> None:
    turns = FairOrder({})
    turns.set_present(["lab"])
    turns.charge("lab", 100.0)
    turns.set_present(["lab", "shop"])
    turns.charge("shop", 1.0)
    assert turns.next([turn("lab"), turn("shop")]).kind.tenant == "lab"
