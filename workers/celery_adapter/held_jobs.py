"""What a worker holds, and what Celery's tools are told of it: events, and requests that remote control can see."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from celery.app.task import Task
from celery.worker import state

from workers.celery_adapter.events import TaskEvent, TaskEvents
from workers.celery_adapter.inspection import PlainRequest
from workers.stages.job import Delivery, Revoked

SHOW_EVERY = 0.25
"""Seconds after which a job that still runs is shown; events are sent as often. Flower's pages are slower."""

SHOW_WAITING = 0.5
"""Seconds after which a job is shown that is here and has not ended; to show one takes Celery's loop some 10 µs."""


class Ledger:
    """Every delivery that this worker holds. Threads may share it.

    A job that soon ends is told of once, when it ends; one that stays is shown as Celery shows its own.

    Args:
        revoke: ends a delivery that an operator terminates.
        on_hub: has a callback run on the hub's thread, to which Celery's own sets of requests belong.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        hostname: str,
        events: TaskEvents,
        *,
        revoke: Callable[[Revoked], None],
        on_hub: Callable[[Callable[[], None]], None],
    ) -> None:
        self.events = events
        self._task = task
        self._hostname = hostname
        self._revoke = revoke
        self._on_hub = on_hub
        self._held: dict[int, Delivery] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, deliveries: Iterable[Delivery]) -> None:
        """Take deliveries in."""
        now = time.monotonic()
        for delivery in deliveries:
            delivery.since = now
            self._held[id(delivery)] = delivery

    def held(self, held_for: float = 0.0) -> list[Delivery]:
        """All that have been here for so many seconds, the first to come first."""
        before = time.monotonic() - held_for
        return [delivery for delivery in list(self._held.values()) if delivery.since <= before]

    def show(self) -> list[Delivery]:
        """Show what is not shown yet; on the hub's thread. Answers what runs and the store was not told of."""
        with self._lock:
            now = time.time()
            staying = [delivery for delivery in self.held() if _stays(delivery, now)]
            for delivery in staying:
                if delivery.handed is None:
                    self._show(delivery)
            return [delivery for delivery in staying if delivery.began and not delivery.told]

    def end(self, delivery: Delivery, event: TaskEvent | None) -> None:
        """Let a plain delivery go, with the event of how it ended, if any is to tell it."""
        with self._lock:
            if delivery.ended:
                return
            self.forget(delivery)
            if event is not None:
                self._tell(delivery)
                self.events.add(event)
            if delivery.shown is not None:
                self._on_hub(delivery.shown.end)

    def forget(self, delivery: Delivery) -> None:
        """Let a delivery go that Celery ends."""
        delivery.ended = True
        self._held.pop(id(delivery), None)

    def _show(self, delivery: Delivery) -> None:
        if delivery.shown is None:
            self._received(delivery)
            headers = delivery.headers
            delivery.shown = PlainRequest(
                delivery.job,
                self._task,
                self._hostname,
                (headers.kwargsrepr if headers else "") or "",
                delivery.hardware_class,
                lambda: self._revoke(Revoked(delivery)),
            )
        if delivery.began and delivery.shown.time_start is None:
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            delivery.shown.start(time.monotonic() - time.time() + delivery.began)

    def _tell(self, delivery: Delivery) -> None:
        """Say what was not said of a delivery that ends."""
        if delivery.shown is None:
            self._received(delivery)
        if delivery.began and (delivery.shown is None or delivery.shown.time_start is None):
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            state.total_count[self._task.name] += 1
            state.all_total_count[0] += 1

    def _received(self, delivery: Delivery) -> None:
        headers = delivery.headers
        assert headers is not None
        self.events.add(
            TaskEvent(
                "task-received",
                delivery.job,
                delivery.received,
                name=headers.shadow or headers.task,
                args=headers.argsrepr,
                kwargs=headers.kwargsrepr,
                root_id=headers.root_id,
                parent_id=headers.parent_id,
                retries=0,
                eta=None,
                expires=None,
            )
        )


def _stays(delivery: Delivery, now: float) -> bool:
    """Whether it runs or waits for so long that it is shown."""
    return 0 < delivery.began <= now - SHOW_EVERY or delivery.received <= now - SHOW_WAITING
