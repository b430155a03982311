"""Which rows a lane gives to the next batch, by their own sizes, and which lane's batch runs next."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks.models.model import Profile
from tasks.models.profiles import ProfileBook
from taxiway.contract.keys import LEVELS
from tests.builders import a_class, a_ticket
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor
from workers.decide.batcher import BatchPolicy
from workers.learned import Loaded
from workers.port import Item
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import gather
from workers.stages.job import RunningJob
from workers.stages.lane import Lane, Lanes

PROFILE = Profile(base=0.001, slope=1e-6)
HARDWARE = a_class(max_batch=8)
BUCKET = 1_000_000


def job(*sizes: int, deadline: float = 100.0) -> RunningJob:
    """A job with rows of these sizes, all of one bucket."""
    made = a_running_job("ising", hardware=HARDWARE, key="k", rows=({},), single=False, deadline=deadline)
    made.items = [Item({}, size) for size in sizes]
    made.answers = [None] * len(sizes)
    gather(made)
    return made


def lane(max_run: float, *jobs: RunningJob, pace: float = 1.0) -> Lane:
    """A lane in which these jobs wait."""
    made = Lane(("k", BUCKET, "", "c"), BatchPolicy(8, 0.0, max_run), PROFILE, lambda: pace)
    for one in jobs:
        made.add(one)
    return made


def taken(made: Lane) -> list[int]:
    return [one.items[row].size for one, rows in made.take(0.0) for row in rows]


def test_a_batch_takes_as_many_rows_as_fit_into_max_run_by_their_own_sizes() -> None:
    small = lane(0.5, job(*[200_000] * 6))
    large = lane(0.5, job(*[900_000] * 6))
    assert (taken(small), taken(small), taken(small)) == ([200_000] * 2, [200_000] * 2, [200_000] * 2)
    assert taken(large) == [900_000]
    assert (small.rows, small.seconds) == (0, 0.0)
    assert large.seconds == pytest.approx(0.001 + 5 * 0.9)


def test_a_device_that_is_slower_than_its_profile_gets_fewer_rows_a_batch() -> None:
    assert len(taken(lane(0.5, job(*[200_000] * 6), pace=2.0))) == 1
    assert len(taken(lane(0.5, job(*[200_000] * 6), pace=0.5))) == 4


def test_the_rows_that_no_batch_took_go_on_waiting_most_urgent_first() -> None:
    urgent, patient = job(600_000, 500_000, deadline=1.0), job(400_000, deadline=2.0)
    both = lane(0.7, patient, urgent)
    assert [taken(both), taken(both), taken(both)] == [[600_000], [500_000], [400_000]]
    assert not both


def test_a_removed_job_no_longer_counts() -> None:
    leaving, staying = job(600_000), job(300_000)
    both = lane(0.7, leaving, staying)
    both.remove(leaving)
    assert both.seconds == pytest.approx(0.301)
    assert taken(both) == [300_000]


def test_the_batches_that_are_to_come_are_those_that_run() -> None:
    waiting = lane(0.5, job(200_000, 200_000, 900_000), job(150_000))
    foreseen = [seconds for _, seconds in waiting.batches()]
    ran = []
    while waiting:
        sizes = taken(waiting)
        ran.append(PROFILE.latency(len(sizes), sum(sizes) / len(sizes)))
    assert foreseen == pytest.approx(ran)


WAITS = a_class(max_batch=8, max_wait=0.05)


class Waiting:
    """Lanes of one device, whose batches take a second and 1 ms a row."""

    def __init__(self, folder: Path) -> None:
        self.lanes = Lanes(an_executor(folder, WAITS), lambda: 0.0)

    def add(self, model: str, level: int, *arrivals: float, due: float = 100.0) -> list[RunningJob]:
        """Jobs of a row each, in the order of their arrival."""
        found = MODELS.resolve(model)
        known = replace(ProfileBook().lookup(found, found.reference, "cpu", "t"), profile=Profile(1.0, 0.001))
        jobs = []
        for arrived in arrivals:
            delivery = a_delivery(a_ticket(level=level))
            job = a_running_job(model, hardware=WAITS, delivery=delivery, deadline=due, arrived=arrived)
            job.items, job.answers = [Item({}, 1)], [None]
            gather(job)
            loaded = Loaded(job.key, found, found.variants[found.reference], None, EchoRuntime(), known, 0.0)  # type: ignore[arg-type]
            self.lanes.add(job, loaded)
            jobs.append(job)
        return jobs


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_batch_that_waits_runs_before_a_due_one_of_a_lower_level(tmp_path: Path, level: int) -> None:
    waiting = Waiting(tmp_path)
    urgent = waiting.add("echo", 1, 0.0, 0.001, 0.002)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is None and wait > 0, "more rows are expected"
    (other,) = waiting.add("paced", level, 0.003)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is not None and wait == 0
    assert lane.jobs() == (set(urgent) if level > 1 else {other})
