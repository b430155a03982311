"""What tenants and classes may use, and whose held job is released next."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.classify import Constraints
from router.decide.fairness import FairOrder, HeldKind, Releasable, Shares, Tenants, day_of, kind_of
from tasks.settings import TREE
from tasks.topology import Tenant, load_topology
from taxiway.contract.keys import lengths_cell
from tests.narrowing import present

NOON = 1_700_006_400.0 + 43_200
DAY = day_of(NOON)
TOPOLOGY = msgspec.structs.replace(
    load_topology(TREE / "queues.yaml"),
    tenants={"lab": Tenant(usd_per_day=2.0), "edge": Tenant(classes=("cpu.batch",))},
)


@given(costs=st.lists(st.floats(0, 1), max_size=20))
def test_what_is_placed_between_two_readings_counts(costs: list[float]) -> None:
    tenants = Tenants({}, DAY, {})
    for number, cost in enumerate(costs):
        allowance = present(tenants.allowance("lab", TOPOLOGY, NOON))
        assert allowance.left == pytest.approx(2.0 - sum(costs[:number]))
        tenants.spend(allowance, cost)


def test_lengths_are_those_of_the_model_and_the_tenant() -> None:
    tenants = Tenants({lengths_cell("generate:1", "lab"): b'{"9": 3.5}'})
    assert tenants.lengths("generate:1", "lab") == {9: 3.5}
    assert tenants.lengths("generate:1", "other") == tenants.lengths("generate:2", "lab") == {}


def test_only_a_tenant_over_its_fair_share_is_held() -> None:
    shares = Shares({})
    for tenant, dollars in {"desk": 0.1, "shop": 1.0, "lab": 10.0}.items():
        shares.charge(tenant, dollars)
    assert {name for name in ("lab", "shop", "desk", "new") if shares.over_fair_share(name)} == {"lab"}
    assert {name for name in ("lab", "shop", "desk", "new") if shares.bypasses_holding(name)} == {"shop", "desk", "new"}
    alone = Shares({})
    alone.charge("lab", 10.0)
    assert not alone.over_fair_share("lab") and not alone.bypasses_holding("lab"), "what is held is its own"


def test_a_tenant_that_had_nothing_for_long_has_saved_up_little() -> None:
    shares = Shares({})
    shares.charge("shop", 0.001)
    shares.charge("lab", 10.0)
    given = 0
    while not shares.over_fair_share("shop"):
        shares.charge("shop", 0.1)
        given += 1
    assert given <= 10  # a dollar, not ten


@given(weight=st.integers(1, 8))
def test_tenants_that_flood_are_given_device_time_by_their_weights(weight: int) -> None:
    shares = Shares({"shop": Tenant(weight=weight)})
    had = {"lab": 0, "shop": 0}
    shares.charge("lab", 1.0)
    for _ in range(500):
        tenant = "lab" if shares.over_fair_share("shop") else "shop"
        shares.charge(tenant, 1.0)
        had[tenant] += 1
    assert had["shop"] == pytest.approx(weight * had["lab"], rel=0.15)


@given(had=st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100)), later=st.floats(0, 100))
def test_some_tenant_always_passes_and_time_alone_puts_none_over_its_share(had: dict[str, float], later: float) -> None:
    shares = Shares({})
    for tenant, dollars in had.items():
        shares.charge(tenant, dollars)
    before = {name for name in had if shares.over_fair_share(name)}
    shares.decay(later)
    assert not had or before < had.keys()
    assert not had or any(not shares.over_fair_share(name) for name in had)


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
    return Releasable(kind.queue, due, 3, 10, kind)


@given(kind=kinds)
def test_a_holding_queues_name_says_what_its_jobs_have_in_common(kind: HeldKind) -> None:
    assert kind_of(kind.queue) == kind


def test_a_queue_that_another_release_named_is_left_alone() -> None:
    assert kind_of("bulk|lab") is None


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
