"""Which running jobs yield, whatever waits and runs."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from router.decide.moves.preempt import SWITCH, Occupant, Waiter, late_rates, penalty, preempt
from tasks.topology import HardwareClass, Planning, Price, Service, Topology

MOST = 2
SECONDS = st.floats(0, 100)
DOLLARS = st.floats(0, 1)
WAITERS = st.lists(
    st.builds(Waiter, st.integers().map(str), SECONDS, SECONDS, DOLLARS), max_size=6, unique_by=lambda one: one.job
)
OCCUPANT = st.builds(
    Occupant,
    job=st.integers().map(str),
    token=st.just("w#1"),
    left=SECONDS,
    redo=st.floats(0, 5),
    due=st.one_of(st.floats(-10, 1000), st.just(math.inf)),
    penalty=DOLLARS,
    price=st.floats(0, 0.01),
    cuts=st.integers(0, 3),
)
OCCUPANTS = st.lists(OCCUPANT, max_size=6, unique_by=lambda one: one.job)
LIVE = Waiter("live", left=2.0, run=1.0, penalty=0.01)
BULK = Occupant("bulk", "w#1", left=30.0, redo=0.2, due=3600.0, penalty=0.1, price=1e-5, cuts=0)


@given(WAITERS, OCCUPANTS)
def test_a_job_yields_to_one_that_is_worth_more_and_neither_in_vain_nor_too_often_nor_late_for_one_that_is_not(
    waiters: list[Waiter], occupants: list[Occupant]
) -> None:
    assert preempt(waiters, occupants, most=0) == []
    yields = preempt(waiters, occupants, most=MOST)
    assert len({one.occupant.job for one in yields}) == len({one.waiter.job for one in yields}) == len(yields)
    for one in yields:
        assert one.occupant in occupants
        assert one.waiter in waiters
        assert one.occupant.loss(one.waiter) < one.waiter.loss(math.inf) == one.waiter.penalty
        assert one.waiter.left - one.waiter.run >= SWITCH
        assert one.occupant.left > SWITCH
        assert one.occupant.cuts < MOST
        again = one.occupant.left + one.occupant.redo + SWITCH + one.waiter.run
        assert again < one.occupant.due or one.occupant.penalty < one.waiter.penalty


@given(WAITERS, OCCUPANTS, st.data())
def test_the_order_does_not_matter(waiters: list[Waiter], occupants: list[Occupant], data: st.DataObject) -> None:
    again = preempt(data.draw(st.permutations(waiters)), data.draw(st.permutations(occupants)), most=MOST)
    assert again == preempt(waiters, occupants, most=MOST)


@given(OCCUPANT, st.floats(0, 1000))
def test_a_job_is_worth_more_the_closer_its_deadline(occupant: Occupant, sooner: float) -> None:
    assume(math.isfinite(occupant.due))
    closer = replace(occupant, due=occupant.due - sooner)
    assert closer.loss(LIVE) >= occupant.loss(LIVE)


@given(st.floats(1, 86400), st.floats(1, 86400), st.floats(0, 60), st.integers(1, 200))
def test_a_bulk_job_is_in_time_beside_endless_live_work(due: float, left: float, redo: float, arrivals: int) -> None:
    """Live jobs come one after another to a single slot; whoever yields goes on when the live job is answered."""
    assume(left <= due)
    job, now = replace(BULK, due=due, left=left, redo=redo), 0.0
    for _ in range(arrivals):
        decided = preempt([LIVE], [job], most=MOST)
        if not decided:
            break
        now += SWITCH + LIVE.run + job.redo
        job = replace(job, due=due - now, cuts=job.cuts + 1)
    assert job.cuts <= MOST
    assert now + job.left <= due


@given(WAITERS, OCCUPANTS, st.floats(0, 10))
def test_a_job_is_worth_more_the_longer_it_waits(waiters: list[Waiter], occupants: list[Occupant], more: float) -> None:
    for waiter in waiters:
        assert waiter.loss(1.0) <= waiter.loss(1.0 + more) <= waiter.penalty


def test_the_slot_that_is_free_next_is_left_to_one_and_only_one() -> None:
    second = replace(LIVE, job="second")
    decided = preempt([LIVE, second], [replace(BULK, job="soon", left=SWITCH), BULK], most=MOST)
    assert [(one.waiter, one.occupant) for one in decided] == [(second, BULK)]


def test_the_cheapest_yields_and_the_reason_says_what_it_costs() -> None:
    far = replace(BULK, job="far", redo=0.1)
    (one,) = preempt([LIVE], [BULK, far], most=MOST)
    assert one.occupant == far
    assert one.reason == (
        "yields to live, which would wait 30 s, must start within 1 s and costs 0.01 USD if it is late; "
        "this costs 3.9e-05 USD (0.1 s to repeat)"
    )


def test_what_lateness_costs_goes_by_level_unless_the_plan_says_it_of_a_service() -> None:
    services = {"live": Service(deadline=0.25, priority="high"), "bulk": Service(deadline=3600.0, priority="low")}
    hardware = {"c": HardwareClass(device="cpu", runtimes=("echo",), price=Price(usd_per_hour=1.0))}
    topology = Topology(hardware=hardware, service=services, default_service="live")
    assert late_rates(topology) == (48.0, 24.0, 12.0, 12.0)
    planning = Planning(late_usd_per_hour={"live": 90.0})
    assert late_rates(msgspec.structs.replace(topology, plan=planning))[0] == 90.0
    assert penalty(36.0, 100.0) == 1.0
