"""What is still to come of a request's body, read straight into the place where it is used.

uvicorn's way copies each byte five times, into memory that is new each time: for 8 MB that is most of what the door
costs a router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np

WHOLE = "taxiway.whole"
"""An extension in a request's scope: a `Whole`."""

Whole = Callable[[bytes, int], Awaitable[memoryview | None]]
"""Given what `receive` gave first and the body's length, all of it; None where its sender is gone."""


class Owner(Protocol):
    """Whose connection it is; `came` is told of bytes, `complete` that they were the last of their request."""

    def came(self, count: int) -> None:
        """So many bytes came."""

    def complete(self) -> None:
        """The body is whole."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`, as what follows."""

    def eof_received(self) -> None:
        """The sender says no more."""

    def pause_writing(self) -> None:
        """The sender does not read."""

    def resume_writing(self) -> None:
        """It reads again."""


class BodyReader(asyncio.BufferedProtocol):
    """Has a connection until the body of `length` bytes that begins with `begin` is whole.

    Memory that nothing came for is not taken: numpy leaves its pages alone.
    """

    def __init__(self, transport: Any, owner: Owner, begin: bytes, length: int) -> None:
        content = np.empty(length, np.uint8).data
        content[: len(begin)] = begin
        self.whole: asyncio.Future[memoryview | None] = asyncio.get_running_loop().create_future()
        self._content, self._missing = content, content[len(begin) :]
        self._transport = transport
        self._owner = owner
        transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of `asyncio.BufferedProtocol`."""
        return self._missing

    def buffer_updated(self, nbytes: int) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        self._missing = self._missing[nbytes:]
        self._owner.came(nbytes)
        if not self._missing:
            self._transport.set_protocol(self._owner)
            self._owner.complete()
            self._end(self._content)

    def eof_received(self) -> None:
        """Part of `asyncio.BufferedProtocol`."""
        self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._owner.connection_lost(exc)
        self._end(None)

    def pause_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Part of `asyncio.BaseProtocol`."""
        self._owner.resume_writing()

    def _end(self, content: memoryview | None) -> None:
        if not self.whole.done():
            self.whole.set_result(content)
