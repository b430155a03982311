"""Which lane's batch runs next."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks.models.model import Profile
from tasks.models.profiles import ProfileBook
from taxiway.contract.keys import LEVELS
from tests.builders import a_class, a_ticket
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor
from workers.learned import Loaded
from workers.port import Item
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import gather
from workers.stages.job import RunningJob
from workers.stages.lane import Lanes

HARDWARE = a_class(max_batch=8, max_wait=0.05)


class Waiting:
    """Lanes of one device, whose batches take a second and 1 ms a row."""

    def __init__(self, folder: Path) -> None:
        self.lanes = Lanes(an_executor(folder, HARDWARE), lambda: 0.0)

    def add(self, model: str, level: int, *arrivals: float, due: float = 100.0) -> list[RunningJob]:
        """Jobs of a row each, in the order of their arrival."""
        found = MODELS.resolve(model)
        known = replace(ProfileBook().lookup(found, found.reference, "cpu", "t"), profile=Profile(1.0, 0.001))
        jobs = []
        for arrived in arrivals:
            delivery = a_delivery(a_ticket(level=level))
            job = a_running_job(model, hardware=HARDWARE, delivery=delivery, deadline=due, arrived=arrived)
            job.items, job.answers = [Item({}, 1)], [None]
            gather(job)
            loaded = Loaded(job.key, found, found.variants[found.reference], None, EchoRuntime(), known, 0.0)  # type: ignore[arg-type]
            self.lanes.add(job, loaded)
            jobs.append(job)
        return jobs


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_batch_that_waits_for_more_rows_runs_before_one_of_a_lower_level_that_is_due(
    tmp_path: Path, level: int
) -> None:
    waiting = Waiting(tmp_path)
    urgent = waiting.add("echo", 1, 0.0, 0.001, 0.002)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is None and wait > 0, "more rows are expected"
    (other,) = waiting.add("paced", level, 0.003)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is not None and wait == 0
    assert lane.jobs() == (set(urgent) if level > 1 else {other})
