"""What a worker adds to Celery's consumer: it fetches in bulk, serves what its device may, and groups its events.

Celery's `inspect` and Flower also see the jobs that never passed through the consumer.

Calls and acknowledgements run on the consumer's thread, which owns its connection. A message from a broker that is not
the state store is acknowledged once the store keeps its job's end on disk. A store that is killed may come back without
the last second of its writes. An end that it lost is written again if it is known here, so that no client gets another;
any other message goes back to its queue, and its job runs again. A message that waits here does not count as
prefetched: the consumer may take as many more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from celery import bootsteps
from celery.app.task import Task
from celery.utils.time import utcoffset
from celery.worker import state
from celery.worker.control import control_command
from kombu.clocks import LamportClock
from msgspec import UNSET, UnsetType

from broker.valkey.queues import EVENTS, kombu_event
from broker.valkey.records import Ending, Verdict
from broker.valkey.worker import Store, insist
from tasks.ticket import Ticket
from taxiway.errors import BrokerUnavailableError, DeadlineExceededError, JobCancelledError, TaxiwayError
from workers.celery_adapter.strategy import guarded
from workers.stages.held import HeldJobs
from workers.stages.job import Delivery, Outcome, Revoked
from workers.stages.queues import EndingSink

SHOW_EVERY = 0.25
"""Seconds after which a job that still runs is shown; events are sent as often. Flower's pages are slower."""

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
    """Shows plain jobs to remote control, and reports them as task events. Threads may share it.

    Args:
        task: the task that the jobs are of.
    """

    def __init__(self, task: Task[Any, Any], hostname: str, events: TaskEvents, thread: ConsumerThread) -> None:
        self.events = events
        self._task = task
        self._hostname = hostname
        self._thread = thread
        self._shown: dict[Delivery, PlainRequest] = {}
        self._lock = threading.Lock()

    def show(self, held: HeldJobs, endings: EndingSink) -> list[Delivery]:
        """Show what stays; on the consumer's thread. Returns what runs without the store knowing.

        `endings` takes the jobs that an operator terminates.
        """
        with self._lock:
            now = time.time()
            staying = [delivery for delivery in held.all() if _stays(delivery, now)]
            for delivery in staying:
                if delivery.task is None:
                    self._show(delivery, endings)
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

    def _show(self, delivery: Delivery, endings: EndingSink) -> None:
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

    def _report_start(self, delivery: Delivery, shown: PlainRequest | None) -> None:
        """Report what was not reported of a job that ends."""
        if shown is None:
            self.events.add(received(delivery))
        if delivery.began and (shown is None or shown.time_start is None):
            self.events.add(TaskEvent("task-started", delivery.job, delivery.began))
            state.total_count[self._task.name] += 1
            state.all_total_count[0] += 1


def _stays(delivery: Delivery, now: float) -> bool:
    """Whether it runs or waits for so long that it is shown."""
    return 0 < delivery.began <= now - SHOW_EVERY or delivery.received <= now - SHOW_WAITING


logger = logging.getLogger(__name__)

EVENTS_AT_MOST = 500
"""Events in one group; a full group is sent at once."""


@control_command(args=[("queue", str)], signature="<class>")
def add_consumer(state: Any, queue: str, **_: Any) -> dict[str, str]:
    """Serve one more hardware class, if the device may. Replaces Celery's own command."""
    reason = state.consumer.pool.unfit_for(queue)
    if reason is not None:
        return {"error": reason}
    state.consumer.call_soon(state.consumer.add_task_queue, queue)
    return {"ok": f"add consumer {queue}"}


class Fetching(bootsteps.StartStopStep):
    """Has the fetch stage take messages from Valkey and Redis, instead of kombu's consumer.

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
        dispatcher.buffer_limit = EVENTS_AT_MOST
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


_BEAT = 1.0  # seconds between two heartbeats to RabbitMQ while Celery's loop rests


class ConsumerThread:
    """Calls to be made on the consumer's thread. Any thread may `call`; the rest is for that thread.

    `connection` is that of Celery's consumer, and `qos` says how many messages it may take ahead.
    """

    def __init__(self) -> None:
        self.connection: Any = None
        self.qos: Any = None
        self._loop: Any = None
        self._callbacks: deque[Callable[[], object]] = deque()
        self._beat_at = 0.0

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

    def stand_in(self) -> None:
        """Do what Celery's loop did, once that has ended: make calls, and send RabbitMQ its heartbeats."""
        self.run()
        now = time.monotonic()
        if self.connection is not None and self.connection.supports_heartbeats and now > self._beat_at + _BEAT:
            self._beat_at = now
            with contextlib.suppress(OSError):
                self.connection.connection.send_heartbeat()


MOST = 10_000
"""Messages that may wait here before a worker takes fewer: AMQP counts them in 16 bits."""


@dataclass(frozen=True, slots=True)
class _Message:
    """A message whose job has ended, with its copy's deadline; `settle` is told whether to acknowledge it.

    `ending` is what this worker wrote, None where that cannot be written again.
    """

    job: str
    deadline_at: float
    ending: Ending | None
    settle: Callable[[bool], None]


class Acknowledgements:
    """Messages whose jobs' ends are on their way to the store's disk.

    Any thread may `remember`; all but that and `run` is for the consumer's thread.
    """

    def __init__(self, store: Store, thread: ConsumerThread) -> None:
        self._store = store
        self._thread = thread
        self._endings: dict[str, Ending] = {}
        self._waiting: list[_Message] = []
        self._unsettled = 0
        self._changed = threading.Condition()
        self._given_up = threading.Event()

    def remember(self, ending: Ending) -> None:
        """Keep an end that was written, until its message is acknowledged."""
        self._endings[ending.job] = ending

    def after_end(self, ticket: Ticket, ack: Callable[..., Any], reject: Callable[..., Any]) -> Callable[..., None]:
        """What Celery calls instead of `ack`; `reject` puts the message back into its queue."""

        def later(*args: Any) -> None:
            grown = self._unsettled < MOST
            qos = self._thread.qos
            if grown:
                qos.increment_eventually()
            self._unsettled += 1

            def settle(over: bool) -> None:
                self._unsettled -= 1
                if grown:
                    qos.decrement_eventually()
                if over:
                    ack(*args)
                else:
                    reject(*args, True)

            self._put(_Message(ticket.job, ticket.deadline_at, self._endings.pop(ticket.job, None), settle))

        return later

    def stop(self) -> None:
        """End after what the consumer has acknowledged so far, or when the store does not answer."""
        self._thread.run()
        self._given_up.set()
        with self._changed:
            self._changed.notify()

    def run(self) -> None:
        """Serve until stopped."""
        while messages := self._take():
            try:
                over = insist(partial(self._over, messages), self._given_up, _log_unavailable)
                lost = [message for message, is_over in zip(messages, over, strict=True) if not is_over]
                written = insist(partial(self._write_again, lost), self._given_up, _log_unavailable) if lost else set()
            except BrokerUnavailableError:
                return  # the messages are delivered again
            for message, is_over in zip(messages, over, strict=True):
                if message.job in written:
                    self._put(message)
                else:
                    self._thread.call(partial(message.settle, is_over))

    def _over(self, messages: list[_Message]) -> list[bool]:
        return self._store.over([(message.job, message.deadline_at) for message in messages])

    def _write_again(self, lost: list[_Message]) -> set[str]:
        """Write the ends that are known here under new claims; the jobs that ended so."""
        endings = [message.ending for message in lost if message.ending is not None]
        _, claims = self._store.claim([(ending.job, 0.0) for ending in endings])
        ours = [
            replace(ending, token=claim.token)
            for ending, claim in zip(endings, claims, strict=True)
            if claim.verdict is Verdict.RUN
        ]
        written = {one.job for one, done in zip(ours, self._store.finish(ours), strict=True) if done}
        extra = {"written again": len(written), "to run again": len(lost) - len(written)}
        logger.warning("the store lost ends of jobs", extra=extra)
        return written

    def _put(self, message: _Message) -> None:
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def _take(self) -> list[_Message]:
        """All that waits, at least one message; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._given_up.is_set())
            messages, self._waiting = self._waiting, []
        return messages


def _log_unavailable(why: str) -> None:
    logger.warning("cannot acknowledge", extra={"error": why})


SHOWN = 128
"""Characters of a result in its event, for Flower; the whole of it costs Celery more than all the rest of an echo."""

AT_MOST = 500
"""Events in one group; a full group is sent at once."""

KEPT = 50_000
"""Events that wait while the broker is unavailable; the oldest are dropped."""

_RESULT = b'"result":'
_GROUP = "task.multi"  # Celery's routing key for a group of task events

_encode = msgspec.json.Encoder().encode


class TaskEvent(msgspec.Struct, omit_defaults=True):
    """One of Celery's task events, at `timestamp` by this host's clock."""

    type: str
    uuid: str
    timestamp: float
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

    Args:
        publish: sends a message on a topic.

    `wanted` says whether the worker sends task events now.
    """

    def __init__(self, hostname: str, clock: LamportClock, publish: Callable[[str, bytes], None]) -> None:
        self.wanted: Callable[[], bool] = lambda: False
        self._publish = publish
        self._clock = clock
        self._hostname = hostname
        self._waiting: deque[TaskEvent] = deque(maxlen=KEPT)

    def add(self, event: TaskEvent) -> None:
        """Let an event wait to be sent. Any thread may."""
        if self.wanted():
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
                self._publish(f"{EVENTS}/{_GROUP}", kombu_event(_GROUP, _encode(group)))
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


def ended(delivery: Delivery, outcome: Outcome) -> TaskEvent:
    """The event of a plain job that ended."""
    job, now = delivery.job, time.time()
    if outcome.result is not None:
        at = outcome.meta.find(_RESULT) + len(_RESULT)
        shown = outcome.meta[at : at + SHOWN].decode(errors="replace")
        return TaskEvent("task-succeeded", job, now, result=shown, runtime=outcome.result.report.run_time)
    assert outcome.error is not None
    failed = TaskEvent("task-failed", job, now, exception=repr(outcome.error), traceback="")
    return revoked(delivery, outcome.error) or failed


def revoked(delivery: Delivery, error: TaxiwayError | None) -> TaskEvent | None:
    """The event of a job that was cancelled or expired, with the error as its exception; None for other errors.

    Flower shows the exception, but not the flag `expired`.
    """
    if not isinstance(error, (JobCancelledError, DeadlineExceededError)):
        return None
    return TaskEvent(
        "task-revoked",
        delivery.job,
        time.time(),
        terminated=bool(delivery.began),
        signum=None,
        expired=isinstance(error, DeadlineExceededError),
        exception=repr(error),
    )
