"""What waits for a load: two models on a device that holds one of them, behind the worker's own executor."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from taxiway.errors import TaxiwayError
from tests.builders import a_class, a_ticket, recorded
from tests.unit.workers.parts import a_delivery, a_running_job, an_executor
from workers.stages.job import RunningJob
from workers.stages.lane import LOAD_AT_MOST, Loads, Urgency

MODEL = recorded("documents/model.yaml")


class Dock:
    """A device with room for one model, and what waits for it."""

    def __init__(self, folder: Path) -> None:
        for name in ("one", "other"):
            (folder / name).mkdir()
            (folder / name / "model.yaml").write_text(MODEL.format(name=name))
        self.catalogue: Catalogue = load_catalogue(folder)
        self.executor = an_executor(folder / "cache", a_class(runtimes=("echo", "python"), memory=100 * 2**20))
        self.failed: list[tuple[RunningJob, TaxiwayError]] = []
        self.woken = threading.Event()
        self.loads = Loads(self.executor, wake=self.woken.set, fail=self._fail)
        self.lined: dict[str, Urgency] = {}

    def job(self, model: str, variant: str = "echo", *, deadline: float = math.inf, arrived: float = 0.0) -> RunningJob:
        """A job that waits for its variant."""
        delivery, found = (
            a_delivery(a_ticket(f"{model} {deadline} {arrived}", f"{model}:1")),
            self.catalogue.resolve(model),
        )
        job = a_running_job(found, delivery=delivery, variant=variant, arrived=arrived, deadline=deadline)
        self.loads.wait(job)
        return job

    def begin(self) -> None:
        """Begin a load, if one may."""
        self.loads.begin(lambda urgency: {key for key, lined in self.lined.items() if lined <= urgency})

    def finish(self) -> list[RunningJob]:
        """The jobs of the load that runs, once it has ended."""
        assert self.woken.wait(20)
        self.woken.clear()
        return self.loads.finish()

    def warm(self) -> set[str]:
        """What is loaded."""
        return {loaded.key for loaded in self.executor.all_loaded()}

    def _fail(self, jobs: Sequence[RunningJob], error: TaxiwayError) -> None:
        self.failed += [(job, error) for job in jobs]


@pytest.fixture
def dock(tmp_path: Path) -> Dock:
    return Dock(tmp_path)


def test_one_variant_loads_at_a_time_the_most_urgent_job_s_first(dock: Dock) -> None:
    dock.job("one", arrived=1.0)
    urgent = dock.job("other", deadline=5.0, arrived=2.0)
    dock.begin()
    dock.begin()
    assert dock.finish() == [urgent]


def test_the_jobs_of_a_variant_that_cannot_load_end_with_the_reason(dock: Dock) -> None:
    job = dock.job("one", "missing")
    dock.begin()
    assert dock.finish() == []
    assert [failed for failed, _ in dock.failed] == [job]
    again = dock.job("one", "missing")
    dock.begin()
    assert [failed for failed, _ in dock.failed] == [job, again]
    assert all("no callable 'nowhere'" in error.message for _, error in dock.failed)
    assert "one:1/missing" in dock.executor.unavailable


def test_a_variant_keeps_its_memory_in_use_and_until_the_more_urgent_of_its_jobs_have_run(dock: Dock) -> None:
    loaded = dock.executor.load(dock.catalogue.resolve("one"), "echo")
    dock.lined[loaded.key] = (1, math.inf, 1.0)
    job = dock.job("other", arrived=2.0)
    dock.begin()
    assert dock.warm() == {loaded.key}
    loaded.in_use, dock.lined[loaded.key] = True, (1, math.inf, 3.0)
    dock.begin()
    assert dock.warm() == {loaded.key}
    loaded.in_use = False
    dock.begin()
    assert dock.finish() == [job]
    assert dock.warm() == {"other:1/echo"}


def test_a_load_hangs_once_it_takes_longer_than_loads_may(dock: Dock) -> None:
    began = time.monotonic()
    assert not dock.loads.hung(math.inf)
    dock.job("one")
    dock.begin()
    assert not dock.loads.hung(began + LOAD_AT_MOST)
    assert dock.loads.hung(time.monotonic() + LOAD_AT_MOST)
    dock.finish()
    assert not dock.loads.hung(math.inf)


def test_a_lost_variant_that_is_there_again_or_finds_no_room_is_not_loaded(dock: Dock) -> None:
    loaded = dock.executor.load(dock.catalogue.resolve("one"), "echo")
    dock.loads.replace(loaded.model, "echo")
    dock.begin()
    loaded.in_use = True
    dock.loads.replace(dock.catalogue.resolve("other"), "echo")
    dock.begin()
    dock.loads.replace(dock.catalogue.resolve("other"), "missing")
    loaded.in_use = False
    dock.begin()
    assert dock.finish() == [] and dock.failed == []
