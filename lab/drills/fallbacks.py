"""Two usual ways to keep private requests at home, as small proxies: rules that fall through, and fallbacks.

Both are configured as their projects show it: LLMKube's routes take the first rule that matches, else the default
backend; LiteLLM's proxy sends a model's requests to the next deployment when one is overloaded or fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from lab.drills.wire_tap import WireTap

SLOTS = 8
"""Requests that the edge's server runs at the same time; it refuses more (429)."""

RUNS = 0.006
"""Seconds of a request there."""

OVERLOADED = 429

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class EdgeServer:
    """The server at home. `down`: its process was killed."""

    down: bool = False
    running: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        """Echo a request, if there is a slot."""
        text = await request.text()
        if self.down or self.running >= SLOTS:
            return web.Response(status=503 if self.down else OVERLOADED)
        self.running += 1
        try:
            await asyncio.sleep(RUNS)
        finally:
            self.running -= 1
        return web.Response(text=text)


async def _echo(request: web.Request) -> web.Response:
    return web.Response(text=await request.text())


@dataclass
class Opponent:
    """A proxy at home, and the line to the cloud behind it."""

    name: str
    edge: str
    tap: WireTap
    session: aiohttp.ClientSession
    answered: int = 0
    refused: int = 0
    fallbacks: bool = field(default=False)

    async def send(self, text: str, labels: Mapping[str, str]) -> None:
        """Route one private request; `labels` are its headers."""
        cloud = f"http://127.0.0.1:{self.tap.port}/"
        if self.fallbacks:
            backends = [self.edge, cloud]
        else:  # the first rule that matches, else the default backend
            backends = [self.edge if labels.get("x-locality") == "ward" else cloud]
        for backend in backends:
            if await self._answers(backend, text):
                self.answered += 1
                return
        self.refused += 1

    async def _answers(self, backend: str, text: str) -> bool:
        try:
            async with self.session.post(backend, data=text) as response:
                return response.ok
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def opponents(edge: EdgeServer) -> AsyncIterator[list[Opponent]]:
    """Both proxies, with one server at home and each a recorded line to a cloud."""
    async with AsyncExitStack() as stack:
        home, cloud = [await _serving(stack, handler) for handler in (edge.answer, _echo)]
        there, found = urlsplit(cloud), []
        assert there.hostname
        assert there.port
        for name, fallbacks in (("rules with fallthrough", False), ("proxy with fallbacks", True)):
            session = await stack.enter_async_context(aiohttp.ClientSession(trust_env=False))
            tap = WireTap(there.hostname, there.port)
            stack.callback(tap.close)
            found.append(Opponent(name, home, tap, session, fallbacks=fallbacks))
        yield found


async def _serving(stack: AsyncExitStack, handler: Handler) -> str:
    app = web.Application()
    app.router.add_post("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}/"
