"""What must hold of every run holds under the laboratory's policies, and the tuned plan knows no more than its half."""

import itertools

import pytest

from lab.baselines import BASELINES, CLAIRVOYANT, Central, as_seen, run, tuned_plan
from lab.changes import ChangingSimulation as Simulation
from lab.changes import simulate
from router.decide.fairness import RELEASE_TICK
from router.decide.plan import Density
from simulator.engine import ANSWERED
from simulator.policies.policy import Assignment, Fixed
from tests.unit.simulator import test_device as spot
from tests.unit.simulator import test_opponents as halves
from tests.unit.simulator.test_engine import MINUTE, chat, ends_once, play, workload

each = pytest.mark.parametrize("name", BASELINES)


@each
def test_every_request_ends_exactly_once_and_all_devices_go_off(name: str) -> None:
    work = chat()
    ends_once(Simulation(work, BASELINES[name](work, 1), seed=1))


@each
def test_the_same_seed_gives_the_same_run(name: str) -> None:
    work = chat()
    first, again = (run(name, BASELINES[name], work, 5) for _ in range(2))
    assert first == again


@each
def test_no_policy_runs_live_work_on_spot_devices(name: str) -> None:
    work = spot.workload(*((0.2 * n, "image") for n in range(20)))
    run = Simulation(work, BASELINES[name](work, 1), seed=1)
    run.run()
    assert sum(device.powered for device in run.pools[1].devices) == 0


def test_the_central_queue_binds_a_job_when_a_device_has_room_for_it_and_not_before() -> None:
    work = workload(MINUTE, horizon=1000)
    outcome = play(work, Central())
    assert (outcome.state == ANSWERED).all()
    assert float(outcome.latency.max()) < 31 + 60 * RELEASE_TICK


def test_a_plan_is_tuned_on_the_first_half_alone_and_beats_serving_all_on_the_cheapest_class() -> None:
    work = halves.workload()
    found = tuned_plan(work, 1)
    all_cheap = Assignment(dict.fromkeys(itertools.product(range(2), range(3)), 0), (Density(),) * 3)
    assert tuned_plan(halves.changed_later(work), 1).key == found.key
    tuned, cheap = (simulate("fixed", work, Fixed(one), seed=1).score for one in (found, all_cheap))
    assert tuned < cheap


def test_the_clairvoyant_policy_alone_is_told_true_outputs() -> None:
    work = chat()
    assert (as_seen(work, CLAIRVOYANT).trace.predicted == work.trace.output).all()
    assert all(as_seen(work, name) is work for name in BASELINES if name != CLAIRVOYANT)
