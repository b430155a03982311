"""Which batches a router takes."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.access import Bodies
from api.objects.batch_runner import BatchRunner, Desk
from api.objects.batch_turns import TURN_SECONDS, LineWindow, OpenBatch, next_batches
from tasks.document import Size
from tasks.queues.limits import Limits
from tasks.settings import TREE
from tasks.topology import parse_topology
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, TaxiwayError, UnknownObjectError


class OneOpenBatch:
    """Objects whose only batch cannot be read, for this reason."""

    def __init__(self, reason: TaxiwayError) -> None:
        self.open = [("batch_1", "lab")]
        self._reason = reason

    async def open_batches(self) -> list[tuple[str, str]]:
        return self.open

    async def get(self, *_: Any) -> bytes:
        raise self._reason

    async def close_batch(self, name: str, tenant: str, ended: float) -> None:
        self.open.remove((name, tenant))


@pytest.mark.parametrize(
    ("reason", "left"),
    [
        pytest.param(BrokerUnavailableError("the state store does not answer"), 1, id="unavailable"),
        pytest.param(UnknownObjectError("no batch 'batch_1' is known"), 0, id="deleted"),
    ],
)
async def test_a_batch_that_cannot_be_read_stays_open_unless_it_was_deleted(reason: TaxiwayError, left: int) -> None:
    objects = OneOpenBatch(reason)

    unused = cast(Any, None)
    router = SimpleNamespace(leaving=False, store=SimpleNamespace(clock=SimpleNamespace(now=lambda: 1.0)))
    runner = BatchRunner(Desk(cast(Any, router), unused, cast(Any, objects), unused, unused, LineWindow(1)))
    with suppress(BrokerUnavailableError):
        await runner._look()
    await asyncio.gather(*runner._tasks.values())
    assert len(objects.open) == left


def test_a_running_line_counts_as_a_body_of_its_tenant_and_its_answer_until_it_is_written() -> None:
    unused = cast(Any, None)
    limits = Limits(payload=Size(100), bodies=Size(250), all_bodies=Size(400))
    bodies = Bodies(msgspec.structs.replace(parse_topology((TREE / "queues.yaml").read_text()), limits=limits))
    lines = LineWindow(1000)
    desk = Desk(unused, unused, unused, unused, bodies, lines)
    assert [desk.begins("lab", 100, 10) for _ in range(3)] == [True, True, False]
    assert [desk.begins("shop", 100, 10) for _ in range(3)] == [True, True, False]
    with pytest.raises(FleetUnavailable, match="all_bodies"):
        bodies.take("press", 1)
    desk.ended("lab", 100, 10, 889)
    bodies.take("press", 1)
    assert not desk.begins("lab", 1, 1)
    lines.add("lab", -889)
    assert not desk.begins("lab", 1, 890)
    assert desk.begins("lab", 1, 889)


NOW = 1000.0
TENANTS = ("lab", "shop", "press", "slow")
batches = st.lists(
    st.tuples(st.sampled_from(TENANTS), st.booleans(), st.floats(NOW - 2 * TURN_SECONDS, NOW)), max_size=12
).map(lambda found: [OpenBatch(f"batch-{n}", *one) for n, one in enumerate(found)])


def test_a_batch_that_would_begin_again_does_not_give_way_after_its_turn() -> None:
    working, waiting = OpenBatch("a", "lab", True, NOW - TURN_SECONDS), OpenBatch("b", "shop", False, NOW)
    assert next_batches([working, waiting], NOW, 1) == ["b"]
    assert next_batches([replace(working, loses=True), waiting], NOW, 1) == ["a"]


@given(batches, st.integers(1, 6))
def test_no_tenant_has_two_more_than_one_that_waits(batches: list[OpenBatch], most: int) -> None:
    chosen = next_batches(batches, NOW, most)
    assert len(chosen) == len(set(chosen)) == min(most, len(batches))
    tenants = {one.name: one.tenant for one in batches}
    have = Counter(tenants[name] for name in chosen)
    for tenant in {one.tenant for one in batches if one.name not in chosen}:
        assert max(have.values()) <= have[tenant] + 1


@given(batches, st.integers(1, 6))
def test_no_batch_is_left_for_a_younger_one_of_its_tenant(batches: list[OpenBatch], most: int) -> None:
    chosen = next_batches(batches, NOW, most)
    for tenant in TENANTS:
        order = sorted((one for one in batches if one.tenant == tenant), key=lambda one: not one.working)
        kept = [one.name in chosen for one in order]
        assert kept.count(True) >= sum(one.working for one in order) or not all(kept)
        waiting = [one.name in chosen for one in order if not one.working]
        assert waiting == sorted(waiting, reverse=True)


@given(st.integers(1, 12), st.integers(1, 5))
def test_every_tenant_gets_a_turn_before_any_gets_its_second(tenants: int, most: int) -> None:
    since, working, had = dict.fromkeys(range(tenants), 0.0), set[str](), Counter[str]()
    for turn in range(-(-tenants // most)):
        now = turn * TURN_SECONDS
        found = [OpenBatch(str(n), str(n), str(n) in working, since[n]) for n in range(tenants)]
        chosen = set(next_batches(found, now, most))
        since |= {n: now for n in since if (str(n) in chosen) != (str(n) in working)}
        had.update(chosen - working)
        working = chosen
    assert set(had) == {str(n) for n in range(tenants)}


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 40) | st.just(1000)), max_size=60))
def test_lines_of_all_tenants_fit_the_window_but_for_one_line_of_each(lines: list[tuple[str, int]]) -> None:
    window, held = LineWindow(100), Counter[str]()
    window.tenants = len(TENANTS)
    for tenant, size in lines:
        if window.fits(tenant, size):
            window.add(tenant, size)
            held[tenant] += size
        else:
            assert held[tenant]
    for tenant, size in lines:
        assert held[tenant] <= max(100 // len(TENANTS), max(one for name, one in lines if name == tenant))
        if size == held[tenant] == 1000:
            window.add(tenant, -size)
            assert window.fits(tenant, 1)
