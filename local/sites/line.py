"""A line between two sites on one machine: it carries connections late and at a bounded rate, and can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import math

_CHUNK = 2**16


class ScriptedLine:
    """Carries the connections that site `near` opens to site `far`, whose address `there` is known once it is up.

    `delay` is in seconds each way, `rate` in bytes a second each way.
    """

    def __init__(self, near: str, far: str) -> None:
        self.near, self.far = near, far
        self.there: tuple[str, int] | None = None
        self.delay, self.rate = 0.0, math.inf
        self._cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._free = [0.0, 0.0]  # when each direction has sent what it has

    @property
    def sites(self) -> frozenset[str]:
        """Its two ends."""
        return frozenset((self.near, self.far))

    async def open(self) -> str:
        """Listen; returns the URL of its near end."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Abort all connections, and let none through."""
        self._cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def restore(self) -> None:
        """Let connections through."""
        self._cut = False

    async def _carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self._cut or self.there is None:
            near_out.transport.abort()
            return
        try:
            far_in, far_out = await asyncio.open_connection(*self.there)
        except OSError:
            near_out.transport.abort()
            return
        both = {near_out, far_out}
        self._writers |= both
        with contextlib.suppress(OSError, asyncio.CancelledError):  # at the loop's end; Python 3.11 would log it
            await asyncio.gather(self._pump(near_in, far_out, 0), self._pump(far_in, near_out, 1))
        self._writers -= both
        for writer in both:
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: int) -> None:
        """Each chunk waits for its turn, then for the delay, however many are on their way."""
        loop = asyncio.get_running_loop()
        while chunk := await source.read(_CHUNK):
            free = self._free[way] = max(loop.time(), self._free[way]) + len(chunk) / self.rate
            loop.call_at(free + self.delay, _write, sink, chunk)
            await asyncio.sleep(max(free - loop.time(), 0.0))
        loop.call_later(self.delay, sink.close)


def _write(sink: asyncio.StreamWriter, chunk: bytes) -> None:
    if not sink.is_closing():
        sink.write(chunk)
