"""HTTP/1.1 to one server that may be away for a while: kept-alive connections, answers parsed in C.

A server's certificate is always verified, against the system's authorities or those in the file that `SSL_CERT_FILE`
names. One that does not hold is an error at once: waiting makes it no better.

Source of the choice, on one core with small bodies: a request costs 25 µs here, 62 to 89 with aiohttp, 360 with
niquests, and 390 (one at a time) to 730 (32 at a time) with httpx, which looks through its whole pool for each.
Proxies named in the environment are not used: the door is a router, or what stands before it.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from httptools import HttpParserError, HttpResponseParser

from taxiway.contract.blobs import Buffer
from taxiway.errors import BrokerUnavailableError, InvalidRequestError

_PAUSE = 0.05
"""Seconds before connecting again."""

_KEPT = 4.0
"""Seconds that an unused connection is used again after: servers close theirs after 5 or more."""

_TOGETHER = 65536
"""Bytes of a body up to which it goes out in one write with its head."""

LONGEST_WAIT = 20.0
"""Seconds of one long poll: shorter than the idle time-outs of common proxies (30 to 60 s)."""

SILENCE = LONGEST_WAIT + 2.0
"""Seconds of silence after which a connection is given up, whatever others hear: the router or a machine between may
have forgotten it. Whatever a client asks is answered, or a stream kept alive, within `LONGEST_WAIT`."""

_LIVE = "/v2/health/live"

_BROKEN_OFF = (ConnectionResetError, BrokenPipeError)

Sink = Callable[[bytes], None]
"""Takes each piece of a successful answer's body as it comes."""


class BrokenOffError(BrokerUnavailableError):
    """The server closed the connection before its answer was there: whether it did what it was asked is not known."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: header names in lower case; `body` is empty where a sink took it."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is one of success."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


class HttpLink:
    """Requests to one server, each on a connection that no other uses meanwhile; as many as there are calls.

    A silent server is asked for a sign of life while anybody waits: an answer may take long, but not in silence. Who
    answers may be another one behind the same address: so no connection is silent for longer than `silence` seconds.
    """

    def __init__(self, url: str, patience: float, key: str | None = None, *, silence: float = SILENCE) -> None:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{host}{parts.path}"  # never with a password
        self.heard = 0.0
        self._doubted = 0.0  # when it was last found away
        self._probing: asyncio.Task[bool] | None = None
        self.patience = patience
        self._silence = silence
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = _address(parts, 443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = f" HTTP/1.1\r\nhost: {host}\r\n"
        if key is not None:
            self._head += f"authorization: Bearer {_checked(key)}\r\n"
        elif parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._head += f"authorization: Basic {base64.b64encode(secret).decode()}\r\n"
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._watching: asyncio.Task[None] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Sequence[Buffer] = (),
        headers: Mapping[str, str] | None = None,
        *,
        sink: Sink | None = None,
        once: bool = False,
    ) -> Response:
        """The server's answer, however long it takes.

        A server that stops or fails while it is asked is asked again, for the patience: another may stand in for it.
        Not so `once`, which is said where asking twice does more than asking once, nor with a `sink`, which takes the
        body, and has some of it already.

        Raises:
            BrokenOffError: it broke off, and was not to be asked again, or did so for the patience.
            BrokerUnavailableError: it cannot be reached, or was silent for the patience; with the detail `sent` where
                it had been sent what it was asked, and may have done it.
        """
        until = None
        while True:
            try:
                return await self._ask(method, path, body, headers or {}, sink)
            except BrokenOffError:
                now = asyncio.get_running_loop().time()
                until = now + self.patience if until is None else until
                if once or sink is not None or now >= until:
                    raise
            except BrokerUnavailableError as error:
                if until is None:
                    raise
                raise self._away(sent=True) from error
            await asyncio.sleep(_PAUSE)

    async def _ask(
        self, method: str, path: str, body: Sequence[Buffer], headers: Mapping[str, str], sink: Sink | None
    ) -> Response:
        """The server's answer to a request that is sent once; raises as `ask` does."""
        head = f"{method} {self._prefix}{path}{self._head}"
        for name, value in headers.items():
            head += f"{name}: {value}\r\n"
        length = sum(map(len, body))
        if self.heard < self._doubted:
            await self._heard_again()
        connection = self._unused() or await self._connected()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        self._busy.add(connection)
        try:
            response = await connection.ask(f"{head}content-length: {length}\r\n\r\n".encode(), body, sink)
        except _BROKEN_OFF as error:
            raise BrokenOffError(f"the router at {self.url} broke off", sent=True) from error
        except (OSError, HttpParserError) as error:
            raise self._away(sent=True) from error
        finally:
            self._busy.discard(connection)
            if connection.finish():
                self._idle.append(connection)
        return response

    async def close(self) -> None:
        """Close all connections."""
        for task in (self._watching, self._probing):
            if task is not None:
                task.cancel()
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()

    def _unused(self) -> _Connection | None:
        """The connection that was used last, if its server surely still holds it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open and asyncio.get_running_loop().time() - connection.used < _KEPT:
                return connection
            connection.abort()
        return None

    async def _connected(self) -> _Connection:
        """A new connection, tried for the patience; nothing was sent yet."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.patience
        while True:
            try:
                async with asyncio.timeout_at(until):
                    _, connection = await loop.create_connection(
                        lambda: _Connection(self), *self._address, ssl=self._tls
                    )
            except ssl.SSLCertVerificationError as error:
                message = f"the certificate of {self.url} does not hold: {error.verify_message}"
                raise BrokerUnavailableError(message) from error
            except (OSError, TimeoutError) as error:
                if loop.time() + _PAUSE >= until:
                    raise self._away() from error
                await asyncio.sleep(_PAUSE)
            else:
                return connection

    async def _watch(self) -> None:
        """Ask a silent server for a sign of life while anybody waits for it; without one, nobody waits any more."""
        clock = asyncio.get_running_loop().time
        step = self.patience / 3
        while self._busy:
            await asyncio.sleep(step)
            asked = clock()
            for connection in [one for one in self._busy if one.silent_since(asked) < asked - self._silence]:
                connection.abort(ConnectionResetError("silent"))
            if not self._busy or asked - self.heard < step:
                continue
            if not await self._lives(step) and self.heard < asked:  # else it answered others meanwhile: it is busy
                for connection in list(self._busy):
                    connection.abort()

    async def _heard_again(self) -> None:
        """Wait for a server that was away, for the patience: one call asks for all that wait.

        If each sent its own request and gave it up, again and again, a server with little time would serve nothing but
        requests that nobody waits for any more, and never be heard again.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + self.patience
        while self.heard < self._doubted:
            if clock() + _PAUSE >= until:
                raise self._away()
            await asyncio.wait((self._probe(),), timeout=until - clock())
            await asyncio.sleep(_PAUSE)

    def _probe(self) -> asyncio.Task[bool]:
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._lives(self.patience))
        return self._probing

    async def _lives(self, longest: float) -> bool:
        request = f"GET {self._prefix}{_LIVE}{self._head}\r\n".encode()
        try:
            async with asyncio.timeout(longest):
                while not await self._answers(request):
                    await asyncio.sleep(_PAUSE)
        except (OSError, TimeoutError, HttpParserError, BrokerUnavailableError):
            return False
        return True

    async def _answers(self, request: bytes) -> bool:
        """Whether a request is answered on a connection of its own; False where that broke off."""
        connection = await self._connected()
        try:
            await connection.ask(request, (), None)
        except _BROKEN_OFF:
            return False
        finally:
            connection.abort()
        return True

    def _away(self, **details: bool) -> BrokerUnavailableError:
        self._doubted = asyncio.get_running_loop().time()
        return BrokerUnavailableError(f"the router at {self.url} does not answer", **details)


def _address(parts: SplitResult, usual: int) -> tuple[str, int]:
    """Host and port. The error does not show what may be a piece of a password."""
    try:
        host, port = parts.hostname, parts.port or usual
    except ValueError:  # it quotes the port
        host = None
    if not host:
        wanted = "a host, and a port that is a number; / and # in a password are %2F and %23"
        raise InvalidRequestError(f"url: expected {wanted}", field="url")
    return host, port


def _checked(key: str) -> str:
    """A key that can stand in a head. The error does not show it."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequestError("key: expected ASCII text without spaces", field="key")
    return key


class _Connection(asyncio.Protocol):
    """One connection: a request, its answer, and the next one. The callbacks `on_…` are httptools'."""

    def __init__(self, link: HttpLink) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._parser = HttpResponseParser(self)
        self._transport: Any = None
        self._answer: asyncio.Future[Response] | None = None
        self._sink: Sink | None = None
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._ended = True
        self._heard = 0.0  # when anything came, or went
        self._unsent = 0  # bytes, when it was last looked
        self.used = 0.0

    @property
    def open(self) -> bool:
        """Whether it may carry a request."""
        return not self._transport.is_closing()

    def ask(self, head: bytes, body: Sequence[Buffer], sink: Sink | None) -> asyncio.Future[Response]:
        """Send a request; the future of its answer."""
        self._headers, self._pieces, self._sink, self._ended = {}, [], sink, False
        self._heard = self._loop.time()
        self._answer = self._loop.create_future()
        if sum(map(len, body)) <= _TOGETHER:
            self._transport.write(b"".join([head, *body]))
        else:
            for piece in (head, *body):
                self._transport.write(memoryview(piece))  # of which asyncio cuts without a copy
        return self._answer

    def silent_since(self, now: float) -> float:
        """The last moment at which its server gave a sign of life: it sent something, or took some of the body."""
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._heard = unsent, now
        return self._heard

    def finish(self) -> bool:
        """Whether it can be used again, once its caller has the answer; one that gave up closes it."""
        if self._ended and self.open:
            self.used = self._loop.time()
            return True
        self.abort()
        return False

    def abort(self, why: OSError | None = None) -> None:
        """Close it; who waits for its answer is told."""
        self._transport.abort()
        self._fail(why or ConnectionAbortedError("closed"))

    def connection_made(self, transport: Any) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        self._link.heard = self._heard = self._loop.time()
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._fail(error)
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`. An answer that names no length ends with its connection."""
        if error is None and self._headers and not self._headers.keys() & {"content-length", "transfer-encoding"}:
            self.on_message_complete()
        self._fail(error or ConnectionResetError("closed by the server"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, piece: bytes) -> None:
        """Part of the body."""
        if self._sink is not None and self._parser.get_status_code() == HTTPStatus.OK:
            self._sink(piece)
        else:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """The answer is there."""
        status = self._parser.get_status_code()
        if status < HTTPStatus.OK:  # an interim answer, which the true one follows
            self._headers = {}
            return
        self._ended = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._answer.set_result(Response(status, self._headers, body))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
