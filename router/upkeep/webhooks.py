"""Webhooks of one router: the registered endpoints, and the delivery of events to them.

Every router reads the endpoints once per second, and delivers. A router leases an endpoint, which so gets one event at
a time, in order. An event is delivered at least once: when a router dies after the endpoint took an event and
before that is recorded, another router sends it again under the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from random import random

import aiohttp
import msgspec

from broker.valkey.webhooks import Taken, change_call, decode_event, settle_answer, settle_call, take_answer, take_call
from router.decide.facts import named
from router.decide.webhooks import (
    Attempt,
    Endpoints,
    WebhookEndpoint,
    WebhookMessage,
    forbidden,
    headers_of,
    judge,
    message_of,
)
from router.service.admission import Rules
from router.service.store import RouterStore
from tasks.webhooks import WebhookEvent
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import WEBHOOKS
from taxiway.errors import BrokerUnavailableError, cut
from taxiway.running import end

logger = logging.getLogger(__name__)

READ_EVERY = 1.0
"""Seconds between two readings of the endpoints: a change takes effect at every router within this time."""

POLL = 0.25
"""Seconds between two checks for due events, if there are endpoints."""

SPARE = 2.0
"""Seconds by which a lease is longer than an attempt may take: enough to record its outcome."""

ENDPOINTS_AT_ONCE = 64
"""Endpoints that one router delivers to at the same time."""

MOST_ANSWER = 65_536
"""Bytes of an endpoint's answer that are read, and ignored, so that the connection can be used again."""

_decode = msgspec.json.Decoder(WebhookEndpoint).decode


class WebhookDelivery:
    """The endpoints, and deliveries to them. `outcomes` counts this router's attempts by their outcome."""

    def __init__(self, url: str, store: RouterStore, rules: Rules, name: str) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter()
        self.connection = AsyncConnection(url, server="state store")
        self._store = store
        self._rules = rules
        self._limits = rules.topology.webhooks
        self._lease = self._limits.timeout + SPARE
        self._name = name
        self.raw: dict[str, bytes] = {}  # the endpoints as stored, by id
        self.known: dict[str, WebhookEndpoint] = {}
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._leaving = False

    async def read(self) -> None:
        """Read the endpoints; they are notified of jobs that are admitted from now on."""
        flat = await self.connection.call("HGETALL", WEBHOOKS)
        raw = named(flat)
        if raw == self.raw:
            return
        self.raw, self.known = raw, {name: one for name, value in raw.items() if (one := _read(name, value))}
        by_tenant = defaultdict[str, list[WebhookEndpoint]](list)
        for one in sorted(self.known.values(), key=lambda one: (one.created_at, one.id)):
            by_tenant[one.tenant].append(one)
        own = {tenant: tuple(endpoints) for tenant, endpoints in by_tenant.items()}
        self._rules.webhooks = Endpoints(self._limits, own)

    async def run(self) -> None:
        """Read the endpoints and deliver until cancelled; outages are logged by other loops."""
        clock, read_at = asyncio.get_running_loop().time, 0.0
        while True:
            with contextlib.suppress(BrokerUnavailableError):
                if clock() - read_at >= READ_EVERY:
                    await self.read()
                    read_at = clock()
                if self.known and not self._leaving:
                    await self._take()
            await asyncio.sleep(POLL)

    async def retire(self) -> None:
        """Begin no attempt, and finish those in progress."""
        self._leaving = True
        if self._deliveries:
            await asyncio.wait(self._deliveries.values(), timeout=self._limits.timeout)

    async def close(self) -> None:
        """Stop; events whose attempts are in progress are sent again by another router."""
        await end(self._deliveries.values())
        if self._session is not None:
            await self._session.close()
        self.connection.close()

    async def _take(self) -> None:
        self._store.clock.stored_now()  # raises until the store's time is known: signatures have it
        self._deliveries = {name: task for name, task in self._deliveries.items() if not task.done()}
        free = ENDPOINTS_AT_ONCE - len(self._deliveries)
        if free <= 0:
            return
        _, taken = take_answer(await self.connection.run(take_call(self._name, self._lease, free)))
        for one in taken:
            if one.endpoint not in self._deliveries:  # else its lease passed: that delivery is fenced, and ends
                self._deliveries[one.endpoint] = asyncio.create_task(self._deliver(one))

    async def _deliver(self, taken: Taken) -> None:
        """Send an endpoint its events, one after another, until one fails or none is left."""
        before = taken.attempts
        try:
            event: WebhookEvent | None = decode_event(taken.event)
            if taken.endpoint not in self.known:
                await self.read()
            if taken.endpoint not in self.known:  # it was removed before a job that named it ended: so are its events
                await self.change(taken.endpoint, b"", b"")
            while event is not None and not self._leaving and (endpoint := self.known.get(taken.endpoint)):
                event, before = await self._attempt(endpoint, taken.token, event, before), 0
        except BrokerUnavailableError as error:  # the lease passes
            logger.warning("webhook outcome not recorded", extra={"endpoint": taken.endpoint, "error": error.message})
        except Exception:
            logger.exception("webhook delivery failed", extra={"endpoint": taken.endpoint})

    async def _attempt(
        self, endpoint: WebhookEndpoint, token: str, event: WebhookEvent, before: int
    ) -> WebhookEvent | None:
        """Send an event once, and record the outcome; returns the next event to send."""
        attempt = await self.post(endpoint, message_of(event))
        now = self._store.clock.now()
        verdict = judge(attempt, before=before, begun=event.begun, now=now, draw=random(), rules=self._limits)
        self.outcomes[verdict.outcome,] += 1
        if verdict.outcome == "dead":
            logger.warning("webhook event given up", extra={"endpoint": endpoint.id, "fault": verdict.fault})
        lease = 0.0 if self._leaving else self._lease
        call = settle_call(
            endpoint.id,
            token,
            verdict.outcome,
            pause=verdict.pause if verdict.outcome == "retry" else lease,
            fault=verdict.fault,
            most_dead=self._limits.dead,
        )
        return settle_answer(await self.connection.run(call))

    async def post(self, endpoint: WebhookEndpoint, message: WebhookMessage) -> Attempt:
        """Send a message once."""
        now = self._store.clock.now()
        headers = headers_of(message, endpoint.signing(now), now)
        try:
            sent = self._open().post(endpoint.url, data=message.body, headers=headers, allow_redirects=False)
            async with sent as answer:
                with contextlib.suppress(aiohttp.ClientError, asyncio.IncompleteReadError, TimeoutError):
                    await answer.content.readexactly(MOST_ANSWER)
                pause = answer.headers.get("retry-after", "")
                return Attempt(answer.status, retry_after=float(pause) if pause.isdecimal() and len(pause) < 9 else 0.0)
        except aiohttp.ClientConnectorError as error:
            return Attempt(0, f"cannot connect: {cut(error.os_error.strerror or str(error.os_error))}")
        except TimeoutError:
            return Attempt(0, f"no answer within {self._limits.timeout:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Attempt(0, cut(f"{type(error).__name__}: {error}"))

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=ENDPOINTS_AT_ONCE, socket_factory=guarded(self._limits.networks)),
                timeout=aiohttp.ClientTimeout(total=self._limits.timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # compressed answers may be large
                trust_env=False,  # a proxy would connect in place of the guard
            )
        return self._session

    async def change(self, name: str, before: bytes, after: bytes) -> bool:
        """Replace an endpoint as stored, empty for none, by another value; False if it is not `before` any more."""
        done = bool(await self.connection.run(change_call(name, before, after)))
        await self.read()
        return done


def _read(name: str, raw: bytes) -> WebhookEndpoint | None:
    """An endpoint as stored; None if another release wrote it in a form that this one does not know."""
    try:
        return _decode(raw)
    except msgspec.MsgspecError as error:
        logger.error("webhook endpoint not read", extra={"endpoint": name, "error": str(error)})
        return None


def guarded(networks: Sequence[str]) -> Callable[[aiohttp.AddrInfoType], socket.socket]:
    """Makes the socket for each address that is about to be connected to, if events may go there.

    So a name is checked each time that it is resolved, and an address that stands in place of a name is checked too.
    """

    def open_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        if why := forbidden(str(address[0]), networks):
            raise PermissionError(errno.EACCES, why)
        return socket.socket(family, kind, protocol)

    return open_socket
