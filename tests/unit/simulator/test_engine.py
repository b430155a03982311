"""Runs of the simulator: queues, batches, endpoints, faults and moves."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.baselines import DeadlineOrder
from lab.changes import simulate
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace, synthetic_trace
from simulator.class_queue import SimulatedQueue
from simulator.engine import ANSWERED, DROPPED, REFUSED, WAITING, OutcomeColumns, Simulation, StuckError, summarise
from simulator.fleet import Fleet
from simulator.policies.policy import Policy, Shift
from simulator.policies.routing import ExpectedBatch
from simulator.policies.taxiway import POLICIES, Taxiway
from simulator.pool import Pool
from simulator.workload import SimulatedJob, Workload, jobs
from tests.builders import recorded

FLEET = recorded("fleets/engine.yaml")
QUEUE = recorded("fleets/queue.yaml")


def fleet() -> Fleet:
    return parse_fleet(FLEET)


def chat(rate: float = 6, duration: float = 200, seed: int = 3) -> Workload:
    return prepare(
        synthetic_trace(f"poisson:rate={rate},duration={duration},seed={seed}", model="chat"), fleet(), seed=1
    )


def engine(name: str, workload: Workload, seed: int = 1) -> Simulation:
    return Simulation(workload, POLICIES[name](workload, seed), seed=seed)


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_exactly_once_and_all_devices_go_off(name: str) -> None:
    ends_once(engine(name, chat()))


def ends_once(run: Simulation) -> None:
    outcome = run.run()
    assert set(np.unique(outcome.state)) <= {ANSWERED, DROPPED, REFUSED}
    for pool in run.pools:
        assert (pool.waiting, pool.running, sum(pool.queued)) == (0, 0, 0)
        assert all(device.on_since is None and device.run is None for device in pool.devices)
        assert all(device.busy <= device.powered + 1e-6 for device in pool.devices)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_seed_gives_the_same_run(name: str) -> None:
    workload = chat(duration=60)
    first, again = (simulate(name, workload, POLICIES[name](workload, 5), seed=5) for _ in range(2))
    assert first == again


def test_devices_fail_and_their_jobs_are_answered_all_the_same() -> None:
    run = engine("static", chat(rate=3, duration=2000))
    outcome = run.run()
    sessions = sum(device.session for device in run.pools[1].devices)
    assert sessions > 10
    bulk = outcome.state[run.workload.trace.service == 2]
    assert (bulk == ANSWERED).mean() > 0.99


def test_the_mean_wait_of_one_server_is_that_of_theory() -> None:
    random = np.random.default_rng(4)
    arrivals = np.cumsum(random.exponential(1.0, 15_000))
    sizes = random.exponential(700_000, 15_000)
    rows = [{"arrival": a, "model": "m", "size": round(s)} for a, s in zip(arrivals, sizes, strict=True)]
    workload = prepare(make_trace(rows), parse_fleet(QUEUE), seed=1)
    outcome = engine("static", workload).run()
    rho, service = 0.7, 0.7
    assert float(outcome.latency.mean()) == pytest.approx(service / (1 - rho), rel=0.05)  # M/M/1
    assert float(np.median(outcome.latency)) == pytest.approx(math.log(2) * service / (1 - rho), rel=0.05)


def burst(*deadlines: float) -> Workload:
    rows: list[dict[str, Any]] = [
        {"arrival": 0.001 * number, "model": "m", "size": 1_000_000, "deadline": deadline, "priority": 1}
        for number, deadline in enumerate(deadlines)
    ]
    return prepare(make_trace(rows), parse_fleet(QUEUE), seed=1)


def test_a_request_that_waited_past_its_deadline_is_dropped_and_costs_nothing() -> None:
    outcome = engine("static", burst(5, 0.5, 5)).run()
    assert outcome.state.tolist() == [ANSWERED, DROPPED, ANSWERED]
    assert float(outcome.latency[2]) == pytest.approx(2.0, abs=0.01)


def test_models_that_do_not_fit_together_take_turns() -> None:
    document = FLEET.replace("cores: {count: 2,", "cores: {count: 1, minimum: 1, initial: 1,")
    for models, expected in ((["embed"] * 20, 0.011), (["embed", "rank"] * 10, 0.511)):
        rows = [{"arrival": 2.0 * n, "model": name, "size": 10, "priority": 0} for n, name in enumerate(models)]
        workload = prepare(make_trace(rows), parse_fleet(document), seed=1)
        latency = engine("static", workload).run().latency
        assert latency[2::2] == pytest.approx(expected, abs=1e-4)


PROVIDER = FLEET.replace(
    "  cores:",
    """  provider: {count: 1, minimum: 1, initial: 1, endpoint: true, memory: 80GiB, start: 0, max_batch: 64,
             price: {usd_per_million_input: 0.5, usd_per_million_output: 1.5, usd_per_request: 0.0001},
             rate: {requests_per_minute: 60},
             roofline: {peak_flops: 9.9e+14, bandwidth: 3.3e+12, host_link: 3.0e+10}}
  cores:""",
)


@pytest.mark.parametrize("name", ["per-request", "static"])
def test_an_endpoint_is_paid_by_use_and_never_sent_more_than_its_rate_allows(name: str) -> None:
    trace = synthetic_trace("poisson:rate=4,duration=60,seed=3", model="chat")
    run = engine(name, prepare(trace, parse_fleet(PROVIDER), seed=1))
    outcome = run.run()
    provider = run.pools[2]
    sent = provider.metered_requests
    assert 0 < sent <= 60 + trace.arrival[-1] + 300
    assert provider.metered >= 0.0001 * sent
    summary = summarise(name, run.workload, outcome, run.pools)
    assert summary.usd_by_class["provider"] == pytest.approx(provider.metered)


HANGS = recorded("fleets/hangs.yaml")


@pytest.mark.timeout(60)
def test_a_wait_for_an_endpoint_s_rate_ends_although_it_is_rounded() -> None:
    trace = synthetic_trace("poisson:rate=2,duration=120,seed=2", model="chat")
    run = engine("static", prepare(trace, parse_fleet(HANGS), seed=1))
    assert (run.run().state != WAITING).all()


def test_a_simulation_whose_time_does_not_advance_is_an_error_that_says_where() -> None:
    run = engine("static", prepare(synthetic_trace("poisson:rate=1,duration=9", model="chat"), fleet(), seed=1))

    def again(device: object, version: int, now: float) -> None:
        run.at(now, again, None, 0)

    run.at(3.0, again, None, 0)
    with pytest.raises(StuckError, match=r"does not advance: 100000 events at 3 s, the last .*again"):
        run.run()


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


@pytest.mark.parametrize("form", [SimulatedQueue, DeadlineOrder])
@given(steps=STEPS)
def test_a_queue_serves_each_model_in_order_and_any_job_may_leave(
    form: type[SimulatedQueue], steps: list[tuple[int, int, int, bool]]
) -> None:
    def key(job: SimulatedJob) -> float:
        return job.level if form is SimulatedQueue else job.arrival + job.deadline

    queue, inside = form(), list[SimulatedJob]()
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
    assert form is DeadlineOrder or list(queue.back(99)) == sorted(inside, key=lambda job: (job.level, -job.index))


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


@pytest.mark.cases("terms, moves, longest")
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
