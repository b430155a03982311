"""Stage 2: claims jobs in bulk, decodes them and prepares those that may run here.

Jobs from the fetch thread are claimed already. The admit thread claims jobs from Celery's consumer, and jobs that
another worker held at the last attempt. The device thread waits for neither.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from broker.valkey.records import Claim, Verdict
from broker.valkey.worker import Store, insist
from tasks.heartbeat import variant_key
from taxiway.contract.values import Reference
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    ExecutionError,
    ModelUnavailableError,
    TaxiwayError,
)
from workers.context import WorkerContext
from workers.decide.faults import describe
from workers.stages.decode import Contents, JobReader, prepare
from workers.stages.driver import DeviceVariants
from workers.stages.held import HeldJobs
from workers.stages.job import Delivery, Dropped, Ended, Job, Outcome, late
from workers.stages.queues import AdmitQueue, DeviceQueue, EndingSink

logger = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Maximum seconds before the claim of a job that another worker holds is retried."""


class AdmitStage:
    """Admits deliveries to the device.

    Args:
        device: receives jobs to run.
        finish: receives jobs that ended before they ran.
        shutdown: set when the worker stops; jobs whose blobs cannot be read then return to their queue.
    """

    def __init__(
        self,
        inbox: AdmitQueue,
        device: DeviceQueue,
        finish: EndingSink,
        variants: DeviceVariants,
        store: Store,
        held: HeldJobs,
        context: WorkerContext,
        shutdown: threading.Event,
    ) -> None:
        self._inbox = inbox
        self._device = device
        self._finish = finish
        self._variants = variants
        self._store = store
        self._held = held
        self._reader = JobReader(context.folder, context.topology.hardware, self._fetch)
        self._shutdown = shutdown
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after the queued deliveries. Thread-safe."""
        self._stopping.set()
        self._inbox.close()

    def run(self) -> None:
        """Claim and admit due deliveries, until stopped."""
        while not self._stopping.is_set():
            due = self._inbox.take()
            if due:
                claimed = [delivery for delivery in due if delivery.token and not delivery.lost]
                self._admit(claimed, time.monotonic())  # they run again
                with contextlib.suppress(BrokerUnavailableError):  # stopping: the messages will be redelivered
                    self._claim([delivery for delivery in due if delivery.lost or not delivery.token])
        self._held.requeue(self._inbox.rest())

    def admit(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Admit deliveries according to their claims, as of `now` on the store's clock. Thread-safe."""
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
        """Fetch the blobs of requests, waiting until the store answers."""
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
        """Fail a job that crashed its workers, and keep its message as a dead letter."""
        attempts = self._store.limits.attempts
        error = DeadLetteredError(f"given up after {attempts} attempts that ended without an answer")
        self._held.dead_letter(delivery, error.message)
        self._finish.put([Ended(delivery, Outcome(error=error))])

    def _admit(self, deliveries: Sequence[Delivery], arrived: float) -> None:
        """Pass the jobs to the device, in groups whose inputs were fetched together."""
        with contextlib.suppress(BrokerUnavailableError):  # stopping while the store is unavailable: they are requeued
            for some, contents in self._reader.groups(deliveries):
                self._device.put([job for one in some for job in self._admitted(one, arrived, contents)])

    def _admitted(self, delivery: Delivery, arrived: float, contents: Contents) -> list[Job]:
        """The job, prepared if its variant is already loaded; empty if it cannot be read."""
        try:
            job = self._reader.read(delivery, arrived, contents)
            loaded = self._variants.ready(job.model, job.variant)
            if loaded is not None:
                prepare(job, loaded)
        except TaxiwayError as error:
            if isinstance(error, ModelUnavailableError):  # this worker's models folder may lag behind the router's
                variant = delivery.ticket.variants[delivery.hardware_class]
                self._variants.lacks(variant_key(delivery.ticket.model, variant), str(error.details["reason"]))
            self._finish.put([Ended(delivery, Outcome(error=error))])
        except Exception as error:  # any failure ends only this request
            logger.exception("request could not be read", extra={"job": delivery.job})
            failed = ExecutionError(f"the request could not be read: {describe(error)}")
            self._finish.put([Ended(delivery, Outcome(error=failed))])
        else:
            return [job]
        return []
