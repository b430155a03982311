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
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from broker.port import TAKE_AT_MOST, TAKE_BYTES, Arrival, ForwardOutcome, Outgoing, StoredReceipts, StoredSnapshot
from broker.valkey import Call
from broker.valkey.forwarding import Taking, forward_answer, forward_call
from taxiway.connection import AsyncConnection
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
from taxiway.contract.wire import Envelope, check_confirmed, confirming, decode_envelope, encode_envelope
from taxiway.errors import BrokerFullError, BrokerUnavailableError, InvalidRequestError
from taxiway.running import beside, end
from taxiway.valkey import parse

LASTS = 5.0
"""Seconds without a renewal after which a session ends."""

RENEW_EVERY = 1.0
"""Seconds between two renewals of a session."""

SESSION_REMEMBERED = 1200.0
"""Seconds for which an ended session is still checked: longer than Linux resends the data of a lost connection."""

REMEMBERED_AT_MOST = 256
"""Ended sessions that are still checked: a network that breaks every second leaves one each time."""

TAKES = "takes"
"""The list of the messages that a router takes together; there is another per level, for the messages it waits for."""

SOURCES = (TAKES, *map(str, range(LEVELS)))

_CONFIRMED_WITHIN = 0.6  # seconds: together with the call itself, less than a caller waits
_MISDIRECTED_AT_MOST = 64
_DECODED_BYTES = 2**16  # of a message: less than a millisecond of the store's time

EVENTS = "celeryev"
"""Celery's exchange for events; kombu's channel for it is /<database>.<exchange>/<routing key>."""


class Session:
    """One router's sessions, one after another."""

    def __init__(self, connection: AsyncConnection, router: str) -> None:
        self._connection = connection
        self._router = router
        self._number = 0
        self.name, self._newborn, self._signed = "", True, -math.inf
        self._begin()

    @property
    def key(self) -> str:
        """The key of the current session."""
        return session_key(self.name)

    @property
    def due(self) -> bool:
        """Whether the session should be renewed."""
        return time.monotonic() - self._signed > RENEW_EVERY

    def in_flight(self, source: str) -> str:
        """The in-flight list of messages taken from `source` in the current session."""
        return in_flight_key(self.name, source)

    async def sign(self) -> bool:
        """Renew the session; False if it has already ended, so that `end` must be called."""
        name, newborn = self.name, self._newborn
        arguments = [name, int(LASTS * 1000), "1" if newborn else ""]
        lives = await self._connection.run(Call("fleet/session_sign", [SESSIONS, session_key(name)], arguments))
        if name == self.name:
            self._signed, self._newborn = time.monotonic(), False
        return bool(lives)

    async def end(self, *, reached: bool) -> None:
        """End the current session, return its in-flight messages to the arrivals, and begin another.

        `reached` means that the server answered every move into its lists, so no router has to recover the session.
        """
        await self._connection.call("DEL", self.key)
        await self._recover_all([self.name], remembered=-1.0 if reached else SESSION_REMEMBERED)
        self._begin()

    async def give_back(self, lists: Sequence[str]) -> None:
        """Return the messages in these lists to the arrivals; the session continues."""
        await self._connection.run(Call("fleet/session_give_back", [ARRIVALS, *lists]))

    async def recover(self) -> int:
        """Return the in-flight messages of other routers' ended sessions to the arrivals; returns their number."""
        sessions: list[Any] = await self._connection.call("ZRANGE", SESSIONS, 0, -1)
        names = [session.decode() for session in sessions]
        return await self._recover_all([name for name in names if name != self.name], remembered=SESSION_REMEMBERED)

    async def _recover_all(self, sessions: Sequence[str], *, remembered: float) -> int:
        calls = []
        for session in sessions:
            keys = [SESSIONS, session_key(session), ARRIVALS, *(in_flight_key(session, source) for source in SOURCES)]
            calls.append(Call("fleet/session_recover", keys, [session, remembered, REMEMBERED_AT_MOST]))
        return sum(await asyncio.gather(*map(self._connection.run, calls)))

    def _begin(self) -> None:
        self._number += 1
        self.name = f"{self._router}.{self._number}"
        self._newborn, self._signed = True, -math.inf


class ValkeyTransport:
    """Carries messages between arrivals, routers and class queues, for one router.

    A message that was taken is answered by `forward` or `settle` exactly once; if its router dies before that, it
    returns to the arrivals. Its tag is the list that it was taken into: all messages of a list are answered together.
    Every method raises `BrokerUnavailableError` while the state store does not answer.
    """

    def __init__(self, url: str, *, name: str, keep_record: int, confirmed_by: int = 0) -> None:
        self._signs, self._takes, self._sends = (AsyncConnection(url, server="state store") for _ in range(3))
        self._waiters = [AsyncConnection(url, server="state store", answer=None) for _ in range(LEVELS)]
        self._database = parse(url).database
        self._keep = keep_record
        self._confirmed_by = confirmed_by  # replicas
        self._confirming = confirming(confirmed_by, _CONFIRMED_WITHIN)
        self._session = Session(self._signs, name)
        self._waits: dict[int, asyncio.Task[Any]] = {}
        self._rung = asyncio.Event()
        self._held: set[str] = set()
        self._ahead: list[tuple[str, bytes]] = []  # tags and messages
        self._more = True
        self._bursts = False
        self._abandoned = False
        self._lost = False  # whether a call got no answer, so that what it moved is unknown

    async def wait(self, longest: float) -> None:
        """Return when a message was moved out of one of the arrivals' lists, at the latest after `longest` seconds.

        The wait must end before the session may end: `longest` is far less than `LASTS`. Raises at once if the server
        refuses to move messages.
        """
        for level, name in enumerate(priority_lists(ARRIVALS)):
            if level not in self._waits:
                move = ("BLMOVE", name, self._session.in_flight(str(level)), "RIGHT", "LEFT", longest)
                self._waits[level] = asyncio.ensure_future(self._waiters[level].call(*move))
                self._waits[level].add_done_callback(lambda _: self._rung.set())
        if not any(wait.done() for wait in self._waits.values()):
            self._rung.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(longest):
                    await self._rung.wait()
        failed = [level for level, wait in self._waits.items() if _failure(wait)]
        for wait in [self._waits.pop(level) for level in failed]:
            with self._answered():
                wait.result()

    async def take(self) -> list[Arrival]:
        """What `wait` moved and the last call took, in serving order; in bursts of arrivals also the burst's rest."""
        if self._abandoned:
            await self._give_back()
        while self._session.due and not await self._session.sign():
            await self._end_session()
        woken = self._woken()
        if self._more or (woken and self._bursts):
            await self._exchange(partial(forward_call, [], keep=self._keep), set())
            self._bursts = bool(self._ahead)
        if self._more:  # the session ended, and the messages that `wait` moved return to the arrivals
            await self._end_session()
            return []
        ahead, self._ahead = self._ahead, []
        return [await beside(len(raw), _arrival, tag, raw) for tag, raw in (*woken, *ahead)]

    async def forward(
        self,
        messages: Sequence[Outgoing],
        snapshots: Sequence[StoredSnapshot] = (),
        receipts: StoredReceipts | None = None,
    ) -> list[ForwardOutcome]:
        """Publish and record, in one step."""
        tags = {m.tag for m in messages if m.tag}
        call = partial(forward_call, messages, keep=self._keep, snapshots=snapshots, receipts=receipts)
        if not tags <= self._held:
            done = [ForwardOutcome.COPY] * len(messages)
        elif tags:
            done = await self._exchange(call, tags)
        else:
            done = forward_answer(await self._sends.run(call())).done
        await self._confirm(tags)
        return done

    async def release(
        self,
        messages: Sequence[Outgoing],
        snapshots: Sequence[StoredSnapshot] = (),
        receipts: StoredReceipts | None = None,
    ) -> list[ForwardOutcome]:
        """Publish and record jobs that were held, in one step."""
        call = forward_call(messages, keep=self._keep, snapshots=snapshots, receipts=receipts, held=True)
        return forward_answer(await self._sends.run(call)).done

    async def settle(self, tags: Sequence[str]) -> None:
        """Delete arrivals, with all that were taken with them."""
        held = self._held.intersection(tags)
        if held:
            await self._exchange(partial(forward_call, [], keep=self._keep), held)

    def abandon(self) -> None:
        """Return all in-flight messages to the arrivals before the next take, also those of an unanswered call."""
        self._abandoned = True

    async def retire(self) -> None:
        """Return the messages that `wait` moved and no session took to the arrivals; the new session takes nothing."""
        await self._end_session()

    async def tidy(self) -> int:
        """Renew this router's session, and return the in-flight messages of dead routers to the arrivals."""
        if not await self._session.sign():
            self._abandoned = True
        return await self._session.recover()

    async def misdirected(self) -> list[Arrival]:
        """Requests among the oldest messages of Celery's default queue, which may be shared with other applications."""
        looked_for = [_MISDIRECTED_AT_MOST, INFER, _DECODED_BYTES]
        found = await self._sends.run(Call("queues/misdirected", [DEFAULT_QUEUE], looked_for))
        arrivals = [_arrival("", raw) for raw in found]
        return [one for one in arrivals if one.envelope is not None and one.envelope.headers.get("task") == INFER]

    async def forget(self, misdirected: Sequence[Arrival]) -> None:
        """Remove these from that queue, by their content."""
        for one in misdirected:
            await self._sends.call("LREM", DEFAULT_QUEUE, 1, one.raw)

    async def send(self, queue: str, envelope: Envelope) -> None:
        """Put a message in another application's queue, at its highest priority, which is Celery's default."""
        await self._sends.call("LPUSH", queue, encode_envelope(envelope))

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event on the channel of kombu's fanout exchange."""
        channel = f"/{self._database}.{EVENTS}/{routing_key}"
        await self._signs.call("PUBLISH", channel, kombu_event(routing_key, event))

    async def close(self) -> None:
        """Return in-flight messages to the arrivals, and disconnect."""
        with suppress(BrokerUnavailableError):  # the session expires, and another router returns its in-flight messages
            await self._end_session()
        for connection in (self._signs, self._takes, self._sends, *self._waiters):
            connection.close()

    def _woken(self) -> list[tuple[str, bytes]]:
        """The messages that `wait` moved and that were not taken yet, in serving order."""
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
        """Return all in-flight messages to the arrivals. The session continues, unless a call was not answered."""
        if self._lost:
            await self._end_session()
            return
        if self._held:
            await self._session.give_back(sorted(self._held))
        self._held.clear()
        self._ahead.clear()
        self._more, self._abandoned = True, False

    async def _end_session(self) -> None:
        """Return all in-flight messages to the arrivals, also those taken by an unanswered call."""
        reached = not self._lost and all(map(_reached, self._waits.values()))
        await end(self._waits.values())
        self._waits.clear()
        self._held.clear()
        self._ahead.clear()
        await self._session.end(reached=reached)
        self._more, self._abandoned, self._lost = True, False, False

    async def _exchange(self, call: Callable[[Taking], Call], tags: Set[str]) -> list[ForwardOutcome]:
        """Forward messages taken under these tags, and take the next arrivals, unless taken ones are unanswered."""
        takes = self._session.in_flight(TAKES)
        most = 0 if takes in self._held - tags else TAKE_AT_MOST
        taking = Taking(self._session.key, takes, sorted(tags), most, TAKE_BYTES)
        with self._answered():
            answer = forward_answer(await self._takes.run(call(taking)))
        self._more = not answer.lives
        self._held -= tags
        if answer.taken:
            self._held.add(takes)
            self._ahead = [(takes, raw) for raw in answer.taken]
            self._bursts = True
        return answer.done

    async def _confirm(self, tags: Set[str]) -> None:
        """Wait until requests of the HTTP API that were written are as durable as configured.

        Requests from the arrivals were durable there, and a replica that lags behind still has them there.
        """
        if tags or not self._confirming:
            return
        check_confirmed(await self._sends.calls(*self._confirming), self._confirmed_by)


def _failure(call: asyncio.Task[Any]) -> BaseException | None:
    """What a call raised; None if it is running, was cancelled, or was answered."""
    return call.exception() if call.done() and not call.cancelled() else None


def _reached(call: asyncio.Task[Any]) -> bool:
    """Whether the server answered a call, so that it can have no later effect."""
    failure = _failure(call)
    return call.done() and not call.cancelled() and (failure is None or _refused(failure))


def _refused(error: BaseException) -> bool:
    """Whether the server answered that it accepts no writes: then nothing was moved."""
    return isinstance(error, BrokerFullError)


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
