"""Arrivals and class queues on RabbitMQ, records in Valkey.

A job is recorded first, then published with a confirm, then marked as published, then its arrival is acknowledged: a
router that dies in between leaves an arrival that comes again, and a record that says whether it was published. A copy
that is published twice is harmless: the claim before compute drops it.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import msgspec
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

from tasks.connection import ANSWER, connect, told_plainly
from tasks.scripts import FORWARD, Forward, forward_args
from tasks.transport import TAKE_AT_MOST, Arrival, Outgoing, Reading, Taken
from taxiway.errors import BrokerUnavailableError
from taxiway.keys import ARRIVALS, LEVELS, WORK, amqp_priority, job_key, taken_key
from taxiway.wire import HEADER, Envelope

_EVENTS = "celeryev"  # Celery's exchange for events
_AWAY = (AMQPError, ChannelInvalidStateError, OSError, EOFError, StopAsyncIteration)
# aiormq ends calls under way with whatever ended its reader: StopAsyncIteration too, and CancelledError unasked

_PUBLISHED = "published"  # a field of the job's record


@dataclass(slots=True)
class _Session:
    """One connection, what it declared, and the deliveries that end with it. `lost` once it or a channel is closed."""

    connection: AbstractConnection
    outward: AbstractChannel
    exchanges: dict[str, AbstractExchange]
    arrived: asyncio.Event
    waiting: deque[AbstractIncomingMessage] = field(default_factory=deque)
    taken: dict[str, AbstractIncomingMessage] = field(default_factory=dict)
    lost: bool = False

    def lose(self, *_: object) -> None:
        """Note that it ended, and wake whoever waits for deliveries."""
        self.lost = True
        self.arrived.set()


class RabbitTransport:
    """A router's hold on a RabbitMQ broker; connects when it is first used, and again after a failure."""

    def __init__(self, *, broker: str, state: str, name: str, keep_record: int, queues: Sequence[str]) -> None:
        self._url = broker
        self._state = connect(state)
        self._record = self._state.register_script(FORWARD)
        self._name = name
        self._keep = keep_record
        self._queues = tuple(queues)
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._abandoned = False

    async def wait(self, longest: float) -> None:
        """Return when a delivery is there or the connection ended, at the latest after `longest` seconds."""
        session = await self._live()
        with suppress(TimeoutError):
            await asyncio.wait_for(session.arrived.wait(), longest)

    async def take(self, most: int = TAKE_AT_MOST) -> Taken:
        """Take up to `most` deliveries; they stay unacknowledged."""
        if self._abandoned:
            await self._drop()
            self._abandoned = False
        session = await self._live()
        with told_plainly("state store"):
            seconds, microseconds = await self._state.time()
        arrivals: list[Arrival] = []
        while session.waiting and len(arrivals) < most:
            message = session.waiting.popleft()
            tag = str(message.delivery_tag)
            session.taken[tag] = message
            arrivals.append(Arrival(tag, message.body, _envelope(message)))
        if not session.waiting:
            session.arrived.clear()
        return Taken(seconds + microseconds / 1e6, arrivals)

    async def forward(self, messages: Sequence[Outgoing], readings: Sequence[Reading] = ()) -> list[bool]:
        """Record, publish with confirms, mark, acknowledge: in this order."""
        session = await self._live()
        ours = [not m.tag or m.tag in session.taken for m in messages]
        mine = [m for m, own in zip(messages, ours, strict=True) if own]
        due = await self._record_due(mine, readings)
        to_publish = [m for m in mine if m.job in due]
        with _told_plainly():
            await asyncio.wait_for(asyncio.gather(*(self._publish(session, m) for m in to_publish)), ANSWER)
        await self._mark_published(to_publish)
        await self.settle([m.tag for m in mine if m.tag])
        return [own and m.job in due for m, own in zip(messages, ours, strict=True)]

    async def settle(self, tags: Sequence[str]) -> None:
        """Acknowledge deliveries; those of an earlier connection come again."""
        session = await self._live()
        with _told_plainly():
            for tag in tags:
                message = session.taken.pop(tag, None)
                if message is not None:
                    await message.ack()

    def abandon(self) -> None:
        """Give back all deliveries, by closing the connection before the next take."""
        self._abandoned = True

    async def depths(self, queue: str) -> tuple[int, ...]:
        """Waiting messages, one figure: RabbitMQ does not tell them by priority."""
        session = await self._live()
        with _told_plainly():
            declared = await session.outward.declare_queue(queue, passive=True, timeout=ANSWER)
        return (declared.declaration_result.message_count or 0,)

    async def tidy(self) -> int:
        """Nothing to do: RabbitMQ itself gives a dead router's deliveries to another."""
        return 0

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event to the exchange that Celery's own events go to."""
        session = await self._live()
        message = aio_pika.Message(event, content_type="application/json", content_encoding="utf-8")
        with _told_plainly():
            await session.exchanges[_EVENTS].publish(message, routing_key, mandatory=False, timeout=ANSWER)

    async def close(self) -> None:
        """Disconnect; RabbitMQ gives what is unacknowledged to another router."""
        await self._drop()
        await self._state.aclose()

    async def _record_due(self, messages: Sequence[Outgoing], readings: Sequence[Reading]) -> set[str]:
        """Record the jobs; answers those that have to be published: new, or recorded by a router that died then."""
        if not messages and not readings:
            return set()
        forwards = [Forward(tag="", job=m.job, fields=m.fields, keep=self._keep) for m in messages]
        kept = [reading.recorded() for reading in readings]
        with told_plainly("state store"):
            done = await self._record(keys=[taken_key(self._name), WORK], args=forward_args([*kept, *forwards]))
            async with self._state.pipeline(transaction=False) as pipeline:
                for message in messages:
                    pipeline.hmget(job_key(message.job), _PUBLISHED, "finished")
                known = await pipeline.execute()
        pairs = zip(messages, done[len(kept) :], known, strict=True)
        return {m.job for m, new, marks in pairs if new or (m.tag and marks == [None, None])}

    async def _publish(self, session: _Session, message: Outgoing) -> None:
        exchange = session.exchanges[message.queue]
        await exchange.publish(_amqp_message(message), message.queue, mandatory=True, timeout=ANSWER)

    async def _mark_published(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        with told_plainly("state store"):
            async with self._state.pipeline(transaction=False) as pipeline:
                for message in messages:
                    pipeline.hset(job_key(message.job), _PUBLISHED, "1")
                await pipeline.execute()

    async def _live(self) -> _Session:
        """The session, opened when there is none."""
        async with self._opening:
            if self._session is None or self._session.lost:
                await self._drop()
                with _told_plainly():
                    self._session = await asyncio.wait_for(_open(self._url, self._queues), ANSWER)
            return self._session

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(*_AWAY):
                await asyncio.wait_for(session.connection.close(), ANSWER)


async def _open(url: str, queues: Sequence[str]) -> _Session:
    """Connect, declare everything as plain Celery does, and consume the arrivals."""
    connection = await aio_pika.connect(url, timeout=ANSWER)
    outward = await connection.channel(publisher_confirms=True, on_return_raises=True)
    inward = await connection.channel(publisher_confirms=False)
    await inward.set_qos(prefetch_count=2 * TAKE_AT_MOST)
    exchanges = {name: await _declare(outward, name, {"x-max-priority": LEVELS - 1}) for name in queues}
    exchanges[_EVENTS] = await outward.declare_exchange(_EVENTS, aio_pika.ExchangeType.TOPIC, durable=True)
    await _declare(outward, ARRIVALS, None)
    session = _Session(connection, outward, exchanges, asyncio.Event())

    async def receive(message: AbstractIncomingMessage) -> None:
        session.waiting.append(message)
        session.arrived.set()

    for ending in (connection, inward, outward):  # a connection that is cut does not say that it is closed
        ending.close_callbacks.add(session.lose)
    arrivals = await inward.get_queue(ARRIVALS)
    await arrivals.consume(receive)
    return session


async def _declare(channel: AbstractChannel, name: str, arguments: dict[str, int] | None) -> AbstractExchange:
    exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.DIRECT, durable=True)
    queue = await channel.declare_queue(name, durable=True, arguments=dict(arguments) if arguments else None)
    await queue.bind(exchange, routing_key=name)
    return exchange


def _envelope(message: AbstractIncomingMessage) -> Envelope:
    """The delivery in the form that kombu gives a message on Valkey."""
    return Envelope(
        body=base64.b64encode(message.body).decode("ascii"),
        headers=dict(message.headers),
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


def _amqp_message(message: Outgoing) -> aio_pika.Message:
    envelope = message.envelope
    return aio_pika.Message(
        envelope.payload(),
        headers=_amqp_headers(envelope.headers),
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        priority=amqp_priority(message.level),
        correlation_id=envelope.properties.get("correlation_id"),
        reply_to=envelope.properties.get("reply_to"),
    )


def _amqp_headers(headers: dict[str, Any]) -> dict[str, Any]:
    """The headers with the ticket as JSON text: pamqp cuts floats to 32 bits, and a cut ticket is a forged one."""
    if HEADER not in headers:
        return headers
    return {**headers, HEADER: msgspec.json.encode(headers[HEADER]).decode()}


@contextmanager
def _told_plainly() -> Iterator[None]:
    try:
        yield
    except _AWAY as error:
        raise BrokerUnavailableError(f"the broker did not answer: {error!r}", retry_after=1.0) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BrokerUnavailableError("the broker closed the connection", retry_after=1.0) from error
