from __future__ import annotations

from celery import Celery

from tasks.ticket import Ticket
from taxiway.keys import INFER
from workers.events import TaskEvents
from workers.ledger import Ledger
from workers.work import Delivery


def test_what_came_just_now_is_held_and_needs_no_renewal_yet() -> None:
    app = Celery(set_as_current=False)
    events = TaskEvents("w", app.clock, lambda topic, message: None)
    ledger = Ledger(
        app.task(lambda: None, name=INFER, shared=False),
        "w",
        events,
        revoke=lambda revoked: None,
        on_hub=lambda call: call(),
    )
    ticket = Ticket(
        job="j", task=INFER, model="m:1", variants={}, prices={}, accepted=0.0, deadline_at=0.0, level=1, reason=""
    )
    delivery = Delivery("j", ticket, b"", "application/json", 0.0, hardware_class="c")
    ledger.hold([delivery])
    assert ledger.held() == [delivery]
    assert ledger.held(60.0) == []
