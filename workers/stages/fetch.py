"""Stage 1: fetches messages from the class queues in bulk, only as many as the next batches need.

It pauses while too many results are unwritten: held claims must be renewed, and held jobs cannot move.

Plain jobs are claimed by the same broker script and admitted on this thread, which saves the admit queue. A short job
that comes alone to an idle device also runs on this thread, and its result is written here: an idle worker is one
thread, and waking two others would take longer than such a job.

Messages that Celery must handle (a canvas, an eta, a message to be refused) go to its consumer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.valkey.class_queue import ClassQueue, FetchedMessage, TakenMessages
from taxiway.backoff import Outage
from taxiway.contract.keys import LEVELS
from taxiway.contract.wire import decode_envelope
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from workers.device import WorkerContext
from workers.stages.admit import AdmitStage, read_plain
from workers.stages.finish import FinishStage
from workers.stages.held import add_dead_letter
from workers.stages.job import Delivery, RunningJob
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import DeviceDriver, Shared

logger = logging.getLogger(__name__)

LONGEST_WAIT = 1.0
"""Maximum seconds of one wait for messages: a connection may have died silently."""

_REST = 0.0002
"""Seconds for which this stage leaves the interpreter to the device and the finish stage, if a job woke them.

It then takes 0.1 ms less.
"""

_LOOKS = 4  # polls during the run time of the patient work waiting here, whose place is free by then


@dataclass(slots=True, eq=False)
class FetchStage:
    """Keeps the device supplied from the class queues that Celery's consumer names."""

    class_queue: ClassQueue
    admit: AdmitStage
    """Admits claimed deliveries."""
    device: DeviceDriver
    """States how many jobs it has capacity for, and runs a job that came alone."""
    finish: FinishStage
    """Writes the result of such a job."""
    counters: WorkerOutcomes
    shared: Shared
    context: WorkerContext
    _woken: bool = False  # fewer messages came than there was capacity for, as one queue was waited for
    _ran_alone: bool = False
    _resumed: threading.Event = field(default_factory=threading.Event)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def resume(self) -> None:
        """Start fetching: Celery's consumer is connected."""
        self._resumed.set()

    def pause(self) -> None:
        """Stop fetching until resumed."""
        self._resumed.clear()

    def stop(self) -> None:
        """End. Any thread may call it."""
        self._stopping.set()
        self._resumed.set()
        self.class_queue.wake()

    def run(self) -> None:
        """Fetch until stopped."""
        outage = Outage(logger, "cannot fetch")
        while not self._stopping.is_set():
            try:
                self._fetch()
                outage.over()
            except BrokerUnavailableError as error:
                self._stopping.wait(outage.pause(error))

    def _fetch(self) -> None:
        self._resumed.wait()
        short = self.shared.endings.wait_until_short(LONGEST_WAIT)
        capacity = self.device.wait_for_capacity(LONGEST_WAIT) if short else 0
        queues = self._queues()
        receiving = self.shared.celery.receiving
        capacity -= receiving
        if not queues or capacity <= 0:
            self._stopping.wait(0.0 if queues and not receiving else 0.01)
            return
        levels = self.device.levels()
        blocks_again, self._woken = self._woken and len(queues) == 1, False
        if not blocks_again:
            for queue in queues:
                if capacity > 0:
                    capacity -= self._receive(self.class_queue.take(queue, capacity, levels))
        if capacity > 0:
            self._wait(queues, levels, capacity, announces=blocks_again)

    def _wait(self, queues: Sequence[str], levels: int, capacity: int, *, announces: bool) -> None:
        """Wait for messages, and pass them on."""
        longest = LONGEST_WAIT if levels == LEVELS else self.device.ahead / _LOOKS
        fetches = self.class_queue.wait(queues, longest, levels, capacity if announces else 0)
        self._woken, self._ran_alone = 0 < sum(len(fetched.messages) for fetched in fetches) < capacity, False
        for fetched in fetches:
            if fetched.queue in self._queues() and not self.device.resting:
                self._receive(fetched, alone=len(fetches) == 1)
            else:
                self._return(fetched)
        if fetches and not self._ran_alone:
            time.sleep(_REST)

    def _queues(self) -> list[str]:
        """The queues that Celery's consumer names, the worker's own class first; none while it is not connected.

        Nor does a worker take from any as it drains: it would take again what it has just returned.
        """
        if not self._resumed.is_set() or self.shared.drain.begun:
            return []
        return sorted(self.shared.celery.queues(), key=lambda name: (name != self.context.options.hardware_class, name))

    def _receive(self, fetched: TakenMessages, *, alone: bool = True) -> int:
        """Pass on fetched messages; returns their number. `alone` says that no others were fetched with them."""
        claimed: list[Delivery] = []
        for_celery: list[FetchedMessage] = []
        for one in fetched.messages:
            delivery = read_plain(one, self.context.settings.secret, fetched.queue)
            if delivery is None:
                for_celery.append(one)
            else:
                claimed.append(delivery)
        self.shared.store.release([(one.job, one.token) for one in for_celery if one.token])
        for one in for_celery:  # after their claims were released: Celery's consumer claims what it refuses
            self._hand_over(one, fetched.queue)
        self.shared.held.hold(claimed)
        if claimed:
            alone = alone and len(fetched.messages) == 1
            self.admit.admit(claimed, fetched.now, self._run_alone if alone else None)
        return len(fetched.messages)

    def _run_alone(self, job: RunningJob) -> bool:
        """Run a job that came alone and write its result, if it is short and the device idle; whether it was run."""
        with self.shared.endings.collected() as ended:
            self._ran_alone = self.device.run_alone(job)
        self.finish.end_here(ended)
        return self._ran_alone

    def _return(self, fetched: TakenMessages) -> None:
        """Return messages that the worker does not take any more."""
        self.shared.store.release([(one.job, one.token) for one in fetched.messages if one.token])
        self.class_queue.put_back([one.tag for one in fetched.messages])

    def _hand_over(self, taken: FetchedMessage, queue: str) -> None:
        """Pass a message to Celery's consumer."""
        try:
            envelope = decode_envelope(taken.raw)
            body = envelope.payload()
        except InvalidRequestError as error:
            self.counters.reject(queue)
            add_dead_letter(self.shared.store, taken.raw, error.message, None)
            self.class_queue.acknowledge([taken.tag])
            return
        self.shared.celery.receive(envelope, body, tag=taken.tag, queue=queue)
