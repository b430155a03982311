"""The bridge to RabbitMQ, for producers that have it as their Celery broker: `taxiway.arrivals` there joins Valkey's.

A message is acknowledged at RabbitMQ once Valkey keeps it as its `durability` says, together with those before it.
Until then it is delivered again if this router dies, and forwarding drops the copy by its job's id. RabbitMQ may give
up a message that was delivered too often: so deliveries are kept while Valkey does not answer.

What follows from such a job (a link, a chain, a chord) waits in an outbox at Valkey, which one router at a time empties
into the queues of RabbitMQ. It is published at least once.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aio_pika
import msgspec
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelClosed, ChannelInvalidStateError, ChannelNotFoundEntity, DeliveryError

from broker.port import TAKE_BYTES, DeadLetter
from broker.valkey.processes import Leadership
from taxiway.backoff import Outage
from taxiway.connection import ANSWER_WITHIN, AsyncConnection
from taxiway.contract.keys import AMQP_OUTBOX, AMQP_SENDER, AMQP_SENDERS, ARRIVALS, kept_key, priority_list
from taxiway.contract.wire import (
    BRIDGED,
    DESTINATION,
    Envelope,
    check_confirmed,
    confirming,
    decode_envelope,
    encode_envelope,
)
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, bounded
from taxiway.running import beside, first_of

logger = logging.getLogger(__name__)

DeadLettering = Callable[[Sequence[DeadLetter]], Awaitable[None]]
"""Keeps messages that are given up."""

QUORUM: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": -1}
"""How the arrivals are declared where they are missing: replicated, and no message is ever given up."""

PUBLISHED_TOGETHER = 64
"""Messages of the outbox that are published together."""

_PREFETCH = 1024  # deliveries that RabbitMQ sends ahead of their acknowledgement
_SET_UP = 10.0  # seconds to set up a new connection, which takes several calls
_KEPT_WITHIN = 0.8 * ANSWER_WITHIN
_LEASE = 5.0  # seconds for which a router empties the outbox without renewing that
_TURN = 1.0  # seconds between two renewals
_AWAY = (AMQPError, ChannelInvalidStateError, OSError, EOFError, StopAsyncIteration)
# aiormq ends calls in progress with whatever ended its reader, also StopAsyncIteration and CancelledError


@dataclass(slots=True)
class _Session:
    """One connection and its deliveries."""

    connection: AbstractConnection
    inward: AbstractChannel
    outward: AbstractChannel
    arrivals: AbstractQueue
    waiting: deque[AbstractIncomingMessage] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: AbstractIncomingMessage | None = None
    """The last delivery that is in Valkey's arrivals."""
    pushed: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def lose(self, *_: object) -> None:
        """Record that the connection or a channel is closed."""
        self.lost.set()

    async def receive(self, message: AbstractIncomingMessage) -> None:
        """Take a delivery."""
        self.waiting.append(message)
        self.arrived.set()

    def take(self) -> list[AbstractIncomingMessage]:
        """What was delivered, in order, up to `TAKE_BYTES` and one message."""
        taken, left = [], TAKE_BYTES
        while self.waiting and left > 0:
            taken.append(self.waiting.popleft())
            left -= len(taken[-1].body)
        if not self.waiting:
            self.arrived.clear()
        return taken


class AmqpBridge:
    """Carries messages between RabbitMQ at `url` and Valkey at `broker`; connects again after each failure."""

    def __init__(self, url: str, broker: str, name: str, dead_letter: DeadLettering, confirmed_by: int) -> None:
        self._url = url
        self._dead_letter, self._name = dead_letter, name
        self._arrivals, self._keeps, self._outbox = (AsyncConnection(broker, server="state store") for _ in range(3))
        self._bell = AsyncConnection(broker, server="state store", answer=None)
        self._keeping = confirming(confirmed_by, _KEPT_WITHIN) or (("WAITAOF", 1, 0, int(_KEPT_WITHIN * 1000)),)
        self._confirmed_by = confirmed_by
        self._sender = Leadership(broker, name, _LEASE, (AMQP_SENDER, AMQP_SENDERS))

    async def close(self) -> None:
        """Disconnect from Valkey, once `run` has ended."""
        await self._sender.close()
        for connection in (self._arrivals, self._keeps, self._outbox, self._bell):
            connection.close()

    async def run(self) -> None:
        """Carry messages until cancelled; what is not acknowledged then is delivered to another router."""
        outage = Outage(logger, "server unavailable", server="RabbitMQ")
        while True:
            try:
                await self._connected(outage)
            except FleetUnavailable as error:
                await asyncio.sleep(outage.pause(error))

    async def _connected(self, outage: Outage) -> None:
        """Connect, and carry messages until the connection ends; raises as `_serve`."""
        with amqp_errors():
            session = await self._open()
        outage.over()
        try:
            await self._serve(session)
        finally:
            with suppress(*_AWAY):
                await asyncio.wait_for(session.connection.close(), ANSWER_WITHIN)

    async def _serve(self, session: _Session) -> None:
        """Carry messages until the connection ends.

        Raises:
            BrokerUnavailableError: it ended.
        """
        loops = self._accept(session), self._acknowledge(session), self._send_outbox(session)
        with amqp_errors():
            await first_of(*loops, session.lost.wait())
        raise BrokerUnavailableError("RabbitMQ closed the connection", retry_after=1.0)

    async def _accept(self, session: _Session) -> None:
        """Add deliveries to Valkey's arrivals."""
        while True:
            await session.arrived.wait()
            taken = session.take()
            raw = [await beside(len(message.body), arrival_of, message) for message in taken]
            await _insist(partial(self._add, raw))
            session.accepted = taken[-1]
            session.pushed.set()

    async def _add(self, raw: Sequence[bytes]) -> None:
        await self._arrivals.call("LPUSH", priority_list(ARRIVALS, 0), *raw)

    async def _acknowledge(self, session: _Session) -> None:
        """Acknowledge, in groups, what Valkey keeps."""
        while True:
            await session.pushed.wait()
            session.pushed.clear()
            newest = session.accepted
            assert newest is not None
            await _insist(self._kept)
            await newest.ack(multiple=True)

    async def _kept(self) -> None:
        """Wait until what was added is on disk, or with `replicated` at replicas.

        A disk that takes longer than `_KEPT_WITHIN` has it at least in the system's cache, and a server without a log
        promises nothing: both are not waited for.
        """
        _, kept = await self._keeps.ask((("SET", kept_key(self._name), "", "PX", 1000), *self._keeping))
        if self._confirmed_by:
            check_confirmed([kept], self._confirmed_by)

    async def _send_outbox(self, session: _Session) -> None:
        """Empty the outbox while no other router does."""
        while True:
            if not await _insist(self._sender.campaign):
                await asyncio.sleep(_TURN)
                continue
            raw = await _insist(self._waiting)
            sent = await asyncio.gather(*(self._send(session, one) for one in raw), return_exceptions=True)
            done = [one for one, failure in zip(raw, sent, strict=True) if failure is None]
            if done:
                await _insist(partial(self._remove, done))
            for failure in sent:
                if failure is not None:
                    raise failure

    async def _waiting(self) -> Sequence[bytes]:
        """The oldest messages of the outbox, when there are any, or none after `_TURN`."""
        found = await self._bell.call("BLMOVE", AMQP_OUTBOX, AMQP_OUTBOX, "RIGHT", "RIGHT", _TURN)
        if found is None:
            return ()
        oldest: list[bytes] = await self._outbox.call("LRANGE", AMQP_OUTBOX, -PUBLISHED_TOGETHER, -1)
        return oldest[::-1]

    async def _remove(self, sent: Sequence[bytes]) -> None:
        await self._outbox.calls(*(("LREM", AMQP_OUTBOX, -1, one) for one in sent))

    async def _send(self, session: _Session, raw: bytes) -> None:
        """Publish a message in its queue, which is made where it is missing, as Celery does."""
        try:
            envelope = decode_envelope(raw)
            to = _destination(envelope)
            queue, message = to.queue, amqp_message(envelope, to)
        except InvalidRequestError as error:
            return await self._give_up(raw, error.message)
        try:
            try:
                await session.outward.default_exchange.publish(message, queue, timeout=ANSWER_WITHIN)
            except DeliveryError:
                await session.outward.declare_queue(queue, durable=True, timeout=ANSWER_WITHIN)
                await session.outward.default_exchange.publish(message, queue, timeout=ANSWER_WITHIN)
        except ChannelClosed as error:  # the account may not, or the queue is declared in another way meanwhile
            await self._give_up(raw, f"RabbitMQ refused a message for queue {queue!r}: {error}")
            await self._remove([raw])
            raise

    async def _give_up(self, raw: bytes, reason: str) -> None:
        logger.warning("message dead-lettered", extra={"reason": reason})
        await self._dead_letter([DeadLetter(bounded(reason), time.time(), raw, self._name)])

    async def _open(self) -> _Session:
        connection = await aio_pika.connect(self._url, timeout=ANSWER_WITHIN)
        try:
            async with asyncio.timeout(_SET_UP):
                return await _set_up(connection)
        except BaseException:  # else it would live on, and keep the deliveries that it was given
            with suppress(*_AWAY):
                await asyncio.wait_for(connection.close(), ANSWER_WITHIN)
            raise


async def _set_up(connection: AbstractConnection) -> _Session:
    """Open the channels, and consume the arrivals; a queue that is there keeps its type."""
    asking = await connection.channel()
    try:
        await asking.declare_queue(ARRIVALS, passive=True)
        await asking.close()
        inward = await connection.channel(publisher_confirms=False)
        arrivals = await inward.get_queue(ARRIVALS, ensure=False)
    except ChannelNotFoundEntity:
        inward = await connection.channel(publisher_confirms=False)
        exchange = await inward.declare_exchange(ARRIVALS, durable=True)
        arrivals = await inward.declare_queue(ARRIVALS, durable=True, arguments=QUORUM)
        await arrivals.bind(exchange, ARRIVALS)
    await inward.set_qos(prefetch_count=_PREFETCH)
    outward = await connection.channel(publisher_confirms=True, on_return_raises=True)
    session = _Session(connection, inward, outward, arrivals)
    for ending in (connection, inward, outward):  # a connection that is cut does not say that it is closed
        ending.close_callbacks.add(session.lose)
    consuming = await inward.get_underlay_channel()
    consuming.on_consumer_cancel_callbacks.add(session.lose)  # the queue was deleted, or its leader is gone
    await arrivals.consume(session.receive)
    return session


def arrival_of(message: AbstractIncomingMessage) -> bytes:
    """A delivery as Valkey's arrivals have it."""
    properties = {
        "correlation_id": message.correlation_id,
        "reply_to": message.reply_to or "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": ARRIVALS},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
        BRIDGED: True,
    }
    envelope = Envelope(
        body=base64.b64encode(message.body).decode("ascii"),
        headers={name: _plain(value) for name, value in message.headers.items()},
        properties=properties,
        content_type=message.content_type or "",
        content_encoding=message.content_encoding or "utf-8",
    )
    try:
        return encode_envelope(envelope)
    except (TypeError, ValueError, RecursionError):  # it becomes a dead letter
        envelope.headers = {"unreadable": bounded(ascii(envelope.headers))}
        return encode_envelope(envelope)


def _plain(value: Any) -> Any:
    """A header's value as JSON has it: bytes are what pamqp gives for text that is not UTF-8."""
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors="backslashreplace")
    if isinstance(value, Mapping):
        return {name: _plain(below) for name, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, list) else value


class _Destination(msgspec.Struct):
    """Where a message of the outbox goes."""

    queue: str
    priority: int | None = None


def _destination(envelope: Envelope) -> _Destination:
    try:
        return msgspec.convert(envelope.properties.get(DESTINATION), _Destination)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{DESTINATION}: {error}", field=DESTINATION) from error


def amqp_message(envelope: Envelope, to: _Destination) -> aio_pika.Message:
    """A message as AMQP carries it."""
    return aio_pika.Message(
        envelope.payload(),
        headers=envelope.headers,
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        priority=to.priority,
        correlation_id=envelope.properties.get("correlation_id"),
        reply_to=envelope.properties.get("reply_to"),
    )


Answer = TypeVar("Answer")


async def _insist(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """The value of a call to Valkey, made again until it answers."""
    outage = Outage(logger, "server unavailable", server="state store")
    while True:
        try:
            value = await call()
        except FleetUnavailable as error:
            await asyncio.sleep(outage.pause(error))
        else:
            outage.over()
            return value


@contextmanager
def amqp_errors() -> Iterator[None]:
    """Raises `BrokerUnavailableError` for every error that means that RabbitMQ did not answer."""
    try:
        yield
    except _AWAY as error:
        raise BrokerUnavailableError(f"RabbitMQ did not answer: {error!r}", retry_after=1.0) from error
    except (Exception, asyncio.CancelledError) as error:
        if not _says_closed(error):
            raise
        raise BrokerUnavailableError("RabbitMQ closed the connection", retry_after=1.0) from error


def _says_closed(error: BaseException) -> bool:
    """Whether aiormq's error means that the connection ended.

    It cancels waits; writes get a bare `Exception`, and calls on what is closed a bare `RuntimeError` that says so.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return type(error) is Exception or (type(error) is RuntimeError and "closed" in str(error))
