from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.valkey.forwarding import HoldingQueue
from router.decide.classify import Constraints
from router.decide.fairness import FairOrder, HeldKind, Releasable, kind_of
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


def held(tenant: str, due: float = 1e10, model: str = "m:1") -> Releasable:
    kind = HeldKind(tenant, model, Constraints())
    return Releasable(HoldingQueue(kind.queue, due, level=3, jobs=10), kind)


@given(kind=kinds)
def test_a_holding_queues_name_says_what_its_jobs_have_in_common(kind: HeldKind) -> None:
    assert kind_of(kind.queue) == kind


@given(kind=kinds, other=kinds)
def test_jobs_of_unlike_kinds_are_held_apart(kind: HeldKind, other: HeldKind) -> None:
    assert (kind.queue == other.queue) == (kind == other)


def test_a_queue_that_another_release_named_is_left_alone() -> None:
    assert kind_of("bulk|lab") is None


def test_a_tenants_own_jobs_leave_by_deadline() -> None:
    order = FairOrder({})
    order.set_present(["lab"])
    assert order.next([held("lab", due=20.0), held("lab", due=10.0, model="n:1")]).queue.due == 10.0


@given(weight=st.integers(1, 8), steps=st.integers(100, 300))
def test_tenants_have_device_time_in_proportion_to_their_weights(weight: int, steps: int) -> None:
    order = FairOrder({"shop": Tenant(weight=weight)})
    order.set_present(["lab", "shop"])
    had = {"lab": 0, "shop": 0}
    for _ in range(steps):
        tenant = order.next([held("lab"), held("shop")]).kind.tenant
        order.charge(tenant, 1.0)
        had[tenant] += 1
    assert had["shop"] == pytest.approx(weight * had["lab"], abs=weight + 1)


def test_a_tenant_that_comes_back_has_saved_up_no_turns() -> None:
    order = FairOrder({})
    order.set_present(["lab"])
    order.charge("lab", 100.0)
    order.set_present(["lab", "shop"])
    order.charge("shop", 1.0)
    assert order.next([held("lab"), held("shop")]).kind.tenant == "lab"
