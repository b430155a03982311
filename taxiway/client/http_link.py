"""Requests and event streams to one router, with retries while the router is unavailable.

aiohttp does the HTTP; this module decides what is retried, and when a silent router is unavailable. TLS certificates
are always verified, against the system's authorities or the file that `SSL_CERT_FILE` names. A certificate that fails
verification raises at once: retrying cannot help. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` apply, except for this
machine's own addresses.
"""

from __future__ import annotations

import asyncio
import base64
import math
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from taxiway.contract.limits import Buffer
from taxiway.contract.server_events import EventParser, ServerEvent
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, invalid
from taxiway.running import check_loop, end

KEEP_ALIVE = 4.0
"""Seconds for which an idle connection is kept for reuse: servers close theirs after 5 s or more."""

MOST_BODY = 2**30
"""Most bytes of one response or event stream: a server that sends more is at fault."""

_RECONNECT_PAUSE = 0.1
"""Seconds before connecting again."""

_SMALL_BODY = 65536
"""Bodies up to this many bytes are sent in one write with the header."""

_CHUNK = 262144
"""Bytes per write of a larger body."""

LONGEST_WAIT = 20.0
"""Seconds of one long poll: shorter than the idle time-outs of common proxies (30 to 60 s)."""

SILENCE = LONGEST_WAIT + 2.0
"""Seconds of silence after which a connection is abandoned, even if others receive data: the router, or a proxy on the
way, may have dropped it. Every request is answered, and every stream kept alive, within `LONGEST_WAIT`."""

LONGEST_CALL = LONGEST_WAIT + 10.0
"""Seconds that a call may take besides those for its bytes; event streams may take longer."""

_SLOWEST = 65536
"""Bytes per second that a call's bodies are given: a server that sends one now and then is not waited for."""

_LIVE = "/v2/health/live"

_LAST_EVENT_ID = "last-event-id"

_NO_AUTO_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp would add. Compressing tensors costs more time than it saves."""

_UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)
"""The connection failed before anything was sent."""

Sink = Callable[[bytes], None]
"""Receives the chunks of a successful response's body."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response. Header names are looked up in any case; `body` is empty if a sink received it."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


class DisconnectedError(BrokerUnavailableError):
    """The server closed the connection before it answered: whether the request took effect is unknown."""


class NotAStreamError(Exception):
    """The server's response is not an event stream."""

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(f"expected an event stream, got status {response.status}")
        self.response = response


@dataclass(frozen=True, slots=True)
class _Request:
    """A request. It is sent at most `once`; its sink receives the response's body, if it has one."""

    method: str
    path: str
    body: Sequence[Buffer] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    sink: Sink | None = None
    once: bool = False

    def sent(self, call: _Call) -> dict[str, Any]:
        """The body as aiohttp takes it, and the headers: buffers of a large body are neither joined nor copied."""
        size = sum(map(len, self.body))
        if size <= _SMALL_BODY:
            return {"data": b"".join(self.body) or None, "headers": self.headers}
        return {"data": self._chunks(call), "headers": {**self.headers, "content-length": str(size)}}

    async def _chunks(self, call: _Call) -> AsyncGenerator[memoryview, None]:
        clock = asyncio.get_running_loop().time
        for piece in self.body:
            view = memoryview(piece)
            for start in range(0, len(view), _CHUNK):
                yield view[start : start + _CHUNK]
                call.carried(min(_CHUNK, len(view) - start), clock())


class HttpLink:
    """Requests to one server. Each call has a connection to itself; there are as many connections as calls.

    While a call waits, a silent server is probed: an answer may take long, but the server must be alive. The probe may
    reach another server behind the same address, so a connection may be silent for at most `silence` seconds.
    """

    def __init__(self, url: str, connect_timeout: float, key: str | None = None, *, silence: float = SILENCE) -> None:
        parts = urlsplit(url)
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # never with a password
        self.last_active = 0.0
        self.connect_timeout = connect_timeout
        self._last_unavailable = 0.0
        self._silence = silence
        address = _address(parts)
        self._base = str(address).rstrip("/")
        self._proxy = _proxy_of(address)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = _credentials(parts, key)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._calls: set[_Call] = set()
        self._watching: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[bool] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Sequence[Buffer] = (),
        headers: Mapping[str, str] | None = None,
        *,
        sink: Sink | None = None,
        once: bool = False,
    ) -> HttpResponse:
        """The server's answer, however long it takes.

        A request to a server that stops or fails is retried for `connect_timeout` seconds: another server may take
        over. Two cases are not retried: `once` (a repetition would take effect twice), and `sink`, which may already
        have received part of the body.

        Raises:
            DisconnectedError: the connection broke, and the request may not be retried, or retries failed for
                `connect_timeout`.
            BrokerUnavailableError: the server cannot be reached, or was silent for `connect_timeout` s; the detail
                `sent` is set if the request had been sent and may have taken effect.
            FleetUnavailable: the response is not HTTP, or longer than `MOST_BODY`.
        """
        request = _Request(method, path, body, headers or {}, sink, once)
        until = None
        while True:
            try:
                return await self._send_connected(request)
            except DisconnectedError:
                now = asyncio.get_running_loop().time()
                until = now + self.connect_timeout if until is None else until
                if once or sink is not None or now >= until:
                    raise
            except BrokerUnavailableError as error:
                if until is None:
                    raise
                raise self._unavailable(sent=True) from error
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def events(self, path: str, until: float | None) -> AsyncGenerator[ServerEvent, None]:
        """The events at `path`. A stream that ends is reopened, and continues after the last event received.

        A router that stops ends its streams at any point: the reader must recognise the last event. `until` is a time
        on the loop's clock.

        Raises:
            TimeoutError: `until` passed.
            BrokerUnavailableError: no answer, or broken streams, for `connect_timeout` seconds.
            NotAStreamError: the response is not a stream.
        """
        clock = asyncio.get_running_loop().time
        last, last_good = "", clock()
        while True:
            began = clock()
            events, parser = asyncio.Queue[ServerEvent | None](), EventParser(MOST_BODY)
            headers = {_LAST_EVENT_ID: last} if last else {}

            def take(chunk: bytes, events: Any = events, parser: EventParser = parser) -> None:
                for event in parser.feed(chunk):
                    events.put_nowait(event)

            reading = asyncio.create_task(self.ask("GET", path, headers=headers, sink=take))
            reading.add_done_callback(lambda _, events=events: events.put_nowait(None))  # type: ignore[misc]  # binds
            try:
                while (event := await _next(events, until)) is not None:
                    last = event.id or last
                    yield event
                    last_good = clock()
            finally:
                await end([reading])
            last_good = clock() if clock() - began > self.connect_timeout else last_good
            if not _should_reopen(reading, again=clock() - last_good < self.connect_timeout):
                return
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def close(self) -> None:
        """Close all connections."""
        self._closed = True
        await end((self._watching, self._probing))
        if self._session is not None:
            await self._session.close()

    async def _send_connected(self, request: _Request) -> HttpResponse:
        """Send the request once, after connecting with retries for `connect_timeout` seconds; returns the response."""
        if self.last_active < self._last_unavailable:
            await self._await_recovery()
        clock = asyncio.get_running_loop().time
        until = clock() + self.connect_timeout
        while True:
            began = clock()
            longest = LONGEST_CALL if request.sink is None else math.inf
            call = _Call(self, asyncio.timeout(None), began, began, began + max(longest, self.connect_timeout))
            try:
                return await self._try_once(call, request, max(_RECONNECT_PAUSE, until - began))
            except aiohttp.ClientConnectorCertificateError as error:
                reason = getattr(error.certificate_error, "verify_message", str(error.certificate_error))
                raise BrokerUnavailableError(f"TLS certificate verification failed for {self.url}: {reason}") from error
            except _UNREACHED as error:
                if clock() + _RECONNECT_PAUSE >= until:
                    raise self._unavailable() from error
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def _try_once(self, call: _Call, request: _Request, connect: float) -> HttpResponse:
        """One attempt. Raises a class in `_UNREACHED` if nothing was sent, otherwise what `ask` raises."""
        check_loop(self._watching)
        self._calls.add(call)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            async with call.scope:
                return await self._send(call, request, connect)
        except _UNREACHED:
            raise
        except TimeoutError as error:
            if asyncio.get_running_loop().time() - call.last_active < self._silence:
                raise self._unavailable(sent=True) from error
            raise self._disconnected() from error
        except (ConnectionError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise self._disconnected() from error
        except aiohttp.ClientError as error:
            raise self._unavailable(sent=True) from error
        finally:
            self._calls.discard(call)

    async def _send(self, call: _Call, request: _Request, connect: float) -> HttpResponse:
        if self._closed:
            raise self._unavailable()
        if self._session is None:  # made now because it belongs to the loop
            self._session = self._new_session(keepalive_timeout=KEEP_ALIVE)
        async with self._session.request(
            request.method,
            URL(self._base + request.path, encoded=True),
            **request.sent(call),
            middlewares=(_without_retry,) if request.once else (),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect, ceil_threshold=60),
        ) as response:
            return HttpResponse(response.status, response.headers, await self._read(response, call, request.sink))

    async def _read(self, response: aiohttp.ClientResponse, call: _Call, sink: Sink | None) -> bytes:
        """The body; empty if the sink receives it."""
        call.received()
        pieces: list[bytes] = []
        take = pieces.append if sink is None or response.status != HTTPStatus.OK else sink
        left = MOST_BODY
        async for piece in response.content.iter_any():
            call.received(len(piece))
            left -= len(piece)
            if left < 0:
                raise FleetUnavailable(f"expected at most {MOST_BODY} bytes from {self.url}, got more")
            take(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _new_session(self, **kept: Any) -> aiohttp.ClientSession:
        """A session with the server's TLS, proxy and credentials; host names are resolved again for each connection."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls or True, use_dns_cache=False, **kept),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            skip_auto_headers=_NO_AUTO_HEADERS,
            auto_decompress=False,
            proxy=self._proxy,
            read_bufsize=_CHUNK,
        )

    async def _watch(self) -> None:
        """Probe a silent server while calls wait for it; if it does not answer, fail those calls."""
        clock = asyncio.get_running_loop().time
        step = min(self.connect_timeout, self._silence) / 3
        while self._calls:
            await asyncio.sleep(step)
            now = clock()
            gone = False
            if self._calls and now - self.last_active >= step:
                alive = await self._is_alive(step)
                gone = not alive and self.last_active < now  # otherwise it is busy answering other calls
            for call in self._calls:
                end = now if gone else min(call.last_active + self._silence, call.latest)
                if not call.scope.expired():  # until its `connect_timeout` it may be connecting
                    call.scope.reschedule(max(end, call.began + self.connect_timeout + _RECONNECT_PAUSE))

    async def _await_recovery(self) -> None:
        """Wait up to `connect_timeout` seconds for an unavailable server; one probe serves all waiting calls.

        If each call sent and abandoned its own request again and again, an overloaded server would process only
        abandoned requests and never recover.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + self.connect_timeout
        while self.last_active < self._last_unavailable:
            if clock() + _RECONNECT_PAUSE >= until:
                raise self._unavailable()
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._is_alive(self.connect_timeout))
            await asyncio.wait((self._probing,), timeout=until - clock())
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def _is_alive(self, timeout: float) -> bool:
        """Whether the server answers a probe on a new connection within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout), self._new_session(force_close=True) as session:
                while not await self._answers(session):
                    await asyncio.sleep(_RECONNECT_PAUSE)
                return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether the server answers; False if the connection fails."""
        try:
            async with session.get(URL(self._base + _LIVE, encoded=True)):
                self.last_active = asyncio.get_running_loop().time()
                return True
        except aiohttp.ClientConnectionError:
            return False

    def _unavailable(self, **details: bool) -> BrokerUnavailableError:
        self._last_unavailable = asyncio.get_running_loop().time()
        return BrokerUnavailableError(f"the router at {self.url} does not answer", **details)

    def _disconnected(self) -> DisconnectedError:
        return DisconnectedError(f"the router at {self.url} closed the connection before it answered", sent=True)


async def _without_retry(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Stop aiohttp from repeating a DELETE when its connection breaks."""
    try:
        return await handler(request)
    except _UNREACHED:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error


@dataclass(eq=False, slots=True)
class _Call:
    """A call in progress: when it began, when the server last sent data or accepted part of the body, when it ends."""

    link: HttpLink
    scope: asyncio.Timeout
    began: float
    last_active: float
    latest: float

    def received(self, count: int = 0) -> None:
        """The server sent `count` bytes of its response's body."""
        self.link.last_active = asyncio.get_running_loop().time()
        self.carried(count, self.link.last_active)

    def carried(self, count: int, now: float) -> None:
        """Part of a body was sent or received."""
        self.last_active = now
        self.latest += count / _SLOWEST


async def _next(events: asyncio.Queue[ServerEvent | None], until: float | None) -> ServerEvent | None:
    async with asyncio.timeout_at(until):
        return await events.get()


def _should_reopen(reading: asyncio.Task[HttpResponse], *, again: bool) -> bool:
    """Whether a stream that ended should be reopened."""
    try:
        response = reading.result()
    except DisconnectedError:
        if not again:
            raise
    else:
        if not response.ok:
            raise NotAStreamError(response)
    return again


def _address(parts: SplitResult) -> URL:
    """The server's address without credentials. The error does not show text that may be part of a password."""
    try:
        address = URL(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
        known = bool((address.host or "").encode("idna"))  # as the resolver will
    except ValueError:  # its text quotes the port
        known = False
    if not known:
        expected = "a host, and a port that is a number; / and # in a password are %2F and %23"
        raise invalid("url", expected)
    return address


def _credentials(parts: SplitResult, key: str | None) -> dict[str, str]:
    """The authentication header. The error does not show the key."""
    if key is None:
        if parts.username is None:
            return {}
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        return {"authorization": f"Basic {base64.b64encode(secret).decode()}"}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise invalid("key", "ASCII text without spaces")
    return {"authorization": f"Bearer {key}"}


def _proxy_of(address: URL) -> str | None:
    """The proxy that the environment sets for an address; None for this machine's own addresses.

    aiohttp's `trust_env` would read the environment on another thread for every request.
    """
    found, host = getproxies().get(address.scheme), address.host or ""
    if found is None or is_loopback(host) or proxy_bypass(host):
        return None
    proxy = found if "://" in found else f"http://{found}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        name = f"{address.scheme.upper()}_PROXY"
        raise InvalidRequestError(f"{name}: expected an address that starts with http:// or https://", field="url")
    return proxy


def is_loopback(host: str) -> bool:
    """Whether a host name or address is the loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
