"""One connection of the HTTP door: limits in front of uvicorn's own protocol.

The event loop talks to a `Connection`. It passes one request at a time to a stock uvicorn protocol, by asyncio's public
protocol methods, and sits between it and the transport (`_Outlet`). Whatever a client sends, a connection therefore
holds one request and what one read brought of the next (`READ`), and no request has more than one answer. `Bounded` is
the ASGI side: it tells the connection when an answer begins and ends.

uvicorn itself closes a connection that is idle between two requests. It waits without limit for a head, for a body and
for a client that does not read. A timer per request would cost more than all of this, so a connection only records its
deadline, and the server checks all connections twice a second.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

import numpy as np

from api.errors import body_of, headers_of
from api.framing import Chunks, Framing, FramingError, framing_of
from api.gate import Application, Receive, Send
from tasks.topology import Limits
from taxiway.contract.limits import Buffer
from taxiway.errors import FleetUnavailable, RequestError, TaxiwayError

HEAD = 2**16
"""Limit on a request's head, and on what follows the last chunk of a body, in bytes."""

READ = 2**16
"""Most bytes per read; a connection holds no more than this of data that it may not pass on yet."""

SLOWEST = 2**20
"""Bytes that a client must send or read in `limits.body` seconds, unless less remains."""

LINGER = 2.0
"""Seconds, and at most `limits.payload` bytes, for which data after the last answer is read and dropped.

Closing a connection with unread bytes resets it, and its client may never see the answer."""

SILENT = 20.0
"""Seconds that a connection is kept after an answer, until the next request begins.

Longer than clients reuse an idle connection (httpx, and so the openai package, 5 s; aiohttp 15 s): if both ended it at
the same time, a request would meet a closed connection."""

CLOSE = (b"connection", b"close")
"""The header that announces the end of the connection."""

CONNECTION = "taxiway.connection"
"""Key of the `Connection` in the state that uvicorn passes to each request."""

WHOLE = "taxiway.whole"
"""Key of the `Whole` in a request's extensions."""

ALLOW = "taxiway.allow"
"""Key of a function in a request's extensions: it sets the maximum size of the body, instead of `limits.payload`."""

Whole = Callable[[bytes, int], Awaitable[memoryview | None]]
"""Given what `receive` returned first and the body's length: the whole body, read directly into one buffer.

None if the client disconnected. uvicorn's own way copies each byte five times, which for 8 MB is most of the door's
cost."""

Inner = Callable[[dict[str, Any]], asyncio.Protocol]
"""Makes a stock protocol, given the state that it passes to each request."""

_JOINED = 2**16  # answers up to this many bytes are joined into one buffer
_CHUNKED = b"transfer-encoding: chunked\r\n"  # in the head of an answer without a length
_NEVER = math.inf
_NOTHING = memoryview(b"")


@dataclass(slots=True)
class Shared:
    """State shared by a server's connections; once `parting` is set, each ends with its next answer."""

    limits: Limits
    inner: Inner
    connections: set[Connection] = field(default_factory=set)
    parting: bool = False
    scratch: memoryview = field(default_factory=lambda: memoryview(bytearray(READ)))


class _State(enum.Enum):
    """What a connection waits for: a head, the rest of a body, an answer, or its end."""

    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    END = enum.auto()


class Bounded:
    """ASGI middleware for the requests of `Connection`s."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        connection: Connection = scope["state"].pop(CONNECTION)
        connection.serves()
        scope["extensions"] = {WHOLE: connection.whole, ALLOW: connection.allow}
        chunks = scope["http_version"] != "1.0" or scope["method"] == "HEAD"
        await self._behind(scope, receive, connection.watched(send, chunks=chunks))


class Connection(asyncio.BufferedProtocol):
    """A connection within `shared.limits`; `look` closes it when its time is up."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._largest = _largest(shared.limits.payload)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._outlet: _Outlet | None = None
        self._state = _State.HEAD
        self._head = b""  # received so far
        self._left = 0  # remaining bytes of a body with a declared length
        self._chunks: Chunks | None = None  # for a chunked body
        self._held = b""  # received, and may not be passed on yet
        self._paused = False  # the transport
        self._content = self._place = _NOTHING  # a body read into one buffer, and the unfilled part of that
        self._whole: asyncio.Future[memoryview | None] | None = None
        self._serving = False  # the application has the request
        self._answering = False  # the answer has begun
        self._received = 0  # bytes received of a body, or after the last answer
        self._seen = 0  # `_received` at the last check
        self._until = _NEVER  # deadline for more data from the client
        self._unread = 0  # bytes not yet read by the client at the last check
        self._read_until = _NEVER  # deadline for the client to read more

    @property
    def ending(self) -> bool:
        """Whether no more answers are written."""
        return self._state is _State.END

    def abort(self) -> None:
        """Close it immediately."""
        self._transport.abort()

    def serves(self) -> None:
        """The application has the request: nothing is timed until its body must arrive or its answer be read."""
        self._serving = True
        if self._state is _State.ANSWER:
            self._until = _NEVER

    def watched(self, send: Send, *, chunks: bool) -> Send:
        """The request's `send`, observed by this connection. `chunks` says whether an answer may have chunks."""
        bare = False

        async def watching(message: Mapping[str, Any]) -> None:
            nonlocal bare
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                bare = not chunks and all(name.lower() != b"content-length" for name, _ in headers)
                self._start_answer(bare=bare)
                last = bare or self._state is not _State.ANSWER or self._shared.parting
                await send({**message, "headers": [*headers, CLOSE]} if last else message)
                return
            if bare and self._outlet is not None:
                self._outlet.put(message.get("body", b""))
                message = {**message, "body": b""}
            await send(message)
            if not message.get("more_body"):
                self._answered()

        return watching

    def whole(self, begin: bytes, length: int) -> asyncio.Future[memoryview | None]:
        """See `Whole`."""
        content = np.empty(length, np.uint8).data  # untouched memory is not committed
        at = len(begin) + len(self._held)
        content[:at] = begin + self._held
        self._held, self._content, self._place = b"", content, content[at:]
        self._whole = whole = self._loop.create_future()
        if self._state is _State.END:
            whole.set_result(None)
        elif not self._place:
            self._filled()
        else:
            self._resume()
        return whole

    def allow(self, size: int) -> None:
        """Allow the present request a body of `size` bytes: its reader keeps none of it."""
        self._largest = _largest(size)

    def look(self, now: float) -> None:
        """Close it if its client is too slow. `now` is the event loop's time."""
        if now >= self._read_until:
            self._look_at_reading(now)
        elif now >= self._until:
            self._look_at_sending(now)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport does not derive from it
        self._shared.connections.add(self)
        if len(self._shared.connections) > self._limits.connections:
            error = FleetUnavailable("connection limit reached", retry_after=1.0)
            self._transport.write(_refusal(HTTPStatus.SERVICE_UNAVAILABLE, error))
            self._end(lingers=False)
            return
        self._await_head(self._limits.head)
        self._outlet = _Outlet(self, self._transport, self._shared.inner)

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._shared.connections.discard(self)
        self._state, self._until, self._read_until = _State.END, _NEVER, _NEVER
        self._let_go()

    def eof_received(self) -> None:
        """Part of `asyncio.BufferedProtocol`: a client that half-closes gets no answer."""

    def pause_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        if self._outlet is not None:
            self._outlet.inner.pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        if self._outlet is not None:
            self._outlet.inner.resume_writing()
        if self._state is not _State.END:  # at the end, the rest must still be read
            self._read_until = _NEVER

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of `asyncio.BufferedProtocol`."""
        return self._place or self._shared.scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        if self._place:
            self._received += nbytes
            self._place = self._place[nbytes:]
            if not self._place:
                self._filled()
        else:
            self._take(bytes(self._shared.scratch[:nbytes]))

    def refused(self) -> None:
        """The stock protocol cannot parse the forwarded bytes."""
        self._refuse(HTTPStatus.BAD_REQUEST, RequestError("expected a request of HTTP/1.1"))

    def finish(self) -> None:
        """The stock protocol closes after its last answer."""
        self._end(lingers=self._state is _State.BODY or bool(self._held))

    def go_on(self) -> None:
        """The stock protocol resumes reading."""
        if self._state is _State.BODY and self._held:
            held, self._held = self._held, b""
            self._take(held)
        if not self._held:
            self._resume()

    def _take(self, came: bytes) -> None:
        """Pass on received data, as far as allowed now."""
        while came:
            if self._state is _State.HEAD:
                came = self._take_head(came)
            elif self._state is _State.BODY and self._outlet is not None and not self._outlet.full:
                came = self._take_body(came)
            else:
                break
        if self._state is _State.END:
            self._drop(len(came))
        elif came:
            self._held += came
            self._pause()

    def _take_head(self, came: bytes) -> bytes:
        """Process a head, or a piece of it; returns the data after it."""
        head = self._head + came if self._head else came.lstrip(b"\r\n")
        end = head.find(b"\r\n\r\n", max(0, len(self._head) - 3)) + 4
        if end < 4 or end > HEAD:
            if head and not self._head:
                self._until = self._loop.time() + self._limits.head
            self._head = head
            if len(head) > HEAD:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, RequestError("the request is too large"))
            return b""
        self._head = b""
        try:
            framing = framing_of(head[:end])
        except FramingError:
            self.refused()
            return head[end:]
        return self._begin(framing, head[end:])

    def _begin(self, framing: Framing, behind: bytes) -> bytes:
        """Pass on a head, together with a short body; returns the data after them."""
        assert self._outlet is not None
        self._received = self._seen = 0
        self._largest = _largest(self._limits.payload)
        if not framing.chunked and framing.length <= len(behind):
            self._state, self._until = _State.ANSWER, self._loop.time() + self._limits.head
            self._outlet.pass_on(framing.head + behind[: framing.length])
            return behind[framing.length :]
        self._left, self._chunks = framing.length, Chunks() if framing.chunked else None
        self._state, self._until = _State.BODY, self._loop.time() + self._limits.body
        self._outlet.pass_on(framing.head)
        return behind

    def _take_body(self, came: bytes) -> bytes:
        """Pass on a piece of a body; returns the data after the body."""
        try:
            end = min(self._left, len(came)) if self._chunks is None else self._chunks.end_in(came)
        except FramingError:
            self.refused()
            return b""
        self._received += end
        self._left -= end if self._chunks is None else 0
        whole = not self._left if self._chunks is None else self._chunks.ended
        if self._received > self._largest or (self._chunks is not None and self._chunks.trailing > HEAD):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, RequestError("the request is too large"))
            return b""
        if whole:
            self._state, self._until = _State.ANSWER, _NEVER if self._serving else self._until
        assert self._outlet is not None
        self._outlet.pass_on(came[:end])
        return came[end:]

    def _filled(self) -> None:
        """A body is complete that the stock protocol did not see: a new protocol replaces it, which expects a head."""
        assert self._outlet is not None and self._whole is not None
        self._state, self._until = _State.ANSWER, _NEVER
        self._outlet.stale = True
        self._whole.set_result(self._content)
        self._content, self._whole = _NOTHING, None

    def _start_answer(self, *, bare: bool) -> None:
        """An answer begins. Its first writes are gathered into one send: a system call costs as much as all of this."""
        self._answering = True
        if self._outlet is not None:
            self._outlet.gather()
            self._outlet.bare = bare
            self._loop.call_soon(self._outlet.flush)

    def _answered(self) -> None:
        """A request has been answered: the next one may be processed."""
        self._serving = self._answering = False
        if self._outlet is not None:
            self._outlet.flush()
        if self._state is not _State.ANSWER:
            return
        if self._outlet is not None and self._outlet.stale:
            self._outlet.let_go()
            self._outlet = _Outlet(self, self._transport, self._shared.inner)
        self._state = _State.HEAD
        self._await_head(SILENT)
        held, self._held = self._held, b""
        self._take(held)
        if not self._held:
            self._resume()

    def _look_at_reading(self, now: float) -> None:
        left = self._transport.get_write_buffer_size()
        if self._unread - left < SLOWEST:
            self._transport.abort()
            return
        self._unread, self._read_until = left, now + self._limits.body

    def _look_at_sending(self, now: float) -> None:
        if self._state is _State.END:
            self._close()
        elif self._state is _State.HEAD and not self._head:  # an answer now could be mistaken for the next request's
            self._end(lingers=False)
        elif self._outlet is not None and self._outlet.full:
            self._until = now + self._limits.body
        elif self._state is _State.HEAD or self._received - self._seen < SLOWEST:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, RequestError("the request was not received in time"))
        else:
            self._seen, self._until = self._received, now + self._limits.body

    def _await_head(self, seconds: float) -> None:
        self._until = self._loop.time() + min(seconds, self._limits.head)

    def _await_reading(self) -> None:
        self._unread = self._transport.get_write_buffer_size()
        self._read_until = self._loop.time() + self._limits.body

    def _refuse(self, status: HTTPStatus, error: TaxiwayError) -> None:
        """Answer a request that no endpoint will answer, and close; an answer in progress is cut off."""
        if self._state is _State.END:
            return
        if not self._answering:
            self._transport.write(_refusal(status, error))
        self._end(lingers=True)
        self._let_go()

    def _end(self, *, lingers: bool) -> None:
        """Close the connection; if it `lingers`, incoming data is still read for a moment."""
        if self._state is _State.END:
            return
        self._state, self._head, self._held, self._place = _State.END, b"", b"", _NOTHING
        if not lingers:
            self._close()
            return
        self._received, self._until = 0, self._loop.time() + LINGER
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._resume()

    def _let_go(self) -> None:
        """Notify everything that waits for this connection that no more data arrives."""
        if self._outlet is not None:
            outlet, self._outlet = self._outlet, None
            outlet.let_go()
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def _drop(self, count: int) -> None:
        self._received += count
        if self._received > self._limits.payload:
            self._close()

    def _close(self) -> None:
        self._until = _NEVER
        self._transport.close()  # after pending writes
        self._await_reading()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()


class _Outlet(asyncio.Transport):
    """The transport that a stock protocol sees; the connection decides about reading and closing.

    `full` means that the protocol accepts no more for now, `stale` that it missed a body. A `bare` answer's body ends
    with the connection, as clients of HTTP/1.0 do not know chunks (RFC 9112, 6.1): the protocol writes its head alone.
    """

    def __init__(self, connection: Connection, transport: asyncio.Transport, inner: Inner) -> None:
        super().__init__()
        self.full = self.stale = self.bare = False
        self.inner = inner({CONNECTION: connection})
        self._connection = connection
        self._transport = transport
        self._passing = self._misread = self._gone = False
        self._gathered: list[Buffer] | None = None
        self.inner.connection_made(self)

    def pass_on(self, piece: bytes) -> None:
        """Pass data to the protocol. Anything that it writes meanwhile is a refusal; ours is sent instead."""
        self._passing = True
        self.inner.data_received(piece)
        self._passing = False
        if self._misread:
            self._connection.refused()

    def gather(self) -> None:
        """Buffer what the protocol writes until `flush`."""
        self._gathered = []

    def flush(self) -> None:
        """Send what was buffered, and stop buffering."""
        gathered, self._gathered = self._gathered, None
        if not gathered or self._gone:
            return
        if sum(map(len, gathered)) > _JOINED:
            self._transport.writelines(gathered)
        else:
            self._transport.write(b"".join(gathered))

    def let_go(self) -> None:
        """Detach the protocol from the connection."""
        self._gone, self._gathered = True, None
        self.inner.connection_lost(None)  # given an error, uvicorn would keep its timer, and thereby itself, alive

    def write(self, data: Buffer) -> None:
        """Part of `asyncio.WriteTransport`."""
        if self._passing:
            self._misread = True
        elif not self.bare:
            self.put(data)
        elif data[:5] == b"HTTP/":  # no chunk begins so
            self.put(bytes(data).replace(_CHUNKED, b"", 1))

    def put(self, data: Buffer) -> None:
        """Send, or buffer until `flush`; a bare answer's body comes so, past the protocol."""
        if self._gathered is not None:
            self._gathered.append(data)
        elif not self._gone:
            self._transport.write(data)

    def close(self) -> None:
        """Part of `asyncio.BaseTransport`."""
        self.flush()
        if not (self._passing or self._gone):
            self._connection.finish()

    def is_closing(self) -> bool:
        """Part of `asyncio.BaseTransport`."""
        return self._gone or self._connection.ending

    def pause_reading(self) -> None:
        """Part of `asyncio.ReadTransport`."""
        self.full = True

    def resume_reading(self) -> None:
        """Part of `asyncio.ReadTransport`."""
        self.full = False
        if not self._gone:
            self._connection.go_on()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Part of `asyncio.BaseTransport`."""
        return self._transport.get_extra_info(name, default)


def _largest(size: int) -> int:
    """Most bytes of a body of `size` bytes as it is sent: each chunk adds a size line."""
    return 2 * size + HEAD


def _refusal(status: HTTPStatus, error: TaxiwayError) -> bytes:
    content = body_of(error)
    headers = [f"{name}: {value}\r\n" for name, value in headers_of(error).items()]
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{''.join(headers)}content-length: {len(content)}\r\n"
    return head.encode("latin-1") + b"connection: close\r\n\r\n" + content
