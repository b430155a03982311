"""The jobs that this worker holds: it renews their claims, and requeues or dead-letters those that cannot end here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from broker.port import DeadLetter
from broker.valkey.class_queue import ClassQueue
from broker.valkey.jobs import YieldRequest
from broker.valkey.worker_store import JobNotice, WorkerStore
from taxiway.contract.request import is_name
from taxiway.errors import BrokerUnavailableError, bounded
from workers.stages.job import CeleryWorker, Delivery

logger = logging.getLogger(__name__)

_LISTEN = 1.0  # seconds for which one call listens
_RETRY_PAUSE = 0.5  # seconds before a retry while the store is unavailable


class HeldJobs:
    """Every delivery that this worker holds, with `class_queue` as the source of their messages. Thread-safe."""

    def __init__(self, store: WorkerStore, class_queue: ClassQueue, celery: CeleryWorker) -> None:
        self._store = store
        self._queue = class_queue
        self._celery = celery
        self._held: dict[int, Delivery] = {}
        self._lock = threading.Lock()
        self._claims = threading.Lock()  # a renewal that is under way would extend a claim that is given up meanwhile

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, deliveries: Iterable[Delivery]) -> None:
        """Add deliveries."""
        now = time.monotonic()
        for delivery in deliveries:
            delivery.since = now
            self._held[id(delivery)] = delivery

    def all(self, held_for: float = 0.0) -> list[Delivery]:
        """Deliveries held for at least `held_for` seconds, in order of arrival."""
        before = time.monotonic() - held_for
        return [delivery for delivery in list(self._held.values()) if delivery.since <= before]

    def remove(self, delivery: Delivery) -> bool:
        """Remove a delivery that has ended here; False if it was already removed."""
        with self._lock:
            if delivery.ended:
                return False
            delivery.ended = True
            self._held.pop(id(delivery), None)
            return True

    def renew(self, held_for: float) -> None:
        """Renew claims and messages held for at least `held_for` seconds, and recover lost messages.

        Claims that were lost, and those that are to yield, are marked.

        Raises:
            BrokerUnavailableError: a server does not answer.
        """
        with self._claims:
            claimed = [(delivery, delivery.token) for delivery in self.all(held_for) if delivery.token]
            ours = self._store.renew([(delivery.job, token) for delivery, token in claimed])
            for (delivery, token), held in zip(claimed, ours, strict=True):
                if delivery.token != token:  # claimed again since
                    continue
                delivery.lost = delivery.lost or held is False
                if isinstance(held, YieldRequest):
                    delivery.asked_to_yield(held)
            self._queue.renew(self._tags(held_for))
            self._queue.recover()

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Return jobs, in order of arrival, to the front of their queues; none if a server is unavailable.

        A job that failed here and was to be retried keeps its claim until the lease ends: the failed run counts, and
        the job's last run is alone on its device.
        """
        claimed = [delivery for delivery in deliveries if delivery.token]
        with self._claims, suppress(BrokerUnavailableError):  # their leases expire
            self._store.release([(delivery.job, delivery.token) for delivery in claimed if not delivery.retries])
            self._store.let_lapse([(delivery.job, delivery.token) for delivery in claimed if delivery.retries])
            self._queue.put_back(in_order([delivery.tag for delivery in deliveries if delivery.tag]))
            for delivery in reversed(deliveries):
                self._release(delivery)

    def requeue_messages(self) -> None:
        """Return all messages still held, including Celery's, regardless of their claims."""
        with suppress(BrokerUnavailableError):  # they return when the lease expires
            self._queue.put_back(in_order(self._tags()))

    def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Store a job's message as a dead letter."""
        if delivery.task is not None:
            delivery.task.dead_letter(reason)
        else:
            add_dead_letter(self._store, self._queue.message(delivery.tag), reason, delivery.job)

    def _release(self, delivery: Delivery) -> None:
        removed = self.remove(delivery)
        if delivery.task is not None:
            delivery.task.requeue()
        elif removed:
            self._celery.report_release(delivery)

    def _tags(self, held_for: float = 0.0) -> list[str]:
        """Tags of messages that Celery holds, and of those held here for at least `held_for` seconds."""
        return [*self._celery.tags(), *(delivery.tag for delivery in self.all(held_for) if delivery.tag)]


class Cancellations:
    """Marks held jobs that were cancelled or expired, and those that are to yield.

    Ended jobs that wait for the device do not run, a chat on an endpoint is aborted, and a Python callable is
    terminated. A batch that cannot be interrupted continues: the heartbeat reports for how long. Notifications missed
    during an outage of the store are recovered when claims are renewed. `marked` is called after each mark.
    """

    def __init__(self, store: WorkerStore, held: HeldJobs, marked: Callable[[], None]) -> None:
        self._store = store
        self._held = held
        self._marked = marked
        self._stopping = threading.Event()

    def run(self) -> None:
        """Listen until stopped."""
        while not self._stopping.is_set():
            try:
                for notice in self._store.notices(_LISTEN):
                    self._mark(notice)
            except BrokerUnavailableError:  # logged by the heartbeat
                self._stopping.wait(_RETRY_PAUSE)

    def stop(self) -> None:
        """End `run`, immediately if the store answers. Thread-safe."""
        self._stopping.set()
        with suppress(BrokerUnavailableError):  # `run` ends after its timeout
            self._store.wake_listener()

    def _mark(self, notice: JobNotice) -> None:
        for delivery in self._held.all():
            if delivery.job == notice.job and notice.token in ("", delivery.token):
                if notice.request is None:
                    delivery.lost = True
                else:
                    delivery.asked_to_yield(notice.request)
                self._marked()


def in_order(tags: Sequence[str]) -> list[str]:
    """Tags in the order in which their messages were fetched."""
    return sorted(tags, key=lambda tag: [int(part) for part in tag.split(".")[1:]])


def add_dead_letter(store: WorkerStore, raw: bytes, reason: str, job: object) -> None:
    """Store a message as a dead letter, with the reason. It is never executed, even if storing fails."""
    reason = bounded(reason)
    extra = {"job": job, "reason": reason}
    named = job if is_name(job) else ""
    try:
        history = store.history(named)
        store.add_dead_letter(DeadLetter(reason, time.time(), raw, by=store.worker, job=named, history=history))
    except BrokerUnavailableError as error:
        logger.error("refused message could not be stored as a dead letter", extra={**extra, "error": error.message})
        return
    logger.error("refused a message", extra=extra)
