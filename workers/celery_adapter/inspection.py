"""Shows a worker's jobs to Celery's `inspect` and Flower, also those that never passed through the consumer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from celery.app.task import Task
from celery.worker import state

from taxiway.contract.job import RunProgress
from workers.celery_adapter.consumer import ConsumerThread
from workers.celery_adapter.events import SHOW_EVERY, TaskEvent, TaskEvents, progressed, received
from workers.stages.held import HeldJobs
from workers.stages.job import Delivery, Revoked
from workers.stages.queues import EndingQueue

SHOW_WAITING = 0.5
"""Seconds after which a job is shown that is here and has not ended; to show one takes Celery's loop some 10 µs."""


class PlainRequest:
    """Stands for a plain job among Celery's requests. Made only for a job that is here long enough to be seen.

    Args:
        kwargs: what is shown of its arguments.
        revoke: ends the job as revoked, when an operator terminates it.
    """

    acknowledged = False
    eta = None
    time_start: float | None = None
    worker_pid: int | None = None

    def __init__(
        self, job: str, task: Task[Any, Any], hostname: str, kwargs: str, queue: str, revoke: Callable[[], None]
    ) -> None:
        self.id = job
        self.task = task
        self.name = self.type = task.name
        self.hostname = hostname
        self.kwargs = kwargs
        self.delivery_info = {"exchange": queue, "routing_key": queue}
        self._revoke = revoke
        state.task_reserved(self)

    def start(self, at: float) -> None:
        """The job runs since `at`, by this host's monotonic clock."""
        self.time_start, self.worker_pid = at, os.getpid()
        state.task_accepted(self)

    def end(self) -> None:
        """The job has ended."""
        self.acknowledged = True
        state.task_ready(self)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and its kin show."""
        return {
            "id": self.id,
            "name": self.name,
            "args": [],
            "kwargs": self.kwargs,
            "type": self.type,
            "hostname": self.hostname,
            "time_start": self.time_start,
            "acknowledged": self.acknowledged,
            "delivery_info": self.delivery_info,
            "worker_pid": self.worker_pid,
        }

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End the job as revoked. A callable is ended; rows of other batches run, and their answers are dropped."""
        self._revoke()

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Nothing: the pool requeues what it holds when it is terminated."""


class Inspection:
    """Shows plain jobs, as some of `task`, to remote control, and reports them as task events. Threads may share it."""

    def __init__(self, task: Task[Any, Any], hostname: str, events: TaskEvents, thread: ConsumerThread) -> None:
        self.events = events
        self._task = task
        self._hostname = hostname
        self._thread = thread
        self._shown: dict[Delivery, PlainRequest] = {}
        self._progress: dict[Delivery, RunProgress] = {}  # as last reported
        self._lock = threading.Lock()

    def show(self, held: HeldJobs, endings: EndingQueue) -> list[Delivery]:
        """Show what stays; on the consumer's thread. Returns what runs without the store knowing.

        `endings` takes the jobs that an operator terminates.
        """
        with self._lock:
            now = time.time()
            staying = [delivery for delivery in held.all() if _stays(delivery, now)]
            for delivery in staying:
                if delivery.task is None:
                    self._show(delivery, endings)
            self._show_progress({one: one.progress for one in staying if one.progress is not None})
            return [delivery for delivery in staying if delivery.began and not delivery.start_stored]

    def report(self, delivery: Delivery, event: TaskEvent | None) -> None:
        """Report a job that is held no longer, with the event of its end, if it has one."""
        with self._lock:
            shown = self._shown.pop(delivery, None)
            if event is not None:
                self._report_start(delivery, shown)
                self.events.add(event)
        if shown is not None:
            self._thread.call(shown.end)

    def _show(self, delivery: Delivery, endings: EndingQueue) -> None:
        shown = self._shown.get(delivery)
        if shown is None:
            self.events.add(received(delivery))
            kwargs = (delivery.headers.kwargsrepr if delivery.headers else "") or ""
            shown = self._shown[delivery] = PlainRequest(
                delivery.job,
                self._task,
                self._hostname,
                kwargs,
                delivery.hardware_class,
                lambda: endings.put([Revoked(delivery)]),
            )
        if delivery.began and shown.time_start is None:
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            shown.start(time.monotonic() - time.time() + delivery.began)

    def _show_progress(self, progress: dict[Delivery, RunProgress]) -> None:
        """Report what is new of how far jobs are, those that Celery runs itself included."""
        for delivery, reported in progress.items():
            if self._progress.get(delivery) is not reported:
                self.events.add(progressed(delivery.job, reported))
        self._progress = progress

    def _report_start(self, delivery: Delivery, shown: PlainRequest | None) -> None:
        """Report the unreported events of a job that ends."""
        if shown is None:
            self.events.add(received(delivery))
        if delivery.began and (shown is None or shown.time_start is None):
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            state.total_count[self._task.name] += 1
            state.all_total_count[0] += 1


def _stays(delivery: Delivery, now: float) -> bool:
    """Whether it runs or waits for so long that it is shown."""
    return 0 < delivery.began <= now - SHOW_EVERY or delivery.received <= now - SHOW_WAITING
