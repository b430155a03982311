"""One connection to a Valkey or Redis server, whose answers are parsed in C as they come, many in one turn of the loop.

redis-py opens it (addresses, passwords, TLS). Its own reader is set aside then: that takes a coroutine's turn for each
answer, some 8 µs, and reads a large one in pieces of 64 KiB. A large value is copied by nobody on its way: it is sent
from where it lies, and read into memory of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from taxiway.valkey.resp import END, LARGE, READ, Value, is_large, packed

_VALUE = ord("$")
_LONGEST_HEAD = 24  # of a value: its length has 20 digits at most


class RespWire(asyncio.BufferedProtocol):
    """Takes an open connection over.

    `receive` gets each answer, an error of the server's as a value; `lost` is told once that no more will come.
    """

    def __init__(
        self, connection: AbstractConnection, receive: Callable[[Any], None], lost: Callable[[Exception], None]
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._answers = hiredis.Reader(replyError=ResponseError)
        self._read = memoryview(bytearray(READ))
        self._large: Value | None = None
        assert connection._writer is not None
        self._writer = connection._writer  # closes the transport when it is collected
        self._transport: Any = self._writer.transport
        self._transport.set_protocol(self)
        ended = connection._reader is None or connection._reader.at_eof()
        connection._reader = connection._writer = None  # else it warns of what it has not closed
        if ended:  # redis-py's reader was told so, and nobody is told twice
            self._transport.abort()
            asyncio.get_running_loop().call_soon(self.connection_lost, None)

    def send(self, commands: Sequence[Sequence[Any]]) -> None:
        """Send commands, one after the other; nothing where the connection has ended, of which `lost` tells."""
        if self._transport.is_closing():
            return
        pieces = (piece for command in commands for piece in packed(command))
        for large, some in groupby(pieces, is_large):
            for piece in some if large else (b"".join(some),):
                self._transport.write(piece)

    def close(self) -> None:
        """Close the connection; `lost` is not told."""
        self._lost = _ignore
        self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of `asyncio.BufferedProtocol`."""
        return self._read if self._large is None else self._large.missing

    def buffer_updated(self, nbytes: int) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        if self._large is not None:
            self._large.came(nbytes)
        elif (large := self._begun(self._read[:nbytes])) is not None:
            self._large = large
        else:
            self._parse(nbytes)
        if self._large is not None and not self._large.missing:
            content, self._large = self._large.content, None
            self._receive(content)

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`."""
        lost, self._lost = self._lost, _ignore
        lost(RedisConnectionError(str(error or "closed by the server")))

    def _begun(self, data: memoryview) -> Value | None:
        """The large value that begins with `data` and does not end in it, if that is what came."""
        if data[0] != _VALUE or self._answers.has_data():
            return None
        head, found, _ = bytes(data[:_LONGEST_HEAD]).partition(END)
        length, rest = int(head[1:]) if found else 0, data[len(head) + len(END) :]
        return Value(length, rest) if length > max(LARGE, len(rest)) else None

    def _parse(self, nbytes: int) -> None:
        try:
            self._answers.feed(self._read, 0, nbytes)  # type: ignore[arg-type]  # it takes any buffer
            while (answer := self._answers.gets()) is not False:
                self._receive(answer)
        except hiredis.HiredisError as error:
            self._transport.abort()
            self.connection_lost(error)


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Give a future its value, or its exception, if it still waits for one."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _ignore(_: Exception) -> None:
    """Nobody asks any more."""
