"""Moves on RabbitMQ: the copy is published and confirmed, then the old message acknowledged.

A queue is looked at by consuming for a moment what it serves first; what does not move goes back to its place.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue

from broker.port import PEEK_BYTES, Head, Outgoing, Peeked, Shown, Step
from broker.rabbitmq.queues import AWAY, amqp_errors, amqp_message, envelope_of
from broker.valkey.mover import MoveRecords
from taxiway.contract.keys import LEVELS
from taxiway.valkey.aio import ANSWER

LEAVE = 0.5
"""Share of a queue that is left to its devices while the other is looked at."""

LOOKED_AT = 500
"""Most messages that are looked at in a queue: each is delivered, and goes back. 2,000 took a second and more."""

GLANCE = 0.05
"""Longest to wait for a queue's messages to come, in seconds."""


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
        """See `QueueMover`: RabbitMQ tells how many wait in all."""
        with amqp_errors():
            declared = await (await self._live()).declare_queue(queue, passive=True, timeout=ANSWER)
        return Head((declared.declaration_result.message_count or 0,))

    async def peek(self, queue: str, most: int) -> Shown:
        """See `QueueMover`: RabbitMQ shows what it serves first."""
        with amqp_errors():
            channel = await self._live()
            declared = await channel.declare_queue(queue, passive=True, timeout=ANSWER)
            depth = declared.declaration_result.message_count or 0
            wanted = min(most, LOOKED_AT, int(depth * (1 - LEAVE)))
            await channel.set_qos(prefetch_count=max(wanted, 1))
            messages = await self._glance(declared, wanted) if wanted else []
        return Shown(depth, [self._peeked(queue, message) for message in reversed(messages)])

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
        shown, self._shown = self._shown, {}
        with amqp_errors():
            for message in shown.values():
                await message.nack(requeue=True)

    async def close(self) -> None:
        """See `QueueMover`; RabbitMQ itself puts back what was shown."""
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
            pass  # others took the rest
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
