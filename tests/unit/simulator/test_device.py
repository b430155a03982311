"""A simulated device runs several models as a worker's does, its hardware changes, and its generations yield."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.changes import ChangingSimulation as Simulation
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from router.decide.moves.preempt import LET_START, SWITCH
from router.upkeep import yielding as product
from simulator import class_queue
from simulator.device import SimulatedDevice
from simulator.engine import ANSWERED, DROPPED, OutcomeColumns
from simulator.fleet import SERVICES, Stepping, WholeBatches
from simulator.policies.policy import Policy
from simulator.policies.taxiway import POLICIES, Taxiway
from simulator.pool import Pool
from simulator.workload import SimulatedJob, Workload
from tests.builders import recorded

FLEET = recorded("fleets/device.yaml")
CHAT = Stepping(load=0.0, memory=1, cache=0.0, per_token=0.0, per_pair=0.0, reading=0.1, per_cached=0.0, overhead=0.0)
IMAGE = WholeBatches(load=0.0, memory=1, base=1.0, slope=0.0, floor=0.0)


def job(index: int, model: int, output: int = 0) -> SimulatedJob:
    return SimulatedJob(index, 0.0, model, 1, output, 60.0, 0, 0, "", output, (1.0,), (1.0,), (0.0,))


def test_a_whole_batch_runs_between_two_steps_and_delays_the_running_one() -> None:
    device = SimulatedDevice(0, memory=100)
    device.admit(job(0, 0, output=10), CHAT, 0.0)
    assert device.run is not None
    assert device.run.next_end() == pytest.approx(1.1)  # the prompt, and ten steps
    device.begin([job(1, 1)], IMAGE, 0.6, level=0)
    assert device.run.next_end() == pytest.approx(1.6)
    assert [ended.index for ended in device.run.ended(1.6)] == [1]
    assert device.run.next_end() == pytest.approx(2.1)
    assert not device.can_begin(job(2, 1), IMAGE, 1.6)  # the running batch takes a step first
    assert device.can_begin(job(2, 1), IMAGE, 1.7)
    assert [ended.index for ended in device.run.ended(2.1)] == [0]


def test_rows_that_wait_for_company_do_not_wait_behind_a_batch_of_a_lower_level_that_comes_then() -> None:
    one = FLEET.replace("gpu: {count: 2", "gpu: {max_wait: 0.5, count: 1")
    asked = [{"arrival": at, "model": "embed", "size": 1, "deadline": 5, "priority": 0} for at in (0.0, 0.01, 0.195)]
    image = {"arrival": 0.205, "model": "image", "size": 1, "deadline": 90, "priority": 1}
    workload = prepare(make_trace([*asked, image]), parse_fleet(one), seed=1)
    outcome = Simulation(workload, POLICIES["least-work"](workload, 1), seed=1).run()
    assert (outcome.state == ANSWERED).all()
    assert outcome.latency[:3].max() < 0.5


class First(Policy):
    """All jobs go to the first class."""

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        return 0


def workload(*rows: tuple[float, str], events: str = "", service: str = "live", output: int = 5) -> Workload:
    fleet = parse_fleet(FLEET + events)
    asked = {"size": 1, "output": output, "service": SERVICES.index(service)}
    return prepare(make_trace([{"arrival": at, "model": model, **asked} for at, model in rows]), fleet, seed=1)


def test_a_model_does_not_wait_for_jobs_of_another() -> None:
    full = [(0.0, "chat")] * 9  # one more than the batch holds
    outcome = Simulation(workload(*full, (0.1, "embed"), service="bulk", output=200), First(), seed=1).run()
    assert (outcome.state == ANSWERED).all()
    assert outcome.latency[9] < 1 < outcome.latency[:9].min()


def test_patient_work_displaces_a_model_that_urgent_work_uses_for_a_tenth_of_the_time() -> None:
    """An image is loaded in 0.1 s in place of the embedder, which is loaded again in as long: next 2 s after that."""
    small = FLEET.replace("gpu: {count: 2", "gpu: {count: 1").replace("memory: 24GiB", "memory: 2GiB")
    small = small.replace("memory: 1GiB", "memory: 1.5GiB").replace("default_model: chat", "default_model: image")
    live = [{"arrival": float(at), "model": "embed", "size": 1, "deadline": 5, "priority": 0} for at in range(5)]
    bulk = [{"arrival": at, "model": "image", "size": 1, "deadline": 90, "priority": 2} for at in (0.5, 2.2)]
    trace = prepare(
        make_trace(sorted([*live, *bulk], key=lambda row: float(row["arrival"]))), parse_fleet(small), seed=1
    )
    outcome = Simulation(trace, First(), seed=1).run()
    assert (outcome.state == ANSWERED).all()
    assert outcome.latency[[1, 4]] == pytest.approx([1.1, 2.6 - 2.2 + 1.1])


def test_a_bulk_generation_does_not_take_the_memory_that_a_live_one_waits_for() -> None:
    """A cached token takes a GiB of 24, and a step a second: the live one fits in once the second chat ends."""
    fleet = parse_fleet(FLEET.replace("gpu: {count: 2", "gpu: {count: 1"))
    timing = replace(CHAT, cache=float(2**30), overhead=1.0)
    fleet = replace(fleet, timings={**fleet.timings, "chat": (timing, None), "embed": (timing, None)})
    rows = [(0, "chat", 2, 1, 10), (0, "chat", 2, 1, 4), (1, "chat", 0, 9, 1), (2, "embed", 2, 1, 4)]
    asked = [
        {"arrival": float(at), "model": model, "size": size, "output": output, "deadline": 60, "priority": level}
        for at, model, level, size, output in rows
    ]
    outcome = Simulation(prepare(make_trace(asked), fleet, seed=1), First(), seed=1).run()
    assert outcome.latency[2] < 10


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_runs_live_work_on_spot_devices(name: str) -> None:
    work = workload(*((0.2 * n, "image") for n in range(20)))
    run = Simulation(work, POLICIES[name](work, 1), seed=1)
    run.run()
    assert sum(device.powered for device in run.pools[1].devices) == 0


ONE_SLOT = FLEET.replace("count: 2, minimum: 1, initial: 1", "count: 1, minimum: 1, initial: 1").replace(
    "start: 10, max_batch: 8,\n        roofline", "start: 10, max_batch: 1,\n        roofline"
)
Asked = tuple[float, str, int]
"""When a request arrives, its service, and the tokens of its answer."""


class Yielding(Policy):
    """All jobs go to the first class, whose generations yield."""

    yields = True

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int:
        return 0


class Staying(Yielding):
    """The same, but nothing yields."""

    yields = False


def chats(*asked: Asked) -> Workload:
    requests = [
        {
            "arrival": at,
            "model": "chat",
            "size": 100,
            "output": output,
            "service": SERVICES.index(service),
            "deadline": {"live": 10.0, "standard": 60.0, "bulk": 3600.0}[service],
            "priority": {"live": 0, "standard": 1, "bulk": 2}[service],
        }
        for at, service, output in sorted(asked)
    ]
    return prepare(make_trace(requests), parse_fleet(ONE_SLOT), seed=1)


def played(policy: Yielding, *asked: Asked) -> tuple[Simulation, OutcomeColumns]:
    run = Simulation(chats(*asked), policy, seed=1)
    return run, run.run()


def test_simulator_and_product_ask_the_same_function() -> None:
    assert vars(class_queue)["preempt"] is vars(product)["preempt"]
    assert Taxiway.yields


def test_a_long_bulk_generation_yields_to_a_live_one_and_goes_on_where_it_stopped() -> None:
    asked: tuple[Asked, ...] = ((0.0, "bulk", 1000), (1.0, "live", 20))
    _, stayed = played(Staying(), *asked)
    assert stayed.state.tolist() == [ANSWERED, DROPPED]

    _, outcome = played(Yielding(), *asked)
    assert outcome.state.tolist() == [ANSWERED, ANSWERED]
    assert outcome.latency[1] < 5
    away = outcome.latency[1] - LET_START - SWITCH
    assert 0 < outcome.latency[0] - stayed.latency[0] - away < 0.1  # it reads again what it wrote


REQUESTS = st.lists(
    st.tuples(st.floats(0, 60), st.sampled_from(SERVICES), st.integers(1, 400)), min_size=1, max_size=25
)


@settings(max_examples=40, deadline=None)
@given(REQUESTS)
def test_whatever_arrives_each_request_ends_once_and_bulk_work_is_answered(asked: list[Asked]) -> None:
    run, outcome = played(Yielding(), *asked)
    (chat, _) = run.pools
    assert (chat.waiting, chat.running, sum(chat.queued), len(chat.queue)) == (0, 0, 0, 0)
    bulk = run.workload.trace.service == SERVICES.index("bulk")
    assert (outcome.state[bulk] == ANSWERED).all()
    assert set(outcome.state[~bulk]) <= {ANSWERED, DROPPED}
