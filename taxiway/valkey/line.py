"""Who asks a Valkey or Redis server for answers, or listens to it, on a connection that is opened when it is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

from taxiway.valkey.wire import RespWire, settle


class RespLine:
    """One connection at a time, for one at a time who asks or listens; after a failure the next one connects anew.

    `pool` says how to connect, and keeps none of its own; that takes `patience` seconds at most, passwords and TLS
    included. What fails raises redis-py's errors, or an `OSError`.
    """

    def __init__(self, pool: ConnectionPool, patience: float) -> None:
        self._pool = pool
        self._patience = patience
        self._wire: RespWire | None = None
        self._hear: Callable[[Any], None] | None = None
        self._missing = inf
        self._over: asyncio.Future[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether it has a connection that the server did not end."""
        return self._wire is not None

    async def connect(self) -> None:
        """Connect, where it is not connected."""
        if self._wire is not None:
            return
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py annotates only a part
        try:
            async with asyncio.timeout(self._patience):
                await connection.connect()  # type: ignore[no-untyped-call]  # the same
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._wire = RespWire(connection, self._receive, self._lose)

    async def ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The server's answers to commands that are sent together, in order; an error of the server's as a value."""
        heard: list[Any] = []
        await self.listen(commands, heard.append, len(commands))
        return heard

    async def listen(
        self, commands: Sequence[Sequence[Any]], hear: Callable[[Any], None], answers: float = inf
    ) -> None:
        """Send commands, and give `hear` so many answers, or all until the connection ends; why it ended is raised."""
        await self.connect()
        self._hear, self._missing = hear, answers
        self._over = asyncio.get_running_loop().create_future()
        try:
            self.send(*commands)
            await self._over
        except BaseException:
            self.close()  # an answer that is still to come would be taken for the next one's
            raise

    def send(self, *commands: Sequence[Any]) -> None:
        """Send commands whose answers are heard by who listens; nothing where there is no connection."""
        if self._wire is not None:
            self._wire.send(commands)

    def close(self, error: Exception | None = None) -> None:
        """Disconnect; who still asks or listens is told `error`."""
        if self._wire is not None:
            self._wire.close()
            self._lose(error or RedisConnectionError("closed"))

    def _receive(self, answer: Any) -> None:
        assert self._hear is not None and self._over is not None
        self._hear(answer)
        self._missing -= 1
        if not self._missing:
            settle(self._over, None)

    def _lose(self, error: Exception) -> None:
        self._wire = None
        if self._over is not None:
            settle(self._over, error)
