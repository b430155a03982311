import threading
import time
from collections.abc import Sequence
from typing import Any

from celery import Celery

from broker.valkey.claims import Claim, Verdict
from broker.valkey.worker_store import WorkerStore
from tasks.queues.limits import Limits
from taxiway.contract.keys import INFER
from tests.celery_double import Endings
from tests.unit.workers.parts import a_delivery, holding
from workers.celery_adapter.consumer import ConsumerThread
from workers.celery_adapter.events import SHOW_EVERY, SILENCE, TaskEvent, TaskEvents
from workers.celery_adapter.inspection import SHOW_WAITING, Inspection
from workers.stages.job import Delivery, Headers


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
