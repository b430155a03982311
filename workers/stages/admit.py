"""Stage 2: claims jobs in bulk, and reads and prepares those that may run here.

The fetch thread brings what it has claimed already; the admit thread claims what Celery's consumer received, and
what another worker held a while ago. The device thread waits for neither.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from broker.valkey.claims import Claim, Verdict
from broker.valkey.worker_store import Store, insist
from tasks.heartbeat import variant_key
from taxiway.contract.blobs import Reference
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    ExecutionError,
    ModelUnavailableError,
    TaxiwayError,
)
from workers.context import WorkerContext
from workers.decide.faults import describe
from workers.executor import Executor
from workers.stages.decode import Contents, JobReader, prepare
from workers.stages.held import HeldJobs
from workers.stages.job import Delivery, Dropped, Ended, Job, Outcome, late
from workers.stages.queues import AdmitQueue, DeviceQueue, EndingSink

logger = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Longest pause, in seconds, before a job that another worker holds is looked at again."""


class AdmitStage:
    """Admits deliveries to the device.

    Args:
        device: takes what may run.
        finish: takes what ended before it ran.
        shutdown: set once the worker stops: what cannot be read from the store then goes back to its queue.
    """

    def __init__(
        self,
        inbox: AdmitQueue,
        device: DeviceQueue,
        finish: EndingSink,
        executor: Executor,
        store: Store,
        held: HeldJobs,
        context: WorkerContext,
        shutdown: threading.Event,
    ) -> None:
        self._inbox = inbox
        self._device = device
        self._finish = finish
        self._executor = executor
        self._store = store
        self._held = held
        self._reader = JobReader(context.folder, context.topology.hardware, self._fetch)
        self._shutdown = shutdown
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after what was put. Any thread may call it."""
        self._stopping.set()
        self._inbox.close()

    def run(self) -> None:
        """Claim and admit what is due, until stopped."""
        while not self._stopping.is_set():
            due = self._inbox.take()
            if due:
                claimed = [delivery for delivery in due if delivery.token and not delivery.lost]
                self._admit(claimed, time.monotonic())  # they run again
                with contextlib.suppress(BrokerUnavailableError):  # stopping: the messages are delivered again
                    self._claim([delivery for delivery in due if delivery.lost or not delivery.token])
        self._held.requeue(self._inbox.rest())

    def admit(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Admit deliveries by the answers to their claims, which the store gave at `now`. Any thread may call it."""
        arrived = time.monotonic()
        self._device.clock = now - arrived
        able = []
        for delivery in deliveries:
            assert delivery.claim is not None
            if delivery.claim.verdict is not Verdict.RUN:
                self._not_run(delivery, delivery.claim, now)
            elif delivery.claim.attempts >= self._store.limits.attempts:
                self._give_up(delivery)
            else:
                able.append(delivery)
        self._admit(able, arrived)

    def _claim(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        asked = [(delivery.job, delivery.ticket.deadline_at) for delivery in deliveries]
        now, claims = insist(
            lambda: self._store.claim(asked),
            self._stopping,
            lambda why: logger.warning("cannot claim", extra={"error": why}),
        )
        for delivery, claim in zip(deliveries, claims, strict=True):
            delivery.claim, delivery.lost = claim, False
        self.admit(deliveries, now)

    def _fetch(self, found: Sequence[Reference]) -> Contents:
        """The blobs of requests, once the store answers."""
        return insist(
            lambda: self._store.blobs(found),
            self._shutdown,
            lambda why: logger.warning("cannot fetch inputs", extra={"error": why}),
        )

    def _not_run(self, delivery: Delivery, claim: Claim, now: float) -> None:
        if claim.verdict is Verdict.FINAL:
            self._finish.put([Dropped(delivery)])
        elif claim.verdict is Verdict.LATE:
            self._finish.put([late(delivery, now)])
        else:
            self._inbox.put(delivery, pause=min(max(claim.retry_in, 0.01), LOOK_AGAIN))

    def _give_up(self, delivery: Delivery) -> None:
        """Fail a job whose runs ended its workers, and keep its message as a dead letter."""
        attempts = self._store.limits.attempts
        error = DeadLetteredError(f"given up: {attempts} attempts to run it ended without an answer")
        self._held.dead_letter(delivery, error.message)
        self._finish.put([Ended(delivery, Outcome(error=error))])

    def _admit(self, deliveries: Sequence[Delivery], arrived: float) -> None:
        """Hand the jobs to the device, those at once whose inputs were fetched together."""
        with contextlib.suppress(BrokerUnavailableError):  # stopping while the store is unavailable: they return
            for some, contents in self._reader.groups(deliveries):
                self._device.put([job for one in some for job in self._admitted(one, arrived, contents)])

    def _admitted(self, delivery: Delivery, arrived: float, contents: Contents) -> list[Job]:
        """The job, prepared where its variant is loaded already; none where it cannot be read."""
        try:
            job = self._reader.read(delivery, arrived, contents)
            loaded = self._executor.ready(job.model, job.variant)
            if loaded is not None:
                prepare(job, loaded)
        except TaxiwayError as error:
            if isinstance(error, ModelUnavailableError):  # its folder may be behind the router's
                variant = delivery.ticket.variants[delivery.hardware_class]
                self._executor.lacks(variant_key(delivery.ticket.model, variant), str(error.details["reason"]))
            self._finish.put([Ended(delivery, Outcome(error=error))])
        except Exception as error:  # for this one request, whatever it was
            logger.exception("a request could not be read", extra={"job": delivery.job})
            failed = ExecutionError(f"the request could not be read: {describe(error)}")
            self._finish.put([Ended(delivery, Outcome(error=failed))])
        else:
            return [job]
        return []
