"""What Celery's consumer accepts, and how Celery's results are stored.

Only a message signed by a router of this fleet becomes a Celery request. Any other message becomes a dead letter, and
its job ends with an error. A job that a router signed is ended under a claim, like a run. The origin of an unsigned
message is unknown: it ends the job that it names only if no job of that id was ever accepted.

The result backend writes a final result once, for the worker whose claim holds, and announces it.

What follows from a job goes to the broker, or back to RabbitMQ if the job came from there. A worker does not reach
RabbitMQ: its messages wait in an outbox, which a router's bridge publishes.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from celery import Celery, signals, states
from celery.app.amqp import AMQP
from celery.app.task import Context, Task
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.exceptions import BackendError
from celery.worker.strategy import default
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.message import Message
from kombu.utils.objects import cached_property
from redis.exceptions import RedisError

from broker.valkey import run
from broker.valkey.jobs import REFUSED_TOKEN, Ending, Verdict, finish_call
from broker.valkey.worker_store import WorkerStore
from tasks.ticket import Ticket, TicketError, ticket_for
from taxiway.contract.job import JobState, failure_meta, state_of
from taxiway.contract.keys import AMQP_OUTBOX, DEFAULT_QUEUE
from taxiway.contract.request import is_name
from taxiway.contract.wire import BRIDGED, DESTINATION, HEADER, Envelope, encode_envelope, misplaced
from taxiway.errors import BrokerUnavailableError, ExecutionError, InvalidRequestError, TaxiwayError, bounded
from workers.device import WorkerContext
from workers.stages.held import add_dead_letter
from workers.stages.job import REVOKED, Ended

_contexts: WeakKeyDictionary[Celery, WorkerContext] = WeakKeyDictionary()

logger = logging.getLogger(__name__)

_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What headers of unforeseen types raise in Celery."""

_OUTAGES = (BackendError, BrokerUnavailableError, OperationalError, OSError, RedisError)

STORED = "taxiway_stored"
"""Set in a request's context once its result has been written."""

TOKEN = "taxiway_token"
"""The fencing token in a request's context."""

ENDED = "taxiway_ended"
"""The job's end in a request's context."""

_propagates: ContextVar[bool] = ContextVar("propagates", default=False)
"""Whether this thread reports the end of a job to the tasks that follow from it."""


@contextmanager
def _within(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def bind_context(app: Celery, context: WorkerContext) -> None:
    """Give the app its configuration."""
    _contexts[app] = context


def context_of(app: Celery) -> WorkerContext:
    """The configuration that the app was given."""
    return _contexts[app]


Handler = Callable[..., Any]


def ordered(task: Task[Any, Any], app: Celery, consumer: Any) -> Handler:
    """Celery's own strategy behind the check of the ticket. Set as the `Strategy` of every task of the app.

    `expires` is taken off: the ticket's deadline covers it, by the store's clock and with an error of its own.
    So is `ignore_result`: Celery would not say that a job was revoked, and every job ends.
    """
    handle = default(task, app, consumer)
    context = context_of(app)

    def check(message: Any, body: Any, ack: Handler, reject: Handler, callbacks: Any, **rest: Any) -> Any:
        try:
            ticket = ticket_of(message, context)
        except TicketError as error:
            consumer.pool.refuse(message, str(error))
            return ack(logger, consumer.connection_errors)
        message.headers = {**message.headers, HEADER: ticket, "expires": None, "ignore_result": False}
        return handle(message, body, ack, reject, callbacks, **rest)

    return check


@signals.task_unknown.connect
@signals.task_rejected.connect
def keep_refused(sender: Any, message: Any, exc: BaseException | None, **_: Any) -> None:
    """Keep a message that Celery's consumer itself refuses: an unknown task, or nothing that is a task at all."""
    sender.pool.refuse(message, f"no task of ours: {exc!r}")


def guarded(consumer: Any) -> None:
    """Have a consumer reject what Celery itself cannot take: no message may end the worker, nor stay in it."""
    make = consumer.create_task_handler

    def reject(message: Any, error: BaseException) -> None:
        consumer.pool.refuse(message, f"no task of ours: {error!r}")
        message.ack_log_error(logger, consumer.connection_errors)

    def make_handler(*args: Any) -> Handler:
        receive = make(*args)

        def check(message: Any) -> None:
            try:
                receive(message)
            except _MALFORMED as error:
                reject(message, error)

        return check

    consumer.create_task_handler = make_handler
    consumer.on_decode_error = consumer.task_consumer.on_decode_error = reject


def ticket_of(message: Any, context: WorkerContext) -> Ticket:
    """The ticket of a message that may run here; raises `TicketError` as `ticket_for` does."""
    headers = message.headers
    body, keys = bytes_of(message.body), context.settings.secret
    return ticket_for(class_of(message), headers.get("task"), headers.get("id"), headers.get(HEADER), body, keys)


def class_of(message: Any) -> str:
    """The hardware class whose queue a kombu message came from."""
    return str(message.delivery_info["routing_key"])


def bytes_of(body: Any) -> bytes:
    """A message's body, which transports give as bytes, a buffer or text."""
    return body.encode() if isinstance(body, str) else bytes(body)


def refuse(store: WorkerStore, context: WorkerContext, message: Any, reason: str) -> None:
    """Keep a message of Celery's consumer among the dead letters, and end its job with the reason."""
    keep_message(store, message, reason)
    try:
        _end(store, context, message, reason)
    except BrokerUnavailableError as error:  # the job ends at its deadline
        logger.error("a refused job could not be ended", extra={"error": error.message})


def keep_message(store: WorkerStore, message: Any, reason: str) -> None:
    """Keep a message of Celery's consumer among the dead letters, with the reason."""
    add_dead_letter(store, encode_envelope(envelope_of(message)), reason, (message.headers or {}).get("id"))


def is_outage(error: Exception) -> bool:
    """Whether a server was at fault that what follows from a task was not sent; otherwise its signature is wrong."""
    return isinstance(error, _OUTAGES)


def envelope_of(message: Any) -> Envelope:
    """A kombu message in our form; header values that JSON lacks become text."""
    return Envelope(
        body=base64.b64encode(bytes_of(message.body)).decode("ascii"),
        headers=_plain(message.headers),
        properties=_plain(message.properties) | {"body_encoding": "base64"},
        content_type=str(message.content_type),
        content_encoding=str(message.content_encoding),
    )


def _plain(fields: dict[str, Any] | None) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(fields or {}, enc_hook=str, str_keys=True)
    try:
        msgspec.json.encode(plain)
    except (ValueError, RecursionError):  # JSON lets lone surrogates through
        return {"unreadable": bounded(ascii(plain))}
    return plain


def _end(store: WorkerStore, context: WorkerContext, message: Any, reason: str) -> None:
    try:
        ticket = _ordered(message, context)
    except TicketError:
        job = (message.headers or {}).get("id")
        if is_name(job):
            store.finish([_ending(job, misplaced(class_of(message)), REFUSED_TOKEN)])
        return
    _, (claim,) = store.claim([(ticket.job, ticket.deadline_at)])
    if claim.verdict is Verdict.RUN:
        error = InvalidRequestError(f"a worker refused the message: {reason}", field="message")
        store.finish([_ending(ticket.job, error, claim.token, ticket.reply)])


def _ordered(message: Any, context: WorkerContext) -> Ticket:
    """The router's order; raises `TicketError` where there is none. Celery may have refused what had been checked."""
    checked = message.headers.get(HEADER)
    return checked if isinstance(checked, Ticket) else ticket_of(message, context)


def _ending(job: str, error: TaxiwayError, token: str, reply: str = "") -> Ending:
    return Ending(job, state_of(error), failure_meta(job, error), token, reply)


class WriteOnceBackend(RedisBackend):
    """Writes final results of ticketed jobs by `FINISH`; everything else as Celery does.

    A message without a checked ticket can make a Celery worker write a result (an unknown task, for instance): that
    would end another's job, so nothing is written for it.
    """

    app: Celery

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: str | None = None, request: Any = None, **kwargs: Any
    ) -> Any:
        ticket = getattr(request, HEADER, None)
        if not isinstance(ticket, Ticket):
            if self._on_behalf_of_a_job():  # Celery fails what is chained after a failed job
                self._store_as_celery(task_id, result, state, traceback, request, **kwargs)
            return result
        if state not in states.READY_STATES:
            self._store_as_celery(task_id, result, state, traceback, request, **kwargs)
        elif not getattr(request, STORED, False):
            self._finish(ticket, result, state, request)
        return result

    def propagate(self, job: str, fields: dict[str, Any]) -> None:
        """Report a job's end, which this worker did not write, to its chord, and a failure to its chain and errbacks.

        Args:
            job: its result is stored.
            fields: the context of its request, with the tasks that follow from it.
        """
        stored: Any = self.get_task_meta(job)
        context: Any = Context(fields | {STORED: True})
        with _within(_propagates, True):
            if stored["status"] == states.FAILURE:
                self.mark_as_failure(job, stored["result"], request=context)
            elif stored["status"] in states.READY_STATES and context.chord:
                self.on_chord_part_return(context, stored["status"], stored["result"])

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """End a job as revoked, and its chord with it."""
        signed = isinstance(getattr(request, HEADER, None), Ticket)
        with _within(_propagates, True) if signed else nullcontext():
            super().mark_as_revoked(task_id, reason, request, store_result, state)

    def _store_as_celery(self, *args: Any, **kwargs: Any) -> None:
        super()._store_result(*args, **kwargs)  # type: ignore[misc]  # celery-types lacks it

    def _on_behalf_of_a_job(self) -> bool:
        if _propagates.get():
            return True
        task = self.app.current_worker_task
        return task is not None and isinstance(getattr(task.request, HEADER, None), Ticket)

    def _finish(self, ticket: Ticket, result: Any, state: str, request: Any) -> None:
        ending = self._ending(ticket, result, state, request)
        limits = context_of(self.app).topology.limits
        call = finish_call([ending], keep_result=limits.keep_result, keep_record=limits.keep_record)
        written = self.ensure(lambda: run(self.client, call), ())
        if not written[0]:
            logger.warning(
                "a result was not written: the job has ended or its claim is lost", extra={"job": ticket.job}
            )

    def _ending(self, ticket: Ticket, result: Any, state: str, request: Any) -> Ending:
        token, ended = getattr(request, TOKEN, ""), getattr(request, ENDED, None)
        if state == states.SUCCESS:
            meta = self._get_result_meta(result, state, None, request)  # type: ignore[attr-defined]  # as above
            encoded: Any = self.encode(meta | {"task_id": ticket.job})
            generated = ended.generated if ended is not None else ()
            return Ending(ticket.job, JobState.SUCCEEDED, bytes_of(encoded), token, ticket.reply, generated)
        error = _error(result, state, ended)
        return Ending(ticket.job, state_of(error), failure_meta(ticket.job, error), token, ticket.reply)


class WriteOnceSentinelBackend(WriteOnceBackend, SentinelBackend):
    """The same at the primary that sentinels name."""


def _error(result: Any, state: str, ended: Ended | None) -> TaxiwayError:
    """The error that a result in Celery's form stands for; the job's own where there is one."""
    if state == states.REVOKED:
        return REVOKED
    if ended is not None and ended.error is not None:
        return ended.error
    named = result if isinstance(result, dict) else {"exc_message": str(result)}
    return ExecutionError(f"{named.get('exc_type', 'error')}: {named.get('exc_message')}")


_OUTBOX = Queue(AMQP_OUTBOX, routing_key=AMQP_OUTBOX)

_bridged: ContextVar[bool] = ContextVar("bridged", default=False)
"""Whether what this thread sends follows from a job that came from RabbitMQ."""


def sending_where_it_came_from(message: Message) -> AbstractContextManager[None]:
    """Send what follows from the message's job to the server that the message came from."""
    return _within(_bridged, bool(message.properties.get(BRIDGED)))


class BridgedAMQP(AMQP):
    """Celery's sender of messages, for jobs of either server. A message to RabbitMQ names its queue, no exchange."""

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        """Send a task's message."""
        send = self._create_task_sender()  # type: ignore[attr-defined]  # celery-types lacks it

        def send_where_it_came_from(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if not _bridged.get():
                return send(producer, name, message, **options)
            rest = {key: value for key, value in options.items() if key not in _ADDRESS}
            destination = {DESTINATION: _destination(**options)}
            quiet = message._replace(sent_event=None)  # there, the fleet's events have no listener
            return send(producer, name, quiet, queue=_OUTBOX, declare=[], **rest, **destination)

        return send_where_it_came_from


_ADDRESS = ("queue", "exchange", "routing_key", "exchange_type", "declare", "priority")


def _destination(queue: Any = None, routing_key: str = "", priority: int | None = None, **_: Any) -> dict[str, Any]:
    return {"queue": getattr(queue, "name", queue) or routing_key or DEFAULT_QUEUE, "priority": priority}
