"""Arrivals and class queues on RabbitMQ, records in Valkey.

A job is recorded first, then published with a confirm, then marked as published, then its arrival is acknowledged: a
router that dies in between leaves an arrival that is delivered again, and a record that says whether it was published.
A message that is published twice is harmless: the claim before compute drops the copy.

A move publishes the copy with a confirm, then acknowledges the old message. A queue is inspected by briefly consuming
the messages that it serves first; those that do not move return to their places.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import msgspec
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

from broker.port import (
    PEEK_BYTES,
    TAKE_AT_MOST,
    TAKE_BYTES,
    Arrival,
    ForwardOutcome,
    Head,
    InFlight,
    Inspected,
    Outgoing,
    Peeked,
    Step,
    StoredSnapshot,
)
from broker.valkey.forwarding import (
    PUBLISHED,
    Forwarded,
    forward_answer,
    forward_call,
    mark_published,
    marked,
    unpublished,
)
from broker.valkey.mover import MoveRecords
from tasks.celery_app import QUORUM, queue_arguments
from taxiway.connection import ANSWER, AsyncConnection
from taxiway.contract.job import JobState
from taxiway.contract.keys import ARRIVALS, LEVELS, amqp_priority, job_key
from taxiway.contract.wire import Durability, Envelope, check_confirmed, confirming
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import fleet_errors

_EVENTS = "celeryev"  # Celery's exchange for events
AWAY = (AMQPError, ChannelInvalidStateError, OSError, EOFError, StopAsyncIteration)
# aiormq ends calls in progress with whatever ended its reader, also StopAsyncIteration and CancelledError

SET_UP = 10.0
"""Seconds to set up a new connection, which takes many calls; an abandoned attempt starts over."""


@dataclass(slots=True)
class _Session:
    """One connection, what it declared, and its deliveries. `lost` once the connection or a channel is closed."""

    connection: AbstractConnection
    outward: AbstractChannel
    inward: AbstractChannel
    exchanges: dict[str, AbstractExchange]
    arrived: asyncio.Event
    waiting: deque[AbstractIncomingMessage] = field(default_factory=deque)
    taken: dict[str, AbstractIncomingMessage] = field(default_factory=dict)
    lost: bool = False

    def lose(self, *_: object) -> None:
        """Record that the connection ended, and wake the reader of deliveries."""
        self.lost = True
        self.arrived.set()


class RabbitTransport:
    """The transport of a RabbitMQ broker; connects on first use, and again after a failure.

    Args:
        queues: the class queues now; those of further classes are declared by `tidy`.
    """

    def __init__(
        self,
        *,
        broker: str,
        state: str,
        name: str,
        keep_record: int,
        queues: Callable[[], Set[str]],
        durability: Durability = "written",
    ) -> None:
        self._url = broker
        self._records = AsyncConnection(state)
        self._durability = durability
        self._confirming = confirming(durability, ANSWER / 2)
        self._name = name
        self._keep = keep_record
        self._queues = queues
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._abandoned = False
        self._retired = False

    async def wait(self, longest: float) -> None:
        """Return when a delivery is there or the connection ended, at the latest after `longest` seconds."""
        session = await self._live()
        with suppress(TimeoutError):
            await asyncio.wait_for(session.arrived.wait(), longest)

    async def take(self) -> InFlight:
        """Take up to `TAKE_AT_MOST` deliveries; they stay unacknowledged."""
        if self._abandoned:
            await self._drop()
            self._abandoned = False
        session = await self._live()
        with fleet_errors("state store"):
            seconds, microseconds = map(int, await self._records.call("TIME"))
        arrivals: list[Arrival] = []
        left = TAKE_BYTES
        while session.waiting and len(arrivals) < TAKE_AT_MOST and left > 0:
            message = session.waiting.popleft()
            left -= len(message.body)
            tag = str(message.delivery_tag)
            session.taken[tag] = message
            arrivals.append(Arrival(tag, message.body, envelope_of(message)))
        if not session.waiting:
            session.arrived.clear()
        return InFlight(seconds + microseconds / 1e6, arrivals)

    async def forward(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[ForwardOutcome]:
        """Record, publish with confirms, mark, acknowledge: in this order."""
        session = await self._live()
        ours = [not m.tag or m.tag in session.taken for m in messages]
        mine = [m for m, own in zip(messages, ours, strict=True) if own]
        due = await self._record_due(mine, snapshots)
        to_publish = [m for m, outcome in zip(mine, due, strict=True) if outcome is ForwardOutcome.NEW and not m.held]
        await self._publish(session, to_publish)
        await self._mark_published(to_publish)
        await self.settle([m.tag for m in mine if m.tag])
        rest = iter(due)
        return [next(rest) if own else ForwardOutcome.COPY for own in ours]

    async def release(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[ForwardOutcome]:
        """Publish with confirms, then record: in this order, for a copy is harmless."""
        await self._publish(await self._live(), messages)
        return (await self._run_record(messages, snapshots, was=JobState.HELD, held=True)).done

    async def settle(self, tags: Sequence[str]) -> None:
        """Acknowledge deliveries; those of an earlier connection come again."""
        session = await self._live()
        wanted = set(tags)
        settled = [session.taken.pop(tag) for tag in tuple(session.taken) if tag in wanted]
        with amqp_errors():
            if settled and not session.taken:
                await settled[-1].ack(multiple=True)  # and all that was delivered before
                return
            for message in settled:
                await message.ack()

    def abandon(self) -> None:
        """Give back all deliveries, by closing the connection before the next take."""
        self._abandoned = True

    async def retire(self) -> None:
        """Close the channel that consumes: RabbitMQ gives what is unacknowledged to another router."""
        self._retired = True
        session = self._session
        if session is not None and not session.lost:
            session.inward.close_callbacks.discard(session.lose)
            with amqp_errors():
                await asyncio.wait_for(session.inward.close(), ANSWER)

    async def tidy(self) -> int:
        """Declare the queues of new classes; RabbitMQ itself gives a dead router's deliveries to another."""
        session = await self._live()
        with amqp_errors():
            for name in self._queues() - session.exchanges.keys():
                session.exchanges[name] = await _declare(session.outward, name, queue_arguments(self._durability))
        return 0

    async def misdirected(self) -> list[Arrival]:
        """None: RabbitMQ shows no message without giving it away, and that queue may be another application's."""
        return []

    async def forget(self, misdirected: Sequence[Arrival]) -> None:
        """Nothing to do."""

    async def send(self, queue: str, envelope: Envelope) -> None:
        """Put a message in another application's queue; fails if there is none."""
        session = await self._live()
        message = amqp_message(Outgoing("", queue, 0, envelope, str(envelope.headers["id"])))
        with amqp_errors():
            await session.outward.default_exchange.publish(message, queue, mandatory=True, timeout=ANSWER)

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event to the exchange that Celery's own events go to."""
        session = await self._live()
        message = aio_pika.Message(event, content_type="application/json", content_encoding="utf-8")
        with amqp_errors():
            await session.exchanges[_EVENTS].publish(message, routing_key, mandatory=False, timeout=ANSWER)

    async def close(self) -> None:
        """Disconnect; RabbitMQ gives what is unacknowledged to another router."""
        await self._drop()
        self._records.close()

    async def _record_due(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot]
    ) -> list[ForwardOutcome]:
        """Record the jobs; `NEW` are those to be published: those that are new, or recorded by a router that died then.

        What runs was published, though its router did not live to say so. A copy may be in a queue without that being
        known, or at a worker: so a job that is recorded again keeps the earlier of its deadlines (forward.lua).
        """
        if not messages and not snapshots:
            return []
        records = [marked(message) for message in messages]
        due = (await self._run_record(records, snapshots)).done
        new = {message.job for message, outcome in zip(messages, due, strict=True) if outcome is ForwardOutcome.NEW}
        old = [n for n, m in enumerate(messages) if due[n] is ForwardOutcome.COPY and m.job not in new]
        unpublished = await self._unpublished([messages[n] for n in old]) if old else []
        again = [n for n, is_due in zip(old, unpublished, strict=True) if is_due]
        if again:
            retried = [msgspec.structs.replace(records[n], use=None) for n in again]
            for n, done in zip(again, (await self._run_record(retried, was=JobState.QUEUED)).done, strict=True):
                due[n] = done
        return due

    async def _unpublished(self, messages: Sequence[Outgoing]) -> list[bool]:
        """Which jobs' records say that they were neither published nor finished."""
        with fleet_errors("state store"):
            known = await self._records.calls(*(("HMGET", job_key(m.job), PUBLISHED, "finished") for m in messages))
        return [published != b"1" and not finished for published, finished in known]

    async def _run_record(
        self,
        messages: Sequence[Outgoing],
        snapshots: Sequence[StoredSnapshot] = (),
        *,
        was: str = "",
        held: bool = False,
    ) -> Forwarded:
        """Keep snapshots and records; returns which records were written."""
        call = forward_call(messages, keep=self._keep, was=was, part=unpublished, snapshots=snapshots, held=held)
        with fleet_errors("state store"):
            recorded = forward_answer(await self._records.run(call))
            if any(message.held for message in messages):  # it will be nowhere else
                check_confirmed(await self._records.calls(*self._confirming))
        return recorded

    async def _publish(self, session: _Session, messages: Sequence[Outgoing]) -> None:
        async def publish(message: Outgoing) -> None:
            exchange = session.exchanges[message.queue]
            await exchange.publish(amqp_message(message), message.queue, mandatory=True, timeout=ANSWER)

        with amqp_errors():
            await asyncio.wait_for(asyncio.gather(*map(publish, messages)), ANSWER)

    async def _mark_published(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        with fleet_errors("state store"):
            await self._records.calls(*mark_published(messages))

    async def _live(self) -> _Session:
        """The session, opened when there is none."""
        async with self._opening:
            if self._session is None or self._session.lost:
                await self._drop()
                with amqp_errors():
                    self._session = await self._open()
            return self._session

    async def _open(self) -> _Session:
        connection = await aio_pika.connect(self._url, timeout=ANSWER)
        try:
            async with asyncio.timeout(SET_UP):
                session = await _set_up(connection, self._queues(), self._durability)
                if not self._retired:
                    await _consume(session)
        except BaseException:  # else it would live on, and keep the deliveries that it was given
            with suppress(*AWAY):
                await asyncio.wait_for(connection.close(), ANSWER)
            raise
        return session

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(*AWAY):
                await asyncio.wait_for(session.connection.close(), ANSWER)


async def _set_up(connection: AbstractConnection, queues: Collection[str], durability: Durability) -> _Session:
    """Declare everything as plain Celery does."""
    outward = await connection.channel(publisher_confirms=True, on_return_raises=True)
    inward = await connection.channel(publisher_confirms=False)
    await inward.set_qos(prefetch_count=2 * TAKE_AT_MOST)
    exchanges = {name: await _declare(outward, name, queue_arguments(durability)) for name in queues}
    exchanges[_EVENTS] = await outward.declare_exchange(_EVENTS, aio_pika.ExchangeType.TOPIC, durable=True)
    await _declare(outward, ARRIVALS, QUORUM if durability == "replicated" else {})
    session = _Session(connection, outward, inward, exchanges, asyncio.Event())
    for ending in (connection, inward, outward):  # a connection that is cut does not say that it is closed
        ending.close_callbacks.add(session.lose)
    return session


async def _consume(session: _Session) -> None:
    """Start consuming arrivals."""

    async def receive(message: AbstractIncomingMessage) -> None:
        session.waiting.append(message)
        session.arrived.set()

    arrivals = await session.inward.get_queue(ARRIVALS)
    await arrivals.consume(receive)


async def _declare(channel: AbstractChannel, name: str, arguments: Mapping[str, int | str]) -> AbstractExchange:
    exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.DIRECT, durable=True)
    queue = await channel.declare_queue(name, durable=True, arguments=dict(arguments) or None)
    await queue.bind(exchange, routing_key=name)
    return exchange


def envelope_of(message: AbstractIncomingMessage) -> Envelope:
    """The delivery in the form that kombu gives a message on Valkey."""
    return Envelope(
        body=base64.b64encode(message.body).decode("ascii"),
        headers={name: _plain(value) for name, value in message.headers.items()},
        properties={
            "correlation_id": message.correlation_id,
            "reply_to": message.reply_to or "",
            "delivery_mode": 2,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
        content_type=message.content_type or "",
        content_encoding=message.content_encoding or "utf-8",
    )


def _plain(value: Any) -> Any:
    """A header's value as it can be written again: bytes are what pamqp gives for text that is not UTF-8."""
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors="backslashreplace")
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, list) else value


def amqp_message(message: Outgoing) -> aio_pika.Message:
    """A placed message as AMQP carries it."""
    envelope = message.envelope
    return aio_pika.Message(
        envelope.payload(),
        headers=envelope.headers,
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        priority=amqp_priority(message.level),
        correlation_id=envelope.properties.get("correlation_id"),
        reply_to=envelope.properties.get("reply_to"),
    )


@contextmanager
def amqp_errors() -> Iterator[None]:
    """Raises `BrokerUnavailableError` for every error that means that RabbitMQ did not answer."""
    try:
        yield
    except AWAY as error:
        raise BrokerUnavailableError(f"the broker did not answer: {error!r}", retry_after=1.0) from error
    except (Exception, asyncio.CancelledError) as error:
        if not _says_closed(error):
            raise
        raise BrokerUnavailableError("the broker closed the connection", retry_after=1.0) from error


def _says_closed(error: BaseException) -> bool:
    """Whether aiormq's error means that the connection ended: it cancels waits, and writes get a bare `Exception`."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return type(error) is Exception


LEAVE = 0.5
"""Share of a queue that is left to its devices while the rest is inspected."""

LOOKED_AT = 500
"""Most messages inspected in a queue: each is delivered and returned. 2,000 took more than a second."""

GLANCE = 0.05
"""Longest wait for a queue's messages, in seconds."""


class RabbitQueueMover(MoveRecords):
    """Class queues on RabbitMQ; the records are in `state`."""

    def __init__(self, *, broker: str, state: str) -> None:
        self._url = broker
        super().__init__(state)
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._shown: dict[int, AbstractIncomingMessage] = {}
        self._handles = itertools.count()  # delivery tags restart with each connection

    async def head(self, queue: str) -> Head:
        """See `QueueMover`: RabbitMQ counts all waiting messages."""
        with amqp_errors():
            declared = await (await self._live()).declare_queue(queue, passive=True, timeout=ANSWER)
        return Head((declared.declaration_result.message_count or 0,))

    async def peek(self, queue: str, most: int) -> Inspected:
        """See `QueueMover`: RabbitMQ shows what it serves first."""
        with amqp_errors():
            channel = await self._live()
            declared = await channel.declare_queue(queue, passive=True, timeout=ANSWER)
            depth = declared.declaration_result.message_count or 0
            wanted = min(most, LOOKED_AT, math.ceil(depth * (1 - LEAVE)))
            await channel.set_qos(prefetch_count=max(wanted, 1))
            messages = await self._glance(declared, wanted) if wanted else []
        return Inspected(depth, [self._peeked(queue, message) for message in reversed(messages)])

    async def move(self, token: str, steps: Sequence[Step]) -> list[bool]:
        """See `QueueMover`."""
        held = [step.peeked.handle in self._shown for step in steps]  # a connection that ended gave the others back
        here = [step for step, own in zip(steps, held, strict=True) if own]
        if not here or not await self.record(token, here):
            return [False] * len(steps)
        with amqp_errors():
            await asyncio.wait_for(asyncio.gather(*(self._publish(step) for step in here)), ANSWER)
            for step in here:
                await self._shown.pop(step.peeked.handle).ack()
        return held

    async def put_back(self) -> None:
        """See `QueueMover`."""
        inspected, self._shown = self._shown, {}
        with amqp_errors():
            for message in inspected.values():
                await message.nack(requeue=True)

    async def close(self) -> None:
        """See `QueueMover`; RabbitMQ itself returns inspected messages."""
        await super().close()
        await self._drop()

    async def _glance(self, queue: AbstractQueue, wanted: int) -> list[AbstractIncomingMessage]:
        """The `wanted` messages that the queue serves first, or as many of them as come within `GLANCE`."""
        messages: list[AbstractIncomingMessage] = []
        enough = asyncio.Event()

        async def receive(message: AbstractIncomingMessage) -> None:
            messages.append(message)
            if len(messages) >= wanted or sum(len(m.body) for m in messages) > PEEK_BYTES:
                enough.set()

        tag = await queue.consume(receive, timeout=ANSWER)
        try:
            await asyncio.wait_for(enough.wait(), GLANCE)
        except TimeoutError:
            pass  # other consumers took the rest
        finally:
            await queue.cancel(tag, timeout=ANSWER)
        return messages

    def _peeked(self, queue: str, message: AbstractIncomingMessage) -> Peeked:
        handle = next(self._handles)
        self._shown[handle] = message
        level = LEVELS - 1 - min(message.priority or 0, LEVELS - 1)
        return Peeked(queue, level, handle, envelope_of(message))

    async def _publish(self, step: Step) -> None:
        assert self._channel is not None
        peeked = step.peeked
        message = Outgoing("", step.queue, peeked.level, step.envelope, peeked.job)
        exchange = await self._channel.get_exchange(step.queue, ensure=False)
        await exchange.publish(amqp_message(message), step.queue, mandatory=True, timeout=ANSWER)

    async def _live(self) -> AbstractChannel:
        if self._channel is None or self._channel.is_closed:
            await self._drop()
            self._connection = await asyncio.wait_for(aio_pika.connect(self._url, timeout=ANSWER), ANSWER)
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        return self._channel

    async def _drop(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._shown.clear()
        if connection is not None:
            with suppress(*AWAY):
                await asyncio.wait_for(connection.close(), ANSWER)
