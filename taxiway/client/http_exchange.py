"""Small requests to a server that is reached without a proxy, on connections that are reused.

For each request aiohttp makes a dozen objects and a task, which is half of the processor time of a lone request's
caller (docs/benchmarks.md). The common case is implemented here on asyncio's own transports, with httptools as the
parser.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, cast

import httptools
from yarl import URL

KEEP_ALIVE = 4.0
"""Seconds for which an idle connection is kept for reuse: servers close theirs after 5 s or more."""

_MOST_HEADER_BYTES = 2**16
"""Most bytes of a response's headers."""

_NEXT_ADDRESS_AFTER = 0.25
"""Seconds after which a connection to the host's next address is attempted as well. Source: RFC 8305, 8."""


class UnreachedError(Exception):
    """The connection failed before anything was sent."""


class MalformedError(Exception):
    """The server's response is not HTTP."""


class Listener(Protocol):
    """Is notified when the server sends data."""

    def received(self) -> None:
        """The server sent data."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response. Header names are looked up in lower case; `body` is empty if a sink received it."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


class Exchange:
    """Connections to one server, for one event loop. `tls` is None for http."""

    def __init__(self, address: URL, tls: ssl.SSLContext | None, headers: Mapping[str, str]) -> None:
        assert address.host is not None
        assert address.port is not None  # an http address has both
        self._host, self._port, self._tls = address.host, address.port, tls
        self._headers = {"host": str(address.host_port_subcomponent), **headers}
        self._idle: list[_Connection] = []
        self._closed = False

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, listener: Listener, connect: float
    ) -> Response:
        """The server's response, however long it takes; connecting may take `connect` seconds.

        Raises:
            UnreachedError: nothing was sent.
            SSLCertVerificationError: nothing was sent, and another attempt would fail the same way.
            ConnectionError: the connection broke; whether the request took effect is unknown.
            MalformedError: the response is not HTTP.
        """
        request = _encoded(method, path, {**self._headers, **headers}, body)
        connection = self._reused() or await self._connect(connect)
        try:
            response = await connection.ask(request, listener)
        except BaseException:
            connection.abort()
            raise
        if connection.reusable and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()
        return response

    def close(self) -> None:
        """Close idle connections now, and busy ones after their response."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def _reused(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and now - connection.idle_since < KEEP_ALIVE:
                return connection
            connection.abort()
        return None

    async def _connect(self, timeout: float) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._tls, happy_eyeballs_delay=_NEXT_ADDRESS_AFTER
                )
        except ssl.SSLCertVerificationError:
            raise
        except OSError as error:  # also TimeoutError and other SSLErrors
            raise UnreachedError(str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """A connection with one request at a time; also the callbacks of httptools for its response."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Response] | None = None
        self._listener: Listener
        self._lost = False
        self.on_message_begin()
        self._keep_alive = True

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent."""
        return not self._lost and self._keep_alive

    def ask(self, request: bytes, listener: Listener) -> asyncio.Future[Response]:
        """Send a request; returns the future of its response."""
        self._answer, self._listener = self._loop.create_future(), listener
        self._transport.write(request)
        return self._answer

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        if self._answer is not None:
            self._listener.received()
        try:
            self._parser.feed_data(data)
            if self._header_bytes > _MOST_HEADER_BYTES:
                raise MalformedError(f"headers of more than {_MOST_HEADER_BYTES} bytes")
        except (httptools.HttpParserError, MalformedError) as error:
            self._keep_alive = False
            self._end(MalformedError(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`. A response without a length ends with its connection."""
        self._lost = True
        if error is None and self._headers_complete and not self._has_length:
            self._end(self._response())
        else:
            self._end(ConnectionResetError("the server closed the connection before it answered"))

    def on_message_begin(self) -> None:
        """Part of httptools' protocol."""
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._header_bytes = 0
        self._headers_complete = self._has_length = False
        if self._answer is None:  # a response to no request
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Part of httptools' protocol."""
        text = name.decode("latin-1").lower()
        self._headers[text] = value.decode("latin-1")
        self._has_length = self._has_length or text in ("content-length", "transfer-encoding")
        self._header_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Part of httptools' protocol."""
        self._headers_complete = True

    def on_body(self, piece: bytes) -> None:
        """Part of httptools' protocol."""
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """Part of httptools' protocol."""
        if self._answer is not None and self._parser.get_status_code() >= HTTPStatus.OK:  # else an interim response
            self._keep_alive = self._parser.should_keep_alive()
            self._end(self._response())

    def _response(self) -> Response:
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return Response(self._parser.get_status_code(), self._headers, body)

    def _end(self, outcome: Response | Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def _encoded(method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """The request's bytes.

    Raises:
        ValueError: the path or a header would break a line.
    """
    length = {"content-length": str(len(body))} if body or method not in ("GET", "DELETE") else {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**headers, **length}.items())]
    head = "\r\n".join(lines)
    if head.count("\n") + head.count("\r") != 2 * (len(lines) - 1):
        raise ValueError("a line break in a path or a header")
    return b"%s\r\n\r\n%s" % (head.encode(), body)
