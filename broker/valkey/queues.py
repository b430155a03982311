"""Arrivals and class queues on Valkey or Redis, where kombu keeps them.

What a router takes is moved, on the server, into lists of its session, and stays there until it is forwarded. A session
lasts while its router signs it; what a router had in flight under a session that ended returns to the arrivals. An idle
router waits with `BLMOVE` into such lists, one per level: it wakes with the message, and one more call forwards it.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from broker.port import TAKE_AT_MOST, TAKE_BYTES, Arrival, InFlight, Outgoing, StoredSnapshot, beside
from broker.valkey import Call
from broker.valkey.forwarding import (
    Forwarded,
    Taking,
    forward_answer,
    forward_call,
    mark_published,
    marked,
    unpublished,
)
from taxiway.connection import AsyncConnection
from taxiway.contract.job import JobState
from taxiway.contract.keys import (
    ARRIVALS,
    DEFAULT_QUEUE,
    INFER,
    LEVELS,
    SESSIONS,
    in_flight_key,
    priority_lists,
    session_key,
)
from taxiway.contract.wire import (
    Durability,
    Envelope,
    check_confirmed,
    confirming,
    decode_envelope,
    encode_envelope,
    takes_nothing,
)
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from taxiway.valkey import ServerError, fleet_errors, parse

LASTS = 5.0
"""Seconds without a sign after which what a router took is put back."""

RENEW = 1.0
"""Seconds between two signs of life."""

REMEMBERED = 1200.0
"""Seconds for which an ended session is looked after: longer than Linux resends what a lost connection holds."""

REMEMBERED_AT_MOST = 256
"""Ended sessions that are looked after at once: a network that breaks every second leaves one each time."""

RECENT = 60.0
"""Seconds since its last sign for which an ended session is looked at each time; later, seldom."""

SELDOM = 10
"""Looks of which one is at all ended sessions, and the others at the recent ones."""

TAKES = "takes"
"""The list for what a router takes together; the others are for what it waits for, one a level."""

SOURCES = (TAKES, *map(str, range(LEVELS)))


class Session:
    """One router's sessions, one after the other."""

    def __init__(self, connection: AsyncConnection, router: str) -> None:
        self._connection = connection
        self._router = router
        self._looks = 0
        self._number = 0
        self._ahead = 0.0
        self.name, self._newborn, self._signed = "", True, -math.inf
        self._begin()

    @property
    def key(self) -> str:
        """The key of the present session."""
        return session_key(self.name)

    @property
    def due(self) -> bool:
        """Whether it is time for a sign."""
        return time.monotonic() - self._signed > RENEW

    def in_flight(self, source: str) -> str:
        """The list of what was taken from `source` in the present session."""
        return in_flight_key(self.name, source)

    def now(self) -> float:
        """The server's time, as of its last answer and this host's clock since."""
        return time.monotonic() + self._ahead

    def set_clock(self, now: float) -> None:
        """Take the server's time from an answer that just came."""
        self._ahead = now - time.monotonic()

    async def sign(self) -> bool:
        """Show that the router lives; False where its session had ended: then it has to `end`."""
        name, newborn = self.name, self._newborn
        now, lives = await self._connection.run(sign_call(name, LASTS, begins=newborn))
        self.set_clock(float(now))
        if name == self.name:
            self._signed, self._newborn = time.monotonic(), False
        return bool(lives)

    async def end(self, *, reached: bool) -> None:
        """End the present session, put back all that is in flight under it, and begin another.

        `reached` means that the server answered every move into its lists, so no router has to recover the session.
        """
        await self._connection.call("DEL", self.key)
        await self._recover_all([self.name], remembered=-1.0 if reached else REMEMBERED)
        self._begin()

    async def give_back(self, lists: Sequence[str]) -> None:
        """Put back what is in these lists; the session goes on."""
        await self._connection.run(Call("fleet/session_give_back", [ARRIVALS, *lists]))

    async def recover(self) -> int:
        """Put back what is in flight under the sessions of others that ended; how many messages.

        A session that ended long ago is looked at seldom.
        """
        self._looks += 1
        oldest = "-inf" if self._looks % SELDOM == 0 else self.now() - LASTS - RECENT
        sessions: list[Any] = await self._connection.call("ZRANGEBYSCORE", SESSIONS, oldest, "+inf")
        names = [session.decode() for session in sessions]
        return await self._recover_all([name for name in names if name != self.name], remembered=REMEMBERED)

    async def _recover_all(self, sessions: Sequence[str], *, remembered: float) -> int:
        return sum([int(await self._connection.run(recover_call(session, remembered))) for session in sessions])

    def _begin(self) -> None:
        self._number += 1
        self.name = f"{self._router}.{self._number}"
        self._newborn, self._signed = True, -math.inf


def sign_call(session: str, lasts: float, *, begins: bool) -> Call:
    """Shows that a session lasts; answers the time, and 0 where it had ended."""
    return Call(
        "fleet/session_sign", [SESSIONS, session_key(session)], [session, int(lasts * 1000), "1" if begins else ""]
    )


def recover_call(session: str, remembered: float, most: int = REMEMBERED_AT_MOST) -> Call:
    """Puts back what is in flight under a session that ended; answers how many messages."""
    keys = [SESSIONS, session_key(session), ARRIVALS, *(in_flight_key(session, source) for source in SOURCES)]
    return Call("fleet/session_recover", keys, [session, remembered, most])


_CONFIRMED_WITHIN = 0.6  # seconds: with the call itself less than a caller waits for
_SEEN = {"state": JobState.QUEUED}

_MISDIRECTED_AT_MOST = 64

EVENTS = "celeryev"
"""Celery's exchange for events; kombu's channel for it is /<database>.<exchange>/<routing key>."""


class ValkeyTransport:
    """A router's hold on a Valkey broker. Where `state` is another server, records are written there first.

    A message's tag is the list that it was taken into: all of a list are answered together.
    """

    def __init__(
        self, *, broker: str, state: str, name: str, keep_record: int, durability: Durability = "written"
    ) -> None:
        self._signs, self._takes, self._sends = (
            AsyncConnection(broker),
            AsyncConnection(broker),
            AsyncConnection(broker),
        )
        self._records = AsyncConnection(state) if state != broker else None
        self._waiters = [AsyncConnection(broker, answer=None) for _ in range(LEVELS)]
        self._database = parse(broker).database
        self._keep = keep_record
        self._confirming = confirming(durability, _CONFIRMED_WITHIN)
        self._session = Session(self._signs, name)
        self._waits: dict[int, asyncio.Task[Any]] = {}
        self._rung = asyncio.Event()
        self._held: set[str] = set()
        self._ahead: list[tuple[str, bytes]] = []  # tags and messages
        self._more = True
        self._bursts = False
        self._abandoned = False
        self._lost = False  # what a call moved is not known: its answer never came

    async def wait(self, longest: float) -> None:
        """Return when a message was moved out of one of the arrivals' lists, at the latest after `longest` seconds.

        What is waited for must come before this session may end: `longest` is far less than `LASTS`. Raises at
        once where the server refuses to move.
        """
        for level, name in enumerate(priority_lists(ARRIVALS)):
            if level not in self._waits:
                move = ("BLMOVE", name, self._session.in_flight(str(level)), "RIGHT", "LEFT", longest)
                self._waits[level] = asyncio.ensure_future(self._waiters[level].call(*move))
                self._waits[level].add_done_callback(self._ring)
        if not any(wait.done() for wait in self._waits.values()):
            self._rung.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(longest):
                    await self._rung.wait()
        failed = [level for level, wait in self._waits.items() if _failure(wait)]
        with fleet_errors("broker"):
            for wait in [self._waits.pop(level) for level in failed]:
                with self._answered():
                    wait.result()

    async def take(self) -> InFlight:
        """What `wait` moved and the last call took; and where they come in bursts lately, the others of the burst."""
        with fleet_errors("broker"):
            if self._abandoned:
                await self._give_back()
            while self._session.due and not await self._session.sign():
                await self._end_session()
            woken = self._woken()
            if self._more or (woken and self._bursts):
                await self._exchange([], set())
                self._bursts = bool(self._ahead)
            if self._more:  # its session ended, and what was woken returns to the arrivals
                await self._end_session()
                return InFlight(self._session.now())
        ahead, self._ahead = self._ahead, []
        arrivals = [await beside(len(raw), _arrival, tag, raw) for tag, raw in (*woken, *ahead)]
        return InFlight(self._session.now(), arrivals)

    async def forward(self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()) -> list[bool]:
        """Publish and record, at once where broker and state are one server."""
        tags = {m.tag for m in messages if m.tag}
        if self._records is None:
            done = await self._run_forward(messages, tags, snapshots)
            await self._confirm(self._sends, tags)
            return done
        recorded = await self._run_record([marked(message) for message in messages], snapshots)
        left = [m.held or no for m, no in zip(messages, recorded.refused, strict=True)]  # what is published nowhere
        published = [_unrecorded(m) for m, stays in zip(messages, left, strict=True) if not stays]
        await self._confirm(self._records, tags)
        sent = iter(await self._run_forward(published, tags))
        await self._confirm(self._sends, tags)
        if published:
            with fleet_errors("state store"):
                await self._records.calls(*mark_published(published))
        return [new if stays else next(sent) for new, stays in zip(recorded.done, left, strict=True)]

    async def release(self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()) -> list[bool]:
        """Publish and record, at once where broker and state are one server; else in this order: a copy is harmless."""
        if self._records is None:
            return await self._run_release(messages, snapshots, was=JobState.HELD)
        await self._run_release([_unrecorded(m) for m in messages])
        return (await self._run_record(messages, snapshots, was=JobState.HELD, held=True)).done

    async def settle(self, tags: Sequence[str]) -> None:
        """Forget arrivals, with all that were taken with them."""
        held = self._held.intersection(tags)
        if held:
            await self._run_forward([], held)

    def abandon(self) -> None:
        """Put back, before the next take, all that this router holds: also what a lost answer took."""
        self._abandoned = True

    async def retire(self) -> None:
        """Put back what `wait` moved and was not taken; the new session takes nothing."""
        with fleet_errors("broker"):
            await self._end_session()

    async def tidy(self) -> int:
        """Show that this router lives, and put back what dead ones had taken."""
        with fleet_errors("broker"):
            if not await self._session.sign():
                self._abandoned = True
            return await self._session.recover()

    async def misdirected(self) -> list[Arrival]:
        """Requests among the oldest messages of Celery's default queue, which may be shared with other applications."""
        with fleet_errors("broker"):
            found = await self._sends.run(
                Call("queues/misdirected", [DEFAULT_QUEUE], [_MISDIRECTED_AT_MOST, f'"{INFER}"'])
            )
        return [one for one in (_arrival("", raw) for raw in found) if _is_request(one)]

    async def forget(self, misdirected: Sequence[Arrival]) -> None:
        """Take these out of that queue by their contents."""
        with fleet_errors("broker"):
            for one in misdirected:
                await self._sends.call("LREM", DEFAULT_QUEUE, 1, one.raw)

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event on the channel of kombu's fanout exchange."""
        with fleet_errors("broker"):
            channel = f"/{self._database}.{EVENTS}/{routing_key}"
            await self._signs.call("PUBLISH", channel, kombu_event(routing_key, event))

    async def close(self) -> None:
        """Put back what is still taken, and disconnect."""
        try:
            with fleet_errors("broker"):
                await self._end_session()
        except BrokerUnavailableError:
            pass  # the session ends by itself, and another router puts back what is in flight under it
        for connection in (self._signs, self._takes, self._sends, self._records, *self._waiters):
            if connection is not None:
                connection.close()

    def _ring(self, _: asyncio.Future[Any]) -> None:
        self._rung.set()

    def _woken(self) -> list[tuple[str, bytes]]:
        """What `wait` moved and was not taken yet, in serving order."""
        woken = []
        for level in sorted(level for level, wait in self._waits.items() if wait.done()):
            with self._answered():
                raw = self._waits.pop(level).result()
            if raw is not None:
                tag = self._session.in_flight(str(level))
                self._held.add(tag)
                woken.append((tag, raw))
        return woken

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Records that a call's moves are unknown, unless the server refused it."""
        try:
            yield
        except BaseException as error:
            self._lost = self._lost or not _refused(error)
            raise

    async def _give_back(self) -> None:
        """Put back all that was taken and not answered. The session goes on, unless an answer was lost."""
        if self._lost:
            await self._end_session()
            return
        if self._held:
            await self._session.give_back(sorted(self._held))
        self._held.clear()
        self._ahead.clear()
        self._more, self._abandoned = True, False

    async def _end_session(self) -> None:
        """Put back all that was taken and not answered, also what a lost answer took."""
        reached = not self._lost and all(map(_reached, self._waits.values()))
        for wait in self._waits.values():
            wait.cancel()
        await asyncio.gather(*self._waits.values(), return_exceptions=True)
        self._waits.clear()
        self._held.clear()
        self._ahead.clear()
        await self._session.end(reached=reached)
        self._more, self._abandoned, self._lost = True, False, False

    async def _run_forward(
        self, messages: Sequence[Outgoing], tags: Set[str], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[bool]:
        if not tags <= self._held:
            return [False] * len(messages)
        with fleet_errors("broker"):
            if tags:
                return await self._exchange(messages, tags, snapshots)
            call = forward_call(messages, keep=self._keep, snapshots=snapshots)
            return forward_answer(await self._sends.run(call)).done

    async def _run_release(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = (), *, was: str = ""
    ) -> list[bool]:
        call = forward_call(messages, keep=self._keep, was=was, snapshots=snapshots, held=True)
        with fleet_errors("broker"):
            return forward_answer(await self._sends.run(call)).done

    async def _exchange(
        self, messages: Sequence[Outgoing], tags: Set[str], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[bool]:
        """Forward what was taken under these tags, and take the next arrivals, unless such are still to be answered."""
        takes = self._session.in_flight(TAKES)
        most = 0 if takes in self._held - tags else TAKE_AT_MOST
        taking = Taking(self._session.key, takes, sorted(tags), most, TAKE_BYTES)
        call = forward_call(messages, taking, keep=self._keep, snapshots=snapshots)
        with self._answered():
            answer = forward_answer(await self._takes.run(call))
        self._session.set_clock(answer.now)
        self._more = not answer.lives
        self._held -= tags
        if answer.taken:
            self._held.add(takes)
            self._ahead = [(takes, raw) for raw in answer.taken]
            self._bursts = True
        return answer.done

    async def _confirm(self, connection: AsyncConnection, tags: Set[str]) -> None:
        """Wait until what was written on the connection is as durable as it is to be, of what comes from the own door.

        What came by the arrivals was accepted there, and a replica that has less has it there still.
        """
        if tags or not self._confirming:
            return
        with fleet_errors("broker"):
            check_confirmed(await connection.calls(*self._confirming))

    async def _run_record(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot], *, was: str = "", held: bool = False
    ) -> Forwarded:
        assert self._records is not None
        call = forward_call(messages, keep=self._keep, was=was, part=unpublished, snapshots=snapshots, held=held)
        with fleet_errors("state store"):
            return forward_answer(await self._records.run(call))


def _failure(call: asyncio.Task[Any]) -> BaseException | None:
    """What a call raised; None where it goes on, was cancelled, or has an answer."""
    return call.exception() if call.done() and not call.cancelled() else None


def _reached(call: asyncio.Task[Any]) -> bool:
    """Whether the server answered a call: nothing of it can still come."""
    failure = _failure(call)
    return call.done() and not call.cancelled() and (failure is None or _refused(failure))


def _refused(error: BaseException) -> bool:
    """Whether the server answered that it takes no writes: then nothing was moved."""
    return isinstance(error, ServerError) and takes_nothing(error)


def _unrecorded(message: Outgoing) -> Outgoing:
    """Only the publication of a message that is recorded elsewhere: the broker remembers that its job was there."""
    return msgspec.structs.replace(message, fields=_SEEN, use=None, lead=None)


def _is_request(arrival: Arrival) -> bool:
    return arrival.envelope is not None and arrival.envelope.headers.get("task") == INFER


def _arrival(tag: str, raw: bytes) -> Arrival:
    try:
        return Arrival(tag, raw, decode_envelope(raw))
    except InvalidRequestError as error:
        return Arrival(tag, raw, None, error.message)


def kombu_event(routing_key: str, event: bytes) -> bytes:
    """The message that carries an event, or a list of them, encoded as JSON."""
    properties = {
        "delivery_mode": 1,
        "delivery_info": {"exchange": EVENTS, "routing_key": routing_key},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    return encode_envelope(Envelope(body=base64.b64encode(event).decode("ascii"), headers={}, properties=properties))
