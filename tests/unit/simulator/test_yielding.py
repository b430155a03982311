"""Running generations of a simulated class yield as the fleet's do: by the same function, and no work is lost."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.fleet_file import parse_fleet
from lab.rows import make_trace
from router.decide.moves.preempt import LET_START, SWITCH
from router.decide.plan import Density
from router.upkeep import yielding as product
from simulator import class_queue
from simulator.device import SimulatedDevice
from simulator.engine import ANSWERED, DROPPED, OutcomeColumns, Simulation
from simulator.fleet import SERVICES, Stepping
from simulator.policies.policy import Policy
from simulator.policies.taxiway import Taxiway
from simulator.pool import Pool
from simulator.tuning.twin import ClassReplay, ClassState, ClassTerms
from simulator.workload import SimulatedJob, Workload, jobs, prepare
from tests.builders import recorded

CHAT = Stepping(load=0.0, memory=1, cache=0.0, per_token=0.0, per_pair=0.0, reading=0.1, per_cached=0.0, overhead=0.0)

ONE_SLOT = (
    recorded("fleets/device.yaml")
    .replace("count: 2, minimum: 1, initial: 1", "count: 1, minimum: 1, initial: 1")
    .replace("start: 10, max_batch: 8,\n        roofline", "start: 10, max_batch: 1,\n        roofline")
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


def workload(*asked: Asked) -> Workload:
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
    run = Simulation(workload(*asked), policy, seed=1)
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


def test_the_twin_plays_yielding_too() -> None:
    both = workload((0.0, "bulk", 1000), (1.0, "live", 20))
    whole = Simulation(both, Yielding(), seed=1).run()
    replay = ClassReplay(both, ClassTerms(0, ClassState((), 1), 1, Density(), 0.0), list(jobs(both)))
    replay.play(3600.0)
    assert replay.latency.tolist() == pytest.approx(whole.latency.tolist(), rel=0.01)


@given(st.integers(1, 200), st.lists(st.floats(0.05, 15.0), max_size=6))
def test_a_generation_that_is_cut_anywhere_writes_each_token_once(output: int, stays: list[float]) -> None:
    job = SimulatedJob(0, 0.0, 0, 1, output, 1e6, 0, 0, "", output, (1.0,), (1.0,), (0.0,))
    now = stepped = 0.0
    for stay in stays:
        device = SimulatedDevice(0, memory=100)
        device.admit(job, CHAT, now)
        assert device.run is not None
        if device.run.next_end() <= now + stay:
            break
        now += stay
        written = device.run.cut(job, now)
        assert job.written <= written <= output
        stepped += written - job.written
        job.written = written
        assert len(device.run) == 0
    last = SimulatedDevice(0, memory=100)
    last.admit(job, CHAT, now)
    assert last.run is not None
    steps = (last.run.next_end() - now - 0.1) / 0.1  # after the prompt
    assert stepped + steps == pytest.approx(output)


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
