"""One connection to a Valkey or Redis server, whose answers are parsed in C as they come, many in one turn of the loop.

redis-py opens it (addresses, passwords, TLS). Its own reader is set aside then: that takes a coroutine's turn for each
answer, some 8 µs, and reads a large one in pieces of 64 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

_TOGETHER = 1 << 20
"""Bytes of commands up to which they go out in one write; larger ones are not copied once more."""


class RespWire(asyncio.Protocol):
    """Takes an open connection over.

    `receive` gets each answer, an error of the server's as a value; `lost` is told once that no more will come.
    """

    def __init__(
        self, connection: AbstractConnection, receive: Callable[[Any], None], lost: Callable[[Exception], None]
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._answers = hiredis.Reader(replyError=ResponseError)
        assert connection._writer is not None
        self._writer = connection._writer  # closes the transport when it is collected
        self._transport: Any = self._writer.transport
        self._transport.set_protocol(self)
        connection._reader = connection._writer = None  # else it warns of what it has not closed

    def send(self, commands: Sequence[Sequence[Any]]) -> None:
        """Send commands, one after the other; nothing where the connection has ended, of which `lost` tells."""
        if self._transport.is_closing():
            return
        packed = [hiredis.pack_command(tuple(command)) for command in commands]
        if sum(map(len, packed)) <= _TOGETHER:
            self._transport.write(b"".join(packed))
        else:
            for command in packed:
                self._transport.write(command)

    def close(self) -> None:
        """Close the connection; `lost` is not told."""
        self._lost = _ignore
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        try:
            self._answers.feed(data)
            while (answer := self._answers.gets()) is not False:
                self._receive(answer)
        except hiredis.HiredisError as error:
            self._transport.abort()
            self.connection_lost(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`."""
        lost, self._lost = self._lost, _ignore
        lost(RedisConnectionError(str(error or "closed by the server")))


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
