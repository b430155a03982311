"""Reads the stream of one job's generated text from a Valkey or Redis server."""

from __future__ import annotations

import asyncio

from taxiway.client.valkey_link import ValkeyLink
from taxiway.contract.keys import stream_key
from taxiway.contract.streaming import Piece, read_piece
from taxiway.valkey.errors import ServerError

_MOST = 256
"""Pieces per read."""

_WAIT = 5.0
"""Seconds for which the server blocks waiting for a piece."""

_PAUSE = 0.1
"""Seconds between two attempts to connect."""


class PieceReader:
    """One reader on its own connection, since each read blocks on the server until the next piece."""

    def __init__(self, link: ValkeyLink, job: str) -> None:
        self._connection = link.connection()
        self._patience = link.patience
        self._key = stream_key(job)

    async def read(self, after: str) -> list[tuple[str, Piece]]:
        """The pieces after an entry, each with its id; empty if none came in some seconds. Waits out an outage."""
        while True:
            try:
                return await self._ask(after)
            except (ServerError, OSError):
                await self.aclose()
                await asyncio.sleep(_PAUSE)

    async def aclose(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _ask(self, after: str) -> list[tuple[str, Piece]]:
        wait = int(_WAIT * 1000)
        command = ("XREAD", "COUNT", _MOST, "BLOCK", wait, "STREAMS", self._key, after)
        async with asyncio.timeout(_WAIT + self._patience):
            streams = await self._connection.call(*command)
        entries = streams[0][1] if streams else []
        return [(entry.decode(), read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))) for entry, flat in entries]
