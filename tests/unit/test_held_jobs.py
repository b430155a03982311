from __future__ import annotations

import time

from celery import Celery

from tasks.ticket import Ticket
from taxiway.contract.keys import INFER
from workers.celery_adapter.events import TaskEvents
from workers.celery_adapter.held_jobs import SHOW_EVERY, SHOW_WAITING, Ledger
from workers.stages.job import Delivery, Headers

TICKET = Ticket(
    job="j", task=INFER, model="m:1", variants={}, prices={}, accepted=0.0, deadline_at=0.0, level=1, reason=""
)


def nothing() -> None:
    """Stands for the task."""


def ledger_of(*deliveries: Delivery) -> Ledger:
    app = Celery(set_as_current=False)
    ledger = Ledger(
        app.task(nothing, name=INFER, shared=False),
        "w",
        TaskEvents("w", app.clock, lambda topic, message: None),
        revoke=lambda revoked: None,
        on_hub=lambda call: call(),
    )
    ledger.hold(deliveries)
    return ledger


def delivery_that_came(received: float) -> Delivery:
    headers = Headers("j", INFER, "")
    return Delivery("j", TICKET, b"", "application/json", received, headers=headers, hardware_class="c")


def test_what_came_just_now_is_held_and_needs_no_renewal_yet() -> None:
    delivery = delivery_that_came(0.0)
    ledger = ledger_of(delivery)
    assert ledger.held() == [delivery]
    assert ledger.held(60.0) == []


def test_a_job_is_shown_when_it_runs_or_waits_for_long_and_only_then() -> None:
    now = time.time()
    fresh, waits, runs = delivery_that_came(now + 3600), delivery_that_came(now - SHOW_WAITING), delivery_that_came(now)
    fresh.began, runs.began = now + 3600, now - SHOW_EVERY
    ledger = ledger_of(fresh, waits, runs)
    assert ledger.show() == [runs]
    assert fresh.shown is None
    assert waits.shown is not None and waits.shown.time_start is None
    assert runs.shown is not None and runs.shown.time_start is not None
    for delivery in (waits, runs):
        ledger.end(delivery, None)
