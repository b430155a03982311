"""Reads one job's stream at a Valkey or Redis server."""

from __future__ import annotations

import asyncio

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from taxiway.client.valkey_link import AWAY, ValkeyLink
from taxiway.keys import stream_key
from taxiway.streaming import Piece, read_piece

_MOST = 256
"""Pieces that are read at once."""

_WAIT = 5.0
"""Seconds that the server waits for a piece before it says that there is none."""

_PAUSE = 0.1
"""Seconds between two attempts to connect."""


class PieceReader:
    """One reader, on a connection of its own: the server's answer waits for the next piece."""

    def __init__(self, link: ValkeyLink, job: str) -> None:
        self._link = link
        self._key = stream_key(job)
        self._connection: AbstractConnection | None = None

    async def read(self, after: str) -> list[tuple[str, Piece]]:
        """The pieces after an entry, with theirs; none after some seconds. While the server is away, it waits."""
        while True:
            try:
                return await self._ask(after)
            except (*AWAY, RedisError):
                await self.aclose()
                await asyncio.sleep(_PAUSE)

    async def aclose(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _ask(self, after: str) -> list[tuple[str, Piece]]:
        if self._connection is None:
            self._connection = await self._link.dial()
        wait = str(int(_WAIT * 1000))
        command = ("XREAD", "COUNT", str(_MOST), "BLOCK", wait, "STREAMS", self._key, after)
        async with asyncio.timeout(_WAIT + self._link.patience):
            await self._connection.send_command(*command)
            streams = await self._connection.read_response()
        entries = streams[0][1] if streams else []
        return [(entry.decode(), read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))) for entry, flat in entries]
