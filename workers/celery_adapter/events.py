"""Celery's task events of the jobs that did not pass through its consumer, sent in groups."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

import msgspec
from celery.utils.time import utcoffset
from kombu.clocks import LamportClock
from msgspec import UNSET, UnsetType

from broker.valkey.queues import EVENTS, kombu_event
from taxiway.contract.job import RunProgress
from taxiway.errors import BrokerUnavailableError, DeadlineExceededError, JobCancelledError, TaxiwayError
from workers.stages.job import Delivery, Ended

SHOWN = 128
"""Characters of a result in its event, for Flower; the whole of it costs Celery more than all the rest of an echo."""

SHOW_EVERY = 0.25
"""Seconds after which a job that still runs is shown; events are sent as often. Flower's pages are slower."""

AT_MOST = 500
"""Events in one group; a full group is sent at once."""

SILENCE = 0.5
"""Seconds for which events are left out after a group that no monitor received."""

EVENTS_KEPT = 50_000
"""Events that wait while the broker is unavailable; the oldest are dropped."""

_RESULT = b'"result":'
_GROUP = "task.multi"  # Celery's routing key for a group of task events

_encode = msgspec.json.Encoder().encode


class TaskEvent(msgspec.Struct, omit_defaults=True):
    """One of Celery's task events; fields that a kind does not have are unset."""

    type: str
    uuid: str
    timestamp: float
    """Seconds since the epoch by this host's clock."""
    name: str | UnsetType | None = UNSET
    args: str | UnsetType | None = UNSET
    kwargs: str | UnsetType | None = UNSET
    root_id: str | UnsetType | None = UNSET
    parent_id: str | UnsetType | None = UNSET
    retries: int | UnsetType = UNSET
    eta: UnsetType | None = UNSET
    expires: UnsetType | None = UNSET
    result: str | UnsetType = UNSET
    runtime: float | UnsetType = UNSET
    exception: str | UnsetType = UNSET
    traceback: str | UnsetType = UNSET
    terminated: bool | UnsetType = UNSET
    signum: UnsetType | None = UNSET
    expired: bool | UnsetType = UNSET
    hostname: str = ""
    utcoffset: float = 0.0
    pid: int = 0
    clock: int = 0


class TaskEvents:
    """Collects events, and sends them in groups, each group at one moment of the worker's logical clock.

    `publish` sends a message on a topic and returns how many received it.
    `wanted` says whether the worker sends task events now.
    """

    def __init__(self, hostname: str, clock: LamportClock, publish: Callable[[str, bytes], int]) -> None:
        self.wanted: Callable[[], bool] = lambda: False
        self._publish = publish
        self._clock = clock
        self._hostname = hostname
        self._waiting: deque[TaskEvent] = deque(maxlen=EVENTS_KEPT)
        self._silent_until = 0.0

    def add(self, event: TaskEvent) -> None:
        """Let an event wait to be sent, unless no monitor listens. Any thread may."""
        if self.wanted() and time.monotonic() >= self._silent_until:
            self._waiting.append(event)

    @property
    def waiting(self) -> int:
        """How many events wait."""
        return len(self._waiting)

    def flush(self) -> None:
        """Send what waits. One thread calls it."""
        while self._waiting:
            group = [self._waiting.popleft() for _ in range(min(len(self._waiting), AT_MOST))]
            clock, offset, pid = self._clock.forward(), utcoffset(), os.getpid()
            for event in group:
                event.hostname, event.utcoffset, event.pid, event.clock = self._hostname, offset, pid, clock
            try:
                if not self._publish(f"{EVENTS}/{_GROUP}", kombu_event(_GROUP, _encode(group))):
                    self._silent_until = time.monotonic() + SILENCE
            except BrokerUnavailableError:
                self._waiting.extendleft(reversed(group))
                return


def received(delivery: Delivery) -> TaskEvent:
    """The event of a plain job that a worker received."""
    headers = delivery.headers
    assert headers is not None
    return TaskEvent(
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


def progressed(job: str, progress: RunProgress) -> TaskEvent:
    """The event of a job whose callable reports: Flower shows the state PROGRESS, and the report as its result."""
    return TaskEvent("task-progress", job, time.time(), result=progress.text)


def event_of(ended: Ended) -> TaskEvent:
    """The event of a plain job that ended."""
    job, now = ended.delivery.job, time.time()
    if ended.result is not None:
        at = ended.meta.find(_RESULT) + len(_RESULT)
        shown = ended.meta[at : at + SHOWN].decode(errors="replace")
        return TaskEvent("task-succeeded", job, now, result=shown, runtime=ended.result.report.run_time)
    assert ended.error is not None
    return stopped(ended.delivery, ended.error) or _failed(job, ended.error)


def stopped(delivery: Delivery, error: TaxiwayError | None) -> TaskEvent | None:
    """The event of a job that was cancelled or expired, with the error as its exception; None for other errors.

    As in Celery's result, a missed deadline is a failure: Flower counts it.
    """
    if isinstance(error, DeadlineExceededError):
        return _failed(delivery.job, error)
    if not isinstance(error, JobCancelledError):
        return None
    return TaskEvent(
        "task-revoked",
        delivery.job,
        time.time(),
        terminated=bool(delivery.began),
        signum=None,
        expired=False,
        exception=repr(error),
    )


def _failed(job: str, error: TaxiwayError) -> TaskEvent:
    return TaskEvent("task-failed", job, time.time(), exception=repr(error), traceback="")
