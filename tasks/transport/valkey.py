"""Arrivals and class queues on Valkey or Redis, where kombu keeps them.

What a router takes stays in a hash of its own until it is forwarded, beside a life key that ends with the router: other
routers put the hash of a dead one back. An idle router blocks on `BLMOVE arrivals arrivals RIGHT RIGHT`, which moves a
message to where it was: the router wakes at once, and nothing is taken outside the script that records it.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tasks.connection import connect, told_plainly
from tasks.scripts import FORWARD, RECOVER, TAKE, Forward, forward_args, take_answer
from tasks.transport import TAKE_AT_MOST, Arrival, Outgoing, Reading, Taken
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from taxiway.keys import ARRIVALS, ROUTERS, WORK, priority_list, priority_lists, redis_priority, router_key, taken_key
from taxiway.wire import Envelope, decode_envelope, encode_envelope

LIFE = 5.0
"""Seconds of silence after which what a router took is put back."""

RENEW = 1.0
"""Seconds between two signs of life."""

_EVENTS = "celeryev"  # Celery's exchange for events; kombu's channel for it is /<database>.<exchange>/<routing key>


class ValkeyTransport:
    """A router's hold on a Valkey broker. Where `state` is another server, records are written there first."""

    def __init__(self, *, broker: str, state: str, name: str, keep_record: int) -> None:
        self._client = connect(broker)
        self._state = connect(state) if state != broker else None
        self._blocked = connect(broker, answer=None)
        self._database = int(self._client.connection_pool.connection_kwargs.get("db") or 0)
        self._name = name
        self._keep = keep_record
        self._take = self._client.register_script(TAKE)
        self._forward = self._client.register_script(FORWARD)
        self._recover = self._client.register_script(RECOVER)
        self._record = self._state.register_script(FORWARD) if self._state is not None else None
        self._waits: dict[str, asyncio.Task[Any]] = {}
        self._takes = 0
        self._renewed = -LIFE
        self._abandoned = False

    async def wait(self, longest: float) -> None:
        """Return when a message stands in one of the arrivals' lists, at the latest after `longest` seconds."""
        for name in priority_lists(ARRIVALS):
            if name not in self._waits:
                wait = self._blocked.blmove(name, name, longest, "RIGHT", "RIGHT")  # type: ignore[arg-type]  # seconds may be a float
                self._waits[name] = asyncio.ensure_future(wait)
        done, _ = await asyncio.wait(self._waits.values(), timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        self._waits = {name: task for name, task in self._waits.items() if task not in done}
        with told_plainly("broker"):
            for task in done:
                task.result()

    async def take(self, most: int = TAKE_AT_MOST) -> Taken:
        """Take up to `most` arrivals into this router's hash."""
        with told_plainly("broker"):
            if self._abandoned:
                await self._put_back_own()
            if time.monotonic() - self._renewed > RENEW:
                await self._live()
            self._takes += 1
            keys = [taken_key(self._name), *priority_lists(ARRIVALS)]
            answer = await self._take(keys=keys, args=[most, f"{self._takes}."])
        now, taken = take_answer(answer)
        return Taken(now, [_arrival(tag, raw) for tag, raw in taken])

    async def forward(self, messages: Sequence[Outgoing], readings: Sequence[Reading] = ()) -> list[bool]:
        """Publish and record, at once where broker and state are one server."""
        forwards = [self._forward_of(m) for m in messages]
        kept = [reading.recorded() for reading in readings]
        if self._record is None:
            return [bool(done) for done in await self._run_forward([*kept, *forwards])][len(kept) :]
        with told_plainly("state store"):
            bare = [Forward(tag="", job=f.job, fields=f.fields, keep=f.keep) for f in forwards]
            await self._record(keys=[taken_key(self._name), WORK], args=forward_args([*kept, *bare]))
        return [bool(done) for done in await self._run_forward(forwards)]

    async def settle(self, tags: Sequence[str]) -> None:
        """Forget arrivals."""
        await self._run_forward([Forward(tag=tag) for tag in tags])

    def abandon(self) -> None:
        """Put back, before the next take, all that this router's hash holds: also what a lost answer took."""
        self._abandoned = True

    async def depths(self, queue: str) -> tuple[int, ...]:
        """Waiting messages by priority level."""
        with told_plainly("broker"):
            async with self._client.pipeline(transaction=False) as pipeline:
                for name in priority_lists(queue):
                    pipeline.llen(name)
                return tuple(await pipeline.execute())

    async def tidy(self) -> int:
        """Show that this router lives, and put back what dead ones had taken."""
        with told_plainly("broker"):
            await self._live()
            routers: set[Any] = await self._client.smembers(ROUTERS)
            counts = [await self._put_back(router.decode()) for router in sorted(routers)]
        return sum(counts)

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event on the channel of kombu's fanout exchange."""
        with told_plainly("broker"):
            await self._client.publish(f"/{self._database}.{_EVENTS}/{routing_key}", _kombu_event(routing_key, event))

    async def close(self) -> None:
        """Put back what is still taken, and disconnect."""
        for task in self._waits.values():
            task.cancel()
        await asyncio.gather(*self._waits.values(), return_exceptions=True)
        try:
            with told_plainly("broker"):
                await self._put_back_own()
        except BrokerUnavailableError:
            pass  # the life key ends by itself, and another router puts it back
        for client in (self._client, self._blocked, self._state):
            if client is not None:
                await client.aclose()

    async def _run_forward(self, forwards: Sequence[Forward]) -> Sequence[int]:
        keys = [taken_key(self._name), WORK]
        with told_plainly("broker"):
            answer: Sequence[int] = await self._forward(keys=keys, args=forward_args(forwards))
        return answer

    def _forward_of(self, message: Outgoing) -> Forward:
        return Forward(
            tag=message.tag,
            queue_list=priority_list(message.queue, message.level),
            message=encode_envelope(_addressed(message)),
            job=message.job,
            fields=message.fields,
            keep=self._keep,
        )

    async def _live(self) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.sadd(ROUTERS, self._name)
            pipeline.set(router_key(self._name), b"", px=int(LIFE * 1000))
            await pipeline.execute()
        self._renewed = time.monotonic()

    async def _put_back(self, router: str) -> int:
        keys = [ROUTERS, router_key(router), taken_key(router), ARRIVALS]
        return int(await self._recover(keys=keys, args=[router]))

    async def _put_back_own(self) -> None:
        await self._client.delete(router_key(self._name))
        await self._put_back(self._name)
        self._renewed = -LIFE
        self._abandoned = False


def _addressed(message: Outgoing) -> Envelope:
    """The envelope with kombu's address of its class queue; the delivery tag and the body stay."""
    properties = message.envelope.properties
    properties["priority"] = redis_priority(message.level)
    properties["delivery_info"] = {"exchange": message.queue, "routing_key": message.queue}
    return message.envelope


def _arrival(tag: str, raw: bytes) -> Arrival:
    try:
        return Arrival(tag, raw, decode_envelope(raw))
    except InvalidRequestError as error:
        return Arrival(tag, raw, None, error.message)


def _kombu_event(routing_key: str, event: bytes) -> bytes:
    properties = {
        "delivery_mode": 1,
        "delivery_info": {"exchange": _EVENTS, "routing_key": routing_key},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    return encode_envelope(Envelope(body=base64.b64encode(event).decode("ascii"), headers={}, properties=properties))
