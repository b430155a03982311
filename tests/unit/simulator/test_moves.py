"""Waiting work in the simulator: queues, holding and the rebalancer, by the router's own functions."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from simulator.class_queue import SimulatedQueue
from simulator.engine import ANSWERED, DROPPED, REFUSED, OutcomeColumns, Simulation
from simulator.policies.policy import Policy, Shift
from simulator.policies.routing import ExpectedBatch
from simulator.policies.taxiway import Taxiway
from simulator.pool import Pool
from simulator.workload import SimulatedJob, Workload, jobs
from tests.builders import recorded
from tests.unit.simulator.test_engine import chat

TWINS = recorded("fleets/twins.yaml")


def workload(requests: Sequence[dict[str, Any]], *, horizon: float, price: float = 1, moves: int = 2) -> Workload:
    """Requests of a second each, for two devices of two classes; the second's `price` is in dollars an hour."""
    text = TWINS.replace("HORIZON", str(horizon)).replace("PRICE", str(price)).replace("MOVES", str(moves))
    rows = [{"size": 1_000_000, "priority": 1, "deadline": 1000.0} | request for request in requests]
    return prepare(make_trace(rows), parse_fleet(text), seed=1)


def some_jobs(*terms: tuple[int, float]) -> list[SimulatedJob]:
    """Jobs of these priorities (2 is low) and deadlines."""
    rows = [
        {"arrival": float(n), "model": "m", "size": 1, "priority": priority, "deadline": deadline}
        for n, (priority, deadline) in enumerate(terms)
    ]
    return list(jobs(workload(rows, horizon=1)))


STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 2), st.booleans()), max_size=30)


@pytest.mark.parametrize("order", ["level", "deadline"])
@given(steps=STEPS)
def test_a_queue_serves_each_model_in_order_and_any_job_may_leave(
    order: Any, steps: list[tuple[int, int, int, bool]]
) -> None:
    def key(job: SimulatedJob) -> float:
        return job.level if order == "level" else job.arrival + job.deadline

    queue, inside = SimulatedQueue(order), list[SimulatedJob]()
    made = some_jobs(*((level, due) for level, due, _, _ in steps)) if steps else []
    for (_, _, model, leaves), job in zip(steps, made, strict=True):
        job.model = model
        queue.push(job)
        inside.append(job)
        if leaves:
            queue.take(inside.pop(len(inside) // 2))
    served = sorted(inside, key=lambda job: (key(job), job.index))
    assert len(queue) == len(inside)
    for model in range(3):
        assert queue.front(model, 99) == [job for job in served if job.model == model]
    firsts = [next(job for job in served if job.model == model) for model in {job.model for job in served}]
    assert queue.heads() == sorted(firsts, key=lambda job: (key(job), job.index))
    assert order == "deadline" or list(queue.back(99)) == sorted(inside, key=lambda job: (job.level, -job.index))


class Watched(Taxiway):
    """The router's policy; `deepest` is the most jobs that a class's queue had at a look."""

    deepest = 0

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        yield from super().look(pools, now)
        self.deepest = max(self.deepest, *(pool.waiting for pool in pools))


class OnOneClass(Watched):
    """The router's policy, but that all is placed on the first class."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        self._reader.count(job, self._count(job, pools[0], None))
        return 0


MINUTE = [{"arrival": 0.01 * n, "model": "m"} for n in range(60)]
"""A minute of work that any class can do."""


def play(work: Workload, policy: Policy) -> OutcomeColumns:
    return Simulation(work, policy, seed=1).run()


def test_jobs_wait_bound_to_nothing_beyond_the_horizon_and_all_are_answered() -> None:
    work = workload(MINUTE, horizon=5)
    policy = Watched(work)
    outcome = play(work, policy)
    assert (outcome.state == ANSWERED).all()
    assert 4 <= policy.deepest <= 7
    assert float(outcome.latency.max()) < 33  # the devices were never idle meanwhile


def test_what_is_held_past_its_deadline_is_turned_away() -> None:
    late = [{"arrival": 0.5, "model": "m", "deadline": 20.0} for _ in range(60)]
    outcome = play(work := workload(MINUTE + late, horizon=2), Taxiway(work))
    assert set(np.unique(outcome.state)) <= {ANSWERED, DROPPED, REFUSED}
    assert (outcome.state != ANSWERED).any()


@pytest.mark.parametrize(
    ("terms", "moves", "longest"),
    [
        ({}, (20, 40), (0, 36)),  # what one class has too much of is levelled with an idle one
        ({"price": 0.1}, (46, 120), (0, 120)),  # back from a dear class to a cheap one, and levelled no more
        ({"moves": 0}, (0, 0), (59, 120)),  # forbidden
    ],
)
def test_waiting_work_is_levelled(terms: dict[str, Any], moves: tuple[int, int], longest: tuple[float, float]) -> None:
    work = workload(MINUTE, horizon=1000, **terms)
    outcome = play(work, OnOneClass(work))
    assert (outcome.state == ANSWERED).all()
    assert moves[0] <= outcome.moves <= moves[1]
    assert longest[0] < float(outcome.latency.max()) < longest[1]


def test_company_is_of_usual_size() -> None:
    work = chat(rate=50, duration=40)
    expected_batch = ExpectedBatch()
    known = list(jobs(work))
    for job in known:
        expected_batch.observe(job)
    mean = np.mean([(job.alone, job.crowding) for job in known], axis=0)
    able = np.isfinite(mean)
    assert expected_batch.typical(0)[able] == pytest.approx(mean[able], rel=0.2)
