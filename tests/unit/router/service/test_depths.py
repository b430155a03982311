"""Who may not add to what waits already."""

import pytest

from api.routing.router import check_store
from router.decide.fairness import Depths, check_limits, depths_from
from router.service.store import RouterStore
from tasks.queues.limits import Limits
from tasks.topology import Topology, parse_topology
from taxiway.contract.keys import held_cell, jobs_cell, work_cell
from taxiway.errors import BrokerFullError, BrokerUnavailableError, OverloadedError, RequestTooLargeError
from tests.builders import recorded

TOPOLOGY = recorded("documents/depths.yaml")
CELLS = {
    work_cell("cpu.batch", 1): 2.5,
    jobs_cell(work_cell("cpu.batch", 1)): 4.0,
    jobs_cell(work_cell("cpu.batch", 3)): 2.0,
    jobs_cell(held_cell("cpu.batch", 1)): 3.0,
    "rows|cpu.batch|echo:1": 100.0,
}


@pytest.fixture(scope="module")
def topology() -> Topology:
    return parse_topology(TOPOLOGY)


def check_class(depths: Depths, topology: Topology, name: str, size: int) -> None:
    check_limits(f"hardware.{name}", topology.hardware[name], size=size, depth=depths.classes.get(name, 0))


def check_tenant(depths: Depths, topology: Topology, name: str, size: int) -> None:
    check_limits(f"tenants.{name}", topology.rules_of(name), size=size, depth=depths.tenants.get(name, 0))


def test_a_class_takes_as_many_jobs_as_it_may(topology: Topology) -> None:
    depths = depths_from(CELLS, {"lab": 2.0}, 0.0)
    check_class(depths, topology, "cpu.batch", 1024)
    depths.count("cpu.batch", "somebody")
    with pytest.raises(OverloadedError, match=r"hardware\.cpu\.batch\.max_depth") as raised:
        check_class(depths, topology, "cpu.batch", 10)
    assert raised.value.retry_after
    check_class(Depths({"cpu.free": 1e6}), topology, "cpu.free", 10**6)


def test_a_tenant_has_as_many_jobs_as_it_may_and_no_larger_ones(topology: Topology) -> None:
    depths = depths_from(CELLS, {"lab": 2.0}, 0.0)
    check_tenant(depths, topology, "lab", 100)
    check_tenant(Depths(tenants={"other": 1e6}), topology, "other", 10**6)
    with pytest.raises(RequestTooLargeError, match=r"tenants\.lab\.payload"):
        check_tenant(depths, topology, "lab", 101)
    depths.count("cpu.batch", "lab")
    with pytest.raises(OverloadedError, match=r"tenants\.lab\.max_depth"):
        check_tenant(depths, topology, "lab", 1)


@pytest.mark.parametrize(
    ("depths", "message", "resource"),
    [
        (Depths(used=0.91), "91%", "memory"),
        (depths_from(CELLS, {"lab": 2.0}, 0.0, refuses=True), "cannot write to its disk", "disk"),
    ],
)
def test_a_store_without_room_takes_nothing(topology: Topology, depths: Depths, message: str, resource: str) -> None:
    check_store(Depths(used=0.89), topology)
    with pytest.raises(BrokerFullError, match=message) as raised:
        check_store(depths, topology)
    assert raised.value.retry_after
    assert raised.value.details["resource"] == resource


def test_nothing_is_accepted_before_the_stores_time_is_known() -> None:
    with pytest.raises(BrokerUnavailableError, match="is not known yet"):
        RouterStore("redis://127.0.0.1:1/0", Limits()).clock.stored_now()
