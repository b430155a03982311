"""Between a message and the device: jobs are claimed in bulk, and those that may run here are read and prepared.

The fetch thread brings what it has claimed already; the intake thread claims what Celery's consumer handed over, and
what another worker held a while ago. The device thread waits for neither.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from broker.valkey.claims import Claim, Verdict
from broker.valkey.worker_store import Store, insist
from tasks.heartbeat import variant_key
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    ExecutionError,
    ModelUnavailableError,
    TaxiwayError,
)
from workers.decide.faults import describe
from workers.stages.decode import Contents, Intake, prepare
from workers.stages.device import DeviceLoop
from workers.stages.job import Delivery, Dropped, Ended, Ending, Job, Outcome, late

logger = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Longest pause, in seconds, before a job that another worker holds is looked at again."""


class Reception:
    """Admits deliveries to the device.

    Args:
        end: takes what ended before it ran.
        bury: keeps the message of a job that is given up.
        give_back: takes, in the end, deliveries that another worker holds.
    """

    def __init__(
        self,
        intake: Intake,
        loop: DeviceLoop,
        store: Store,
        *,
        end: Callable[[Sequence[Ending]], None],
        bury: Callable[[Delivery, str], None],
        give_back: Callable[[Sequence[Delivery]], None],
    ) -> None:
        self._intake = intake
        self._loop = loop
        self._store = store
        self._end = end
        self._bury = bury
        self._give_back = give_back
        self._inbox: queue.SimpleQueue[tuple[float, Delivery] | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Delivery]] = []
        self._turn = itertools.count()
        self._stopping = threading.Event()

    def put(self, delivery: Delivery, *, pause: float = 0.0) -> None:
        """Have a delivery claimed after `pause` seconds. Any thread may."""
        self._inbox.put((time.monotonic() + pause, delivery))

    def stop(self) -> None:
        """End after what was put. Any thread may call it."""
        self._stopping.set()
        self._inbox.put(None)

    def run(self) -> None:
        """Claim and admit what is put, until stopped."""
        while not self._stopping.is_set():
            self._take()
            due = self._due()
            if due:
                claimed = [delivery for delivery in due if delivery.token and not delivery.lost]
                self._admit(claimed, time.monotonic())  # they run again
                with contextlib.suppress(BrokerUnavailableError):  # stopping: the messages are delivered again
                    self._claim([delivery for delivery in due if delivery.lost or not delivery.token])
        self._give_back([delivery for _, _, delivery in sorted(self._later)])

    def accept(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Admit deliveries by what the store said of their claims at `now`, by its clock. Any thread may."""
        arrived = time.monotonic()
        self._loop.set_clock(now - arrived)
        able = []
        for delivery in deliveries:
            assert delivery.claim is not None
            if delivery.claim.verdict is not Verdict.RUN:
                self._turn_away(delivery, delivery.claim, now)
            elif delivery.claim.attempts >= self._store.limits.attempts:
                self._give_up(delivery)
            else:
                able.append(delivery)
        self._admit(able, arrived)

    def _take(self) -> None:
        """Move what was put among what is due later, waiting until the first of that is due."""
        wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        with contextlib.suppress(queue.Empty):
            got = self._inbox.get(timeout=wait)
            while got is not None:
                heapq.heappush(self._later, (got[0], next(self._turn), got[1]))
                got = self._inbox.get_nowait()

    def _due(self) -> list[Delivery]:
        due = []
        while self._later and self._later[0][0] <= time.monotonic():
            due.append(heapq.heappop(self._later)[2])
        return due

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
        self.accept(deliveries, now)

    def _turn_away(self, delivery: Delivery, claim: Claim, now: float) -> None:
        if claim.verdict is Verdict.FINAL:
            self._end([Dropped(delivery)])
        elif claim.verdict is Verdict.LATE:
            self._end([late(delivery, now)])
        else:
            self.put(delivery, pause=min(max(claim.retry_in, 0.01), LOOK_AGAIN))

    def _give_up(self, delivery: Delivery) -> None:
        """End a job that has ended its workers, and keep its message for whoever looks into it."""
        attempts = self._store.limits.attempts
        error = DeadLetteredError(f"given up: {attempts} attempts to run it ended without an answer")
        self._bury(delivery, error.message)
        self._end([Ended(delivery, Outcome(error=error))])

    def _admit(self, deliveries: Sequence[Delivery], arrived: float) -> None:
        """Hand the jobs to the device, those at once whose inputs were fetched together."""
        with contextlib.suppress(BrokerUnavailableError):  # stopping while the store is away: they are delivered again
            for some, contents in self._intake.portions(deliveries):
                self._loop.put([job for one in some for job in self._admitted(one, arrived, contents)])

    def _admitted(self, delivery: Delivery, arrived: float, contents: Contents) -> list[Job]:
        """The job, prepared where its variant is loaded already; none where it cannot be read."""
        executor = self._loop.executor
        try:
            job = self._intake.admit(delivery, arrived, contents)
            loaded = executor.ready(job.model, job.variant)
            if loaded is not None:
                prepare(job, loaded)
        except TaxiwayError as error:
            if isinstance(
                error, ModelUnavailableError
            ):  # its folder may be behind the router's: others are asked first
                variant = delivery.ticket.variants[delivery.hardware_class]
                executor.lacks(variant_key(delivery.ticket.model, variant), str(error.details["reason"]))
            self._end([Ended(delivery, Outcome(error=error))])
        except Exception as error:  # for this one request, whatever it was
            logger.exception("a request could not be read", extra={"job": delivery.job})
            failed = ExecutionError(f"the request could not be read: {describe(error)}")
            self._end([Ended(delivery, Outcome(error=failed))])
        else:
            return [job]
        return []
