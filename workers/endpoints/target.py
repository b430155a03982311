"""Where an endpoint's requests go: a link with its health. A target that was left ends with its last request."""

from __future__ import annotations

import asyncio
from types import TracebackType

from workers.endpoints.health import EndpointHealth
from workers.endpoints.http import EndpointLink


class Target:
    """One address of an endpoint. For its event loop; each request uses it as a context manager."""

    def __init__(self, link: EndpointLink, health: EndpointHealth) -> None:
        self.link, self.health = link, health
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """Begin to send probes."""
        await self.link.open()
        self._probing = asyncio.create_task(self.health.run())

    async def leave(self) -> None:
        """Send no more probes, and close the connections once no request runs."""
        self._probing.cancel()
        try:
            await self._idle.wait()
        finally:
            await asyncio.gather(self._probing, return_exceptions=True)
            await self.link.close()

    def __enter__(self) -> Target:
        self._running += 1
        self._idle.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()
