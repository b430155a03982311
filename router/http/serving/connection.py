"""One connection of the HTTP door: bounds in front of uvicorn's own protocol.

The event loop talks to a `Connection`. That passes one request at a time on to a stock uvicorn protocol, by asyncio's
public protocol methods, and stands between it and the transport (`_Outlet`). Whatever a client sends, a connection so
holds one request and what one read brought of the next (`READ`), and no request has more than one answer. `Bounded` is
the ASGI side: it tells the connection when an answer begins and ends.

uvicorn itself closes a connection that is silent between two requests. It waits without end for a head, for a body and
for a client that does not read. A timer for each request would cost more than all of it, so a connection only notes
until when it may go on, and its server looks at all of them twice a second.
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

from router.http.errors import body_of, headers_of
from router.http.gate import Application, Receive, Send
from router.http.serving.framing import Chunks, Framing, FramingError, framing_of
from tasks.topology import Limits
from taxiway.errors import FleetUnavailable, RequestError, TaxiwayError

HEAD = 2**16
"""Bytes of a request's head, and of what follows the last chunk of a body."""

READ = 2**16
"""Bytes that one read brings at most; a connection holds no more of what it may not pass on yet."""

SLOWEST = 2**20
"""Bytes that a client sends or reads in `limits.body` seconds, unless less is left."""

LINGER = 2.0
"""Seconds, and at most `limits.payload` bytes, for which what still comes after the last answer is read and dropped.

A connection that is closed while bytes of it are unread is reset, and its client may never see the answer.
"""

SILENT = 5.0
"""Seconds that a connection is kept after an answer, until the next request begins."""

CLOSE = (b"connection", b"close")
"""The header that tells a client that its connection ends."""

CONNECTION = "taxiway.connection"
"""In the state that uvicorn hands to each request of a connection: the `Connection`."""

WHOLE = "taxiway.whole"
"""An extension in a request's scope: a `Whole`."""

Whole = Callable[[bytes, int], Awaitable[memoryview | None]]
"""Given what `receive` gave first and the body's length: all of the body, read straight into one place; None where its
sender is gone. uvicorn's own way copies each byte five times, which for 8 MB is most of what the door costs."""

Inner = Callable[[dict[str, Any]], asyncio.Protocol]
"""Makes a stock protocol, given the state that it hands to each request."""

_JOINED = 2**16  # bytes of an answer up to which its pieces are copied together
_NEVER = math.inf
_NOTHING = memoryview(b"")


@dataclass(slots=True)
class Shared:
    """What the connections of a server have in common; once it is `parting`, each ends with its next answer."""

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
    """An ASGI application before another one, for the requests of `Connection`s."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        connection: Connection = scope["state"].pop(CONNECTION)
        connection.serves()
        scope["extensions"] = {WHOLE: connection.whole}
        await self._behind(scope, receive, connection.watched(send))


class Connection(asyncio.BufferedProtocol):
    """Bounded by `shared.limits`; `look` closes it when its time is over."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._largest = 2 * shared.limits.payload + HEAD  # of a body: chunks have a head each
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._outlet: _Outlet | None = None
        self._state = _State.HEAD
        self._head = b""  # as far as it came
        self._left = 0  # bytes of a body whose length was declared
        self._chunks: Chunks | None = None  # of any other body
        self._held = b""  # came, and may not be passed on yet
        self._paused = False  # the transport
        self._content = self._place = _NOTHING  # a body that is read into one place, and where its rest goes
        self._whole: asyncio.Future[memoryview | None] | None = None
        self._serving = False  # the application has the request
        self._answering = False  # the answer has begun
        self._received = 0  # bytes of a body, or after the last answer
        self._seen = 0  # of them, when it was last looked whether enough had come
        self._until = _NEVER  # by then more is to come
        self._unread = 0  # bytes, when it was last looked whether enough had been read
        self._read_until = _NEVER  # by then more is to be read

    @property
    def ending(self) -> bool:
        """Whether no more answers are written."""
        return self._state is _State.END

    def abort(self) -> None:
        """Close it at once."""
        self._transport.abort()

    def serves(self) -> None:
        """The application has the request: until its body must come or its answer is read, nothing is timed."""
        self._serving = True
        if self._state is _State.ANSWER:
            self._until = _NEVER

    def watched(self, send: Send) -> Send:
        """The `send` of a request that is served, which this connection hears."""

        async def watching(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._start_answer()
                last = self._state is not _State.ANSWER or self._shared.parting
                await send({**message, "headers": [*message.get("headers", ()), CLOSE]} if last else message)
                return
            await send(message)
            if not message.get("more_body"):
                self._answered()

        return watching

    def whole(self, begin: bytes, length: int) -> asyncio.Future[memoryview | None]:
        """See `Whole`."""
        content = np.empty(length, np.uint8).data  # memory that nothing comes for is not taken
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

    def look(self, now: float) -> None:
        """Close it if its client is too slow. `now` is the event loop's time."""
        if now >= self._read_until:
            self._look_at_reading(now)
        elif now >= self._until:
            self._look_at_sending(now)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is not derived from it
        self._shared.connections.add(self)
        if len(self._shared.connections) > self._limits.connections:
            error = FleetUnavailable("the door has no room for another connection", retry_after=1.0)
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
        """Part of `asyncio.BufferedProtocol`: a client that sends no more is not answered."""

    def pause_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        if self._outlet is not None:
            self._outlet.inner.pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        if self._outlet is not None:
            self._outlet.inner.resume_writing()
        if self._state is not _State.END:  # then its rest is still to be read
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
        """The stock protocol does not understand what was passed on."""
        self._refuse(HTTPStatus.BAD_REQUEST, RequestError("expected a request of HTTP/1.1"))

    def finish(self) -> None:
        """The stock protocol closes: its answer was the last."""
        self._end(lingers=self._state is _State.BODY or bool(self._held))

    def go_on(self) -> None:
        """The stock protocol reads again."""
        if self._state is _State.BODY and self._held:
            held, self._held = self._held, b""
            self._take(held)
        if not self._held:
            self._resume()

    def _take(self, came: bytes) -> None:
        """Pass on what came, as far as that may be now."""
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
        """Take a head, or a piece of it; what is behind it."""
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
        """Pass a head on, and a short body in the same piece; what is behind them."""
        assert self._outlet is not None
        self._received = self._seen = 0
        if not framing.chunked and framing.length <= len(behind):
            self._state, self._until = _State.ANSWER, self._loop.time() + self._limits.head
            self._outlet.pass_on(framing.head + behind[: framing.length])
            return behind[framing.length :]
        self._left, self._chunks = framing.length, Chunks() if framing.chunked else None
        self._state, self._until = _State.BODY, self._loop.time() + self._limits.body
        self._outlet.pass_on(framing.head)
        return behind

    def _take_body(self, came: bytes) -> bytes:
        """Pass a piece of a body on; what is behind the body."""
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
        """A body is whole that the stock protocol did not see: it gets a successor, which expects a head."""
        assert self._outlet is not None and self._whole is not None
        self._state, self._until = _State.ANSWER, _NEVER
        self._outlet.stale = True
        self._whole.set_result(self._content)
        self._content, self._whole = _NOTHING, None

    def _start_answer(self) -> None:
        """An answer begins. What is written at once is sent at once: a system call costs as much as all of this."""
        self._answering = True
        if self._outlet is not None:
            self._outlet.gather()
            self._loop.call_soon(self._outlet.flush)

    def _answered(self) -> None:
        """A request has its answer: the next one may come."""
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
        elif self._state is _State.HEAD and not self._head:  # an answer now could be taken for the next request's
            self._end(lingers=False)
        elif self._outlet is not None and self._outlet.full:
            self._until = now + self._limits.body
        elif self._state is _State.HEAD or self._received - self._seen < SLOWEST:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, RequestError("the request did not come in time"))
        else:
            self._seen, self._until = self._received, now + self._limits.body

    def _await_head(self, seconds: float) -> None:
        self._until = self._loop.time() + min(seconds, self._limits.head)

    def _await_reading(self) -> None:
        self._unread = self._transport.get_write_buffer_size()
        self._read_until = self._loop.time() + self._limits.body

    def _refuse(self, status: HTTPStatus, error: TaxiwayError) -> None:
        """Answer what no endpoint will answer, and close; an answer under way ends where it is."""
        if self._state is _State.END:
            return
        if not self._answering:
            self._transport.write(_refusal(status, error))
        self._end(lingers=True)
        self._let_go()

    def _end(self, *, lingers: bool) -> None:
        """Close the connection; where it `lingers`, what still comes is read for a moment."""
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
        """Tell who waits for this connection that nothing more comes."""
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
        self._transport.close()  # once what was written is sent
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
    """The transport that a stock protocol sees: the connection decides what becomes of reading and closing.

    `full` says that the protocol takes no more for now, `stale` that it missed a body.
    """

    def __init__(self, connection: Connection, transport: asyncio.Transport, inner: Inner) -> None:
        super().__init__()
        self.full = self.stale = False
        self.inner = inner({CONNECTION: connection})
        self._connection = connection
        self._transport = transport
        self._passing = self._misread = self._gone = False
        self._gathered: list[bytes | bytearray | memoryview] | None = None
        self.inner.connection_made(self)

    def pass_on(self, piece: bytes) -> None:
        """Give the protocol what came. What it writes meanwhile is its own refusal; ours stands for it."""
        self._passing = True
        self.inner.data_received(piece)
        self._passing = False
        if self._misread:
            self._connection.refused()

    def gather(self) -> None:
        """Keep what the protocol writes until `flush`."""
        self._gathered = []

    def flush(self) -> None:
        """Send what was kept, and nothing of it later."""
        gathered, self._gathered = self._gathered, None
        if not gathered or self._gone:
            return
        if sum(map(len, gathered)) > _JOINED:
            self._transport.writelines(gathered)
        else:
            self._transport.write(b"".join(gathered))

    def let_go(self) -> None:
        """The protocol has no connection any more."""
        self._gone, self._gathered = True, None
        self.inner.connection_lost(None)  # with an error uvicorn would keep its timer, and itself

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Part of `asyncio.WriteTransport`."""
        if self._passing:
            self._misread = True
        elif self._gathered is not None:
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


def _refusal(status: HTTPStatus, error: TaxiwayError) -> bytes:
    content = body_of(error)
    headers = [f"{name}: {value}\r\n" for name, value in headers_of(error).items()]
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{''.join(headers)}content-length: {len(content)}\r\n"
    return head.encode("latin-1") + b"connection: close\r\n\r\n" + content
