"""One connection of the HTTP door: uvicorn's, with bounds on what a client may send, and how slowly.

uvicorn itself closes a connection that is silent between two requests. It waits without end for a head, for a body and
for a client that does not read, and llhttp keeps a header of any length: these are bounded here. A timer for each
request would cost more than all of it, so a connection only notes until when it may go on, and its server looks at all
of them twice a second.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from httptools import HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.http.body import WHOLE, BodyReader
from router.http.errors import body_of, headers_of
from router.http.gate import ANSWER
from tasks.topology import Limits
from taxiway.blobs import Buffer
from taxiway.errors import FleetUnavailable, RequestError, TaxiwayError

HEAD = 2**16
"""Bytes of a request's head after its first piece, which the event loop reads in 256 KiB at most."""

SLOWEST = 2**20
"""Bytes that a client sends or reads in `limits.body` seconds, unless less is left."""

LINGER = 2.0
"""Seconds that a client may go on sending a body after its answer, which would be lost were it cut off at once."""

SILENT = 5.0
"""Seconds that a connection is kept after an answer, until the next request begins."""

CLOSE = (b"connection", b"close")
"""The header that tells a client that its connection ends."""

_NEVER = math.inf

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.ERROR)  # uvicorn warns of each request that is not HTTP: anybody could fill the log


class Connection(HttpToolsProtocol):
    """Bounded by `limits`; `look` closes it when its time is over."""

    def __init__(self, limits: Limits, config: Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, app_state={})
        self.logger = _logger
        self._limits = limits
        self._largest = 2 * limits.payload + HEAD  # of a message: chunks have a head each
        self._ours = {WHOLE: self._whole, ANSWER: self._answer}
        self._served: RequestResponseCycle
        self._begun = False
        self._in_head = True
        self._received = 0  # bytes of the message that began last, without its first piece
        self._seen = 0  # of them, when it was last looked whether enough had come
        self._until = _NEVER  # by then more is to come
        self._unread = 0  # bytes, when it was last looked whether enough had been read
        self._read_until = _NEVER  # by then more is to be read

    def part(self) -> None:
        """Close it after the answer under way."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def look(self, now: float) -> None:
        """Close it if its client is too slow. `now` is the event loop's time."""
        if now >= self._read_until:
            self._look_at_reading(now)
        elif now >= self._until and not self.flow.read_paused:
            self._look_at_sending(now)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Part of `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._limits.connections:
            error = FleetUnavailable("the door has no room for another connection", retry_after=1.0)
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        before = self.headers
        super().data_received(data)
        if self.headers is not before:  # another message began
            return
        self._received += len(data)
        if self._received > (HEAD if self._in_head else self._largest):
            status = (
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if self._in_head else HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            )
            self._refuse(status, RequestError("the request is too large"))

    def pause_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._read_until = self.loop.time() + self._limits.body

    def resume_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        super().resume_writing()
        self._read_until = _NEVER

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._await_head()
        self._begun = True

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._in_head = False
        self._until = self.loop.time() + self._limits.body
        self.scope["extensions"] = self._ours  # type: ignore[typeddict-item]  # uvicorn wants mappings there
        super().on_headers_complete()

    def came(self, count: int) -> None:
        """Bytes of a body came beside the parser."""
        self._received += count

    def complete(self) -> None:
        """They were the last; a parser that does not wait for them goes on."""
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.on_message_complete()

    def on_message_complete(self) -> None:
        """All of it is there."""
        super().on_message_complete()
        self._until = _NEVER
        if self.cycle.response_complete:
            self._await_head()

    def on_response_complete(self) -> None:
        """A request was answered; one that came behind it begins to be served.

        uvicorn's own would set a timer each time for a client that falls silent.
        """
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
        now = self.loop.time()
        if not self.cycle.response_complete:
            self._until = now + self._limits.body if self._until < _NEVER else _NEVER
        elif self._until < _NEVER:
            self._until = min(self._until, now + LINGER)
        else:
            self._await_head()
            self._until = min(self._until, now + SILENT)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, RequestError("expected a request of HTTP/1.1"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    async def _answer(self, status: int, headers: Mapping[str, str], pieces: Sequence[Buffer]) -> None:
        """Answer the request that is served: at once, with one system call."""
        if self.flow.write_paused:
            await self.flow.drain()
        cycle = self._served
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not self.transport.is_closing():
            length = (b"content-length", b"%d" % sum(map(len, pieces)))
            told = [*self.server_state.default_headers, *_encoded(headers), length]
            if not cycle.keep_alive and CLOSE not in told:
                told.append(CLOSE)
            self.transport.writelines([_head(status, told), *(() if cycle.scope["method"] == "HEAD" else pieces)])
            if CLOSE in told:
                self.transport.close()
        cycle.on_response()

    async def _whole(self, begin: bytes, length: int) -> memoryview | None:
        reader = BodyReader(self.transport, self, begin, length)
        self.flow.resume_reading()
        return await reader.whole

    def _look_at_reading(self, now: float) -> None:
        left = self.transport.get_write_buffer_size()
        if self._unread - left < SLOWEST:
            self.transport.abort()
            return
        self._unread, self._read_until = left, now + self._limits.body

    def _look_at_sending(self, now: float) -> None:
        if not self._begun:  # an answer that nobody asked for could be taken for the next request's
            self.transport.close()
        elif self._in_head or self._received - self._seen < SLOWEST:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, RequestError("the request did not come in time"))
        else:
            self._seen, self._until = self._received, now + self._limits.body

    def _await_head(self) -> None:
        self._begun, self._in_head = False, True
        self._received = self._seen = 0
        self._until = self.loop.time() + self._limits.head

    def _refuse(self, status: HTTPStatus, error: TaxiwayError) -> None:
        """Answer what no endpoint will see, and close; an answer under way ends where it is."""
        self._until = _NEVER
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_refusal(status, error))
        self.transport.close()


def _encoded(headers: Mapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
    return ((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())


def _head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n"])


def _refusal(status: HTTPStatus, error: TaxiwayError) -> bytes:
    content = body_of(error)
    headers = [*_encoded(headers_of(error)), (b"content-length", b"%d" % len(content)), CLOSE]
    return _head(status, headers) + content
