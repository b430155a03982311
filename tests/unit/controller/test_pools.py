from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from controller.decide.pools import PodLoss, PoolRules, PoolState, PoolTrust, allot, cheapest_to_end, deletion_cost

RULES = PoolRules(stock_out=10, retry=30, hold=5)
STEP = 1.0
phases = st.sampled_from(["trusted", "out", "trial"])
trusts = st.builds(PoolTrust, phase=phases, since=st.floats(0, 100), failures=st.integers(1, 6))
seens = st.builds(
    PoolState,
    name=st.just("p"),
    asked=st.integers(0, 40),
    ready=st.integers(0, 40),
    short=st.floats(0, 30),
    most=st.integers(0, 40),
)
fleets = st.lists(st.tuples(seens, trusts), min_size=1, max_size=4)


@given(fleet=fleets, wanted=st.integers(0, 40), now=st.floats(100, 500))
def test_no_pool_has_more_than_it_may(fleet: list[tuple[PoolState, PoolTrust]], wanted: int, now: float) -> None:
    pools = [seen for seen, _ in fleet]
    given_ = allot(wanted, pools, [trust for _, trust in fleet], now, RULES)
    for seen, asked in zip(pools, given_.replicas, strict=True):
        assert 0 <= asked <= min(wanted, seen.most)


@given(fleet=fleets, wanted=st.integers(0, 40), now=st.floats(100, 500))
def test_all_that_pools_may_have_is_asked_for(
    fleet: list[tuple[PoolState, PoolTrust]], wanted: int, now: float
) -> None:
    pools = [replace(seen, most=1000) for seen, _ in fleet]
    allotted = allot(wanted, pools, [trust for _, trust in fleet], now, RULES)
    if any(one.phase == "trusted" for one in allotted.trusts) or all(one.phase == "out" for one in allotted.trusts):
        assert sum(allotted.replicas) >= wanted


@dataclass
class World:
    """Pools with so many nodes; a pod runs `START` seconds after it found one, and is reclaimed with its node."""

    START = 3.0

    asked: list[int]
    started: list[list[float]]
    short_since: list[float | None]
    trusts: list[PoolTrust]

    @classmethod
    def of(cls, pools: int) -> World:
        return cls([0] * pools, [[] for _ in range(pools)], [None] * pools, [PoolTrust()] * pools)

    def step(self, wanted: int, nodes: tuple[int, ...], now: float) -> tuple[int, ...]:
        """One look of the operator; how many pods are ready in each pool before it."""
        ready = []
        for index, capacity in enumerate(nodes):
            self.started[index] = self.started[index][: min(capacity, self.asked[index])]
            while len(self.started[index]) < min(capacity, self.asked[index]):
                self.started[index].append(now)
            lacking = self.asked[index] > capacity
            self.short_since[index] = (self.short_since[index] or now) if lacking else None
            ready.append(sum(now - at >= self.START for at in self.started[index]))
        seen = [
            PoolState(str(index), self.asked[index], ready[index], now - (self.short_since[index] or now))
            for index in range(len(nodes))
        ]
        allotted = allot(wanted, seen, self.trusts, now, RULES)
        self.asked, self.trusts = list(allotted.replicas), list(allotted.trusts)
        return tuple(ready)


def played(capacities: list[tuple[int, ...]], wanted: int, seconds: float) -> tuple[World, list[tuple[int, ...]]]:
    """A world in which pools have these nodes for `seconds` each, and the ready pods at each look."""
    world, now, looks = World.of(len(capacities[0])), 1.0, []
    for nodes in capacities:
        for _ in range(int(seconds / STEP)):
            looks.append(world.step(wanted, nodes, now))
            now += STEP
    return world, looks


@given(wanted=st.integers(1, 8))
def test_a_reclaimed_pool_is_replaced_within_its_time_and_gets_its_pods_back(wanted: int) -> None:
    world, looks = played([(8, 8)], wanted, 30)
    assert looks[-1] == (wanted, 0)
    world, looks = played([(8, 8), (0, 8)], wanted, 30)
    assert looks[-1] == (0, wanted)
    back = [one for one in looks[30:] if one[1] == wanted]
    assert len(back) >= 30 - RULES.stock_out - World.START - 3
    world, looks = played([(8, 8), (0, 8), (8, 8), (8, 8), (8, 8)], wanted, 40)
    assert looks[-1] == (wanted, 0)
    assert world.trusts[0].phase == "trusted"
    moved = looks.index((0, wanted))
    assert all(sum(one) >= wanted for one in looks[moved:]), "none goes before another serves"


def losing(running: int, warm: int, held: int, *, draining: bool = False) -> PodLoss:
    return PodLoss(running, ("m:1/v",) * warm, held, draining)


@given(running=st.integers(0, 64), warm=st.integers(0, 20), held=st.integers(0, 9))
def test_idle_pods_end_before_busy_and_cold_before_warm_ones(running: int, warm: int, held: int) -> None:
    cost = deletion_cost(losing(running, warm, held))
    assert deletion_cost(losing(running + 1, 0, 0)) > deletion_cost(losing(running, warm, held))
    assert deletion_cost(losing(running, warm + 1, held)) > cost
    assert deletion_cost(losing(running, warm, held, draining=True)) < deletion_cost(PodLoss())


pods = st.dictionaries(
    st.text("abc", min_size=1),
    st.builds(
        losing, running=st.integers(0, 2), warm=st.integers(0, 2), held=st.integers(0, 2), draining=st.booleans()
    ),
)


@given(pods=pods, count=st.integers(0, 5), data=st.data())
def test_pods_that_end_lose_no_more_than_any_that_stays(
    pods: dict[str, PodLoss], count: int, data: st.DataObject
) -> None:
    ready = data.draw(st.sets(st.sampled_from(sorted(pods)))) if pods else set()
    ending = cheapest_to_end(pods, ready, count)
    assert len(ending) == len(set(ending)) == min(count, len(pods))
    staying = pods.keys() - set(ending)
    for end in ending:
        for stay in staying:
            assert (deletion_cost(pods[end]), end in ready) <= (deletion_cost(pods[stay]), stay in ready)
