"""What a worker changes of Celery's consumer: it fetches in bulk, serves what its device may, and groups its events.

It shows its jobs to Celery's `inspect` and Flower, and reports them as task events, also those that never passed
through the consumer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from celery import bootsteps
from celery.app.task import Task
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.utils.time import utcoffset
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.control import control_command
from kombu.clocks import LamportClock
from msgspec import UNSET, UnsetType
from redis.exceptions import NoPermissionError

from broker.valkey.queues import EVENTS, kombu_event
from taxiway.contract.job import RunProgress
from taxiway.errors import BrokerUnavailableError, DeadlineExceededError, JobCancelledError, TaxiwayError
from workers.celery_adapter.strategy import guarded
from workers.stages.held import HeldJobs
from workers.stages.job import REVOKED, Delivery, Ended
from workers.stages.queues import EndingQueue

logger = logging.getLogger(__name__)

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


class ConsumerThread:
    """Calls to be made on the consumer's thread. Any thread may `call`; the rest is for that thread."""

    def __init__(self) -> None:
        self._loop: Any = None
        self._callbacks: deque[Callable[[], object]] = deque()

    def follow(self, loop: Any) -> None:
        """Set Celery's event loop; called after each connection."""
        self._loop = loop
        loop.call_soon(self.run)

    def call(self, callback: Callable[[], object]) -> None:
        """Have a callback run soon."""
        self._callbacks.append(callback)
        if len(self._callbacks) == 1 and self._loop is not None:  # else it is awake, and makes this call too
            self._loop.call_soon(self.run)

    def run(self) -> None:
        """Make the calls that wait."""
        while self._callbacks:
            try:
                self._callbacks[0]()
            except Exception:  # one task's acknowledgement must not end the consumer's loop
                logger.exception("Celery could not end a task")
            finally:
                self._callbacks.popleft()


EXIT_REFUSED = os.EX_NOPERM
"""Exit status of a worker whose account at the broker lacks a right."""


@control_command(args=[("queue", str)], signature="<class>")
def add_consumer(state: Any, queue: str, **_: Any) -> dict[str, str]:
    """Serve one more hardware class, if the device may. Replaces Celery's own command."""
    reason = state.consumer.pool.unfit_for(queue)
    if reason is not None:
        return {"error": reason}
    state.consumer.call_soon(state.consumer.add_task_queue, queue)
    return {"ok": f"add consumer {queue}"}


class LoneConsumer(Consumer):
    """Celery's consumer without its exchange with other workers, which hold nothing that this one needs.

    At its start a worker would ask the others and wait until none has answered for a second.
    """

    def __init__(self, on_task_request: Any, *, worker_options: dict[str, Any], **kwargs: Any) -> None:
        alone = worker_options | {"without_mingle": True, "without_gossip": True}
        super().__init__(on_task_request, worker_options=alone, **kwargs)
        warnings.filterwarnings("ignore", r"\s*In Celery 5\.1 we introduced", CPendingDeprecationWarning)  # we chose

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Exit where the broker's account lacks a right; Celery would connect again at once, without end.

        Raises:
            WorkerShutdown: the server refused a command of the account.
        """
        if isinstance(exc, NoPermissionError):
            hint = (
                "`ACL LOG` at the broker names it; `python -m broker.accounts --acl FILE` writes what queues.yaml needs"
            )
            logger.critical(
                "the account at the state store lacks a right; worker exits", extra={"error": str(exc), "hint": hint}
            )
            raise WorkerShutdown(EXIT_REFUSED) from exc
        super().on_connection_error_after_connected(exc)

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying each second: Celery's pause grows to 30 s, for which what is placed here would wait."""
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=1, interval_step=0)
        return super().ensure_connected(conn)


class Fetching(bootsteps.StartStopStep):
    """Has the fetch stage take messages, instead of kombu's consumer.

    The consumer stays, and says which queues are consumed: `add_consumer` and `cancel_consumer` work on it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Start fetching, after each connection; skips classes of `-Q` that the device cannot serve."""
        for queue in consumer.task_consumer.queues:
            reason = consumer.pool.unfit_for(queue.name)
            if reason is not None:
                logger.error("a class is not served", extra={"class": queue.name, "reason": reason})
                consumer.cancel_task_queue(queue.name)
        guarded(consumer)
        consumer.pool.connect(consumer)

    def stop(self, consumer: Any) -> None:
        """Stop fetching: the connection is lost, or the worker ends."""
        consumer.pool.disconnect()


class GroupedEvents(bootsteps.StartStopStep):
    """Sends task events every `SHOW_EVERY` seconds; Celery would send them on each turn of its loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        """Make the dispatcher buffer events, after each connection."""
        dispatcher = consumer.event_dispatcher
        dispatcher.buffer_limit = AT_MOST
        dispatcher.on_send_buffered = None
        consumer.pool.bridge.events.wanted = lambda: dispatcher.enabled and "task" in (dispatcher.groups or {"task"})

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Start sending. Celery cancels the timer with the connection."""
        hub.call_repeatedly(SHOW_EVERY, consumer.event_dispatcher.flush)
        hub.call_repeatedly(SHOW_EVERY, consumer.pool.show)

    def shutdown(self, consumer: Any) -> None:
        """Send what the last batch brought."""
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.flush()


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
            staying = [
                delivery
                for delivery in held.all()
                if 0 < delivery.began <= now - SHOW_EVERY or delivery.received <= now - SHOW_WAITING
            ]
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
                lambda: endings.put([Ended(delivery, error=REVOKED)]),
            )
        if delivery.began and shown.time_start is None:
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            shown.start(time.monotonic() - time.time() + delivery.began)

    def _show_progress(self, progress: dict[Delivery, RunProgress]) -> None:
        """Report what is new of how far jobs are, also of those that Celery runs itself.

        Flower shows the state PROGRESS, and the report as the result.
        """
        for delivery, reported in progress.items():
            if self._progress.get(delivery) is not reported:
                self.events.add(TaskEvent("task-progress", delivery.job, time.time(), result=reported.text))
        self._progress = progress

    def _report_start(self, delivery: Delivery, shown: PlainRequest | None) -> None:
        """Report the unreported events of a job that ends."""
        if shown is None:
            self.events.add(received(delivery))
        if delivery.began and (shown is None or shown.time_start is None):
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            state.total_count[self._task.name] += 1
            state.all_total_count[0] += 1
