"""A class on pools of nodes: the operator's decisions move its devices when nodes go, and back when they return."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.decide.pools import PoolRules
from simulator.device import SimulatedDevice
from simulator.engine import ANSWERED, DROPPED, RunSummary, Simulation, summarise
from simulator.fleet import FleetError, parse_fleet
from simulator.nodes import Nodes
from simulator.policies.taxiway import POLICIES
from simulator.pool import Pool
from simulator.traces import make_trace
from simulator.workload import prepare
from tests.builders import recorded

FLEET = recorded("fleets/pools.yaml")
RULES = PoolRules(stock_out=10, retry=30, hold=5)
GOES = "  - {at: 100, class: gpu, pool: first, available: 0}\n"
RETURNS = "  - {at: 200, class: gpu, pool: first, available: 4}\n"


class Watched(Simulation):
    """Notes after each second what serves in each pool, and what is thought of the first."""

    def watch(self) -> Pool:
        self.looks: list[tuple[float, int, int, str]] = []
        self.at(0.5, self._note, None, 0)
        self.run()
        return self.pools[0]

    def _note(self, device: SimulatedDevice | None, version: int, now: float) -> None:
        [pool] = self.pools
        assert pool.nodes is not None
        serving = [[one.available for one in pool.devices[start : start + 4]] for start in (0, 4)]
        self.looks.append((now, sum(serving[0]), sum(serving[1]), pool.nodes.trusts[0].phase))
        self.at(now + 1.0, self._note, None, 0)


def played(events: str, policy: str = "static", seconds: float = 400) -> Watched:
    fleet = parse_fleet(FLEET + (events or "  []"))
    rows = [{"arrival": at, "model": "m", "size": 1} for at in np.arange(0, seconds, 0.5)]
    workload = prepare(make_trace(rows), fleet, seed=1)
    engine = Watched(workload, POLICIES[policy](workload, 1), seed=1)
    engine.watch()
    return engine


def summary(engine: Simulation) -> RunSummary:
    return summarise("static", engine.workload, engine.outcome, engine.pools)


def test_devices_move_to_the_next_pool_when_nodes_go_and_back_when_they_return() -> None:
    engine = played(GOES + RETURNS)
    serving = {now: (first, second) for now, first, second, _ in engine.looks}
    assert serving[99.5] == (4, 0)
    assert serving[100.5] == (0, 0)
    assert serving[100.5 + RULES.stock_out + 5 + 2] == (0, 4)  # a look, until pods count as short, and a start
    assert serving[199.5] == (0, 4)
    assert serving[399.5] == (4, 0)
    assert all(first + second >= 4 for now, first, second, _ in engine.looks if 120 < now < 400)
    assert (engine.outcome.state == ANSWERED).all()


def test_devices_cost_what_their_nodes_cost() -> None:
    spot, both = summary(played("")), summary(played(GOES + RETURNS))
    assert spot.cost_usd == pytest.approx(4 * 400 / 3600, rel=0.02)
    assert spot.cost_usd * 1.4 < both.cost_usd < spot.cost_usd * 2


@settings(max_examples=12)
@given(
    nodes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8),
    period=st.sampled_from([3, 11, 40]),
    policy=st.sampled_from(["static", "taxiway"]),
)
def test_nodes_that_come_and_go_lose_no_request_and_pools_do_not_flap(
    nodes: list[tuple[int, int]], period: int, policy: str
) -> None:
    events = "".join(
        f"  - {{at: {10 + number * period}, class: gpu, pool: {name}, available: {count}}}\n"
        for number, counts in enumerate([*nodes, (4, 4)])  # jobs that no device takes would wait indefinitely
        for name, count in zip(("first", "second"), counts, strict=True)
    )
    engine = played(events, policy, seconds=100)
    assert set(np.unique(engine.outcome.state)) <= {ANSWERED, DROPPED}
    phases = [phase for _, _, _, phase in engine.looks]
    outs = sum(after == "out" != before for before, after in pairwise(phases))
    assert outs <= 1 + engine.now / (RULES.retry + RULES.stock_out)


def test_an_idle_device_ends_before_one_that_holds_a_model_or_runs() -> None:
    fleet = parse_fleet(FLEET + "  []")
    nodes, devices = Nodes(fleet.classes["gpu"]), [SimulatedDevice(number, 1e9) for number in range(8)]
    on, _ = nodes.spread(3, devices, 1.0)
    for device in on:
        device.switch_on(1.0)
        device.serving = True
    on[0].resident[0] = on[2].resident[0] = on[2].resident[1] = None  # type: ignore[assignment]  # only counted
    assert nodes.spread(2, devices, 2.0) == ([], [on[1]])
    on[1].switch_off(2.0)
    assert nodes.spread(1, devices, 3.0) == ([], [on[0]])


@pytest.mark.parametrize("event", ["available: 0", "pool: third, reclaimed: true", "pool: first, slower: 2"])
def test_an_event_of_nodes_names_a_pool(event: str) -> None:
    with pytest.raises(FleetError, match=r"events\[0\].pool"):
        parse_fleet(f"{FLEET}  - {{at: 1, class: gpu, {event}}}")
