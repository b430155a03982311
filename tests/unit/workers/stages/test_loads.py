"""Jobs that wait for a variant to be loaded, and those that are held."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from broker.valkey.claims import Claim, Verdict
from broker.valkey.worker_store import WorkerStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.queues.limits import Limits
from taxiway.contract.keys import INFER
from taxiway.errors import TaxiwayError
from tests.builders import a_class, a_ticket, recorded
from tests.celery_double import Endings
from tests.unit.workers.parts import a_delivery, a_running_job, an_executor, holding
from workers.celery_adapter.consumer import SHOW_WAITING, ConsumerThread, Inspection
from workers.celery_adapter.events import SHOW_EVERY, SILENCE, TaskEvent, TaskEvents
from workers.stages.job import Delivery, Headers, RunningJob
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


def nothing() -> None:
    """Stands for the task."""


def inspection() -> Inspection:
    app: Any = Celery(set_as_current=False)  # its stubs know neither its clock nor this use of `task`
    events = TaskEvents("w", app.clock, lambda topic, message: 1)
    return Inspection(app.task(nothing, name=INFER, shared=False), "w", events, ConsumerThread())


def test_events_are_left_out_for_a_while_after_no_monitor_received_some() -> None:
    app: Any = Celery(set_as_current=False)
    monitors, sent = [0], list[bytes]()

    def publish(topic: str, message: bytes) -> int:
        sent.append(message)
        return monitors[0]

    events, event = TaskEvents("w", app.clock, publish), TaskEvent("task-started", "j", 0.0)
    events.wanted = lambda: True
    for _ in range(2):
        events.add(event)
        events.flush()
    assert len(sent) == 1
    monitors[0], until = 1, time.monotonic() + 10 * SILENCE
    while not events.waiting and time.monotonic() < until:
        events.add(event)
    events.flush()
    events.add(event)
    assert (len(sent), events.waiting) == (2, 1)


def delivery_that_came(received: float) -> Delivery:
    return a_delivery(received=received, headers=Headers("j", INFER, ""))


def test_what_is_held_needs_no_renewal_yet_and_ends_once() -> None:
    delivery = delivery_that_came(0.0)
    jobs = holding(delivery)
    assert (jobs.all(), jobs.all(60.0)) == ([delivery], [])
    assert [jobs.remove(delivery), jobs.remove(delivery), len(jobs)] == [True, False, 0]


class SlowStore(WorkerStore):
    """Notes its calls; a renewal ends once claims lapse, or soon if they do not."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", "w", Limits())
        self.calls: list[str] = []
        self.renewing, self.lapsing = threading.Event(), threading.Event()

    def renew(self, claims: Sequence[tuple[str, str]]) -> list[bool]:
        """As `WorkerStore.renew`."""
        self.renewing.set()
        self.lapsing.wait(0.2)
        self.calls.append("renewed")
        return [True] * len(claims)

    def let_lapse(self, claims: Sequence[tuple[str, str]]) -> None:
        """As `WorkerStore.let_lapse`."""
        self.calls.append("lapses")
        self.lapsing.set()

    def release(self, claims: Sequence[tuple[str, str]], *, counts: bool = False) -> None:
        """As `WorkerStore.release`."""


def test_a_claim_that_is_given_up_is_not_renewed_after_that() -> None:
    store, delivery = SlowStore(), a_delivery()
    delivery.claim, delivery.retries = Claim(Verdict.RUN, "t"), 1
    jobs = holding(delivery, store=store)
    renewal = threading.Thread(target=jobs.renew, args=(0.0,))
    renewal.start()
    assert store.renewing.wait(10)
    jobs.requeue([delivery])
    renewal.join()
    jobs.renew(0.0)
    assert store.calls == ["renewed", "lapses", "renewed"]
    assert jobs.all() == []


def test_a_job_is_shown_when_it_runs_or_waits_for_long_and_only_then() -> None:
    now = time.time()
    fresh, waits, runs = delivery_that_came(now + 3600), delivery_that_came(now - SHOW_WAITING), delivery_that_came(now)
    fresh.began, runs.began = now + 3600, now - SHOW_EVERY
    shown = inspection()
    assert shown.show(holding(fresh, waits, runs), Endings()) == [runs]
    starts = {delivery: request.time_start for delivery, request in shown._shown.items()}
    assert starts.keys() == {waits, runs}
    assert starts[waits] is None and starts[runs] is not None
    for delivery in (waits, runs):
        shown.report(delivery, None)
    shown._thread.run()
    assert not shown._shown
