"""Takes work from the fleets that this one connects to and that may hand it some (`serves` in queues.yaml).

Each router opens a connection of its own to each of them, which waits there for work: an edge needs no inbound port.
What comes is served as what comes on a connection that the other fleet opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import aiohttp

from api.peers.connection import PeerConnection, PeerDesk, PeerError
from tasks.queues.endpoints import Endpoint
from taxiway.contract.peers import MOST_READ, PATH, VERSION, PeerServe, encode_frames
from taxiway.running import end
from workers.endpoints.http import EndpointConfigError, headers_of, tls_context
from workers.endpoints.site_line import bound_unsent

logger = logging.getLogger(__name__)

AGAIN = 0.5
"""Seconds between two attempts to connect, and between two looks at which fleets there are."""

HEARTBEAT = 10.0
"""Seconds between two looks at whether the other site is still there, while it has no work."""


class PeerServing:
    """Keeps a connection to each of these fleets. `environment` has the keys that queues.yaml names."""

    def __init__(self, desk: PeerDesk, environment: Mapping[str, str]) -> None:
        self._desk, self._environment = desk, environment
        self._why: dict[str, str] = {}

    async def run(self) -> None:
        """Follow queues.yaml, until cancelled."""
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                wanted = self._wanted()
                for url in [url for url in wanted if url not in running or running[url].done()]:
                    running[url] = asyncio.create_task(self._serve(url, wanted[url]))
                await asyncio.sleep(AGAIN)
        finally:
            await end(running.values())

    def _wanted(self) -> dict[str, Endpoint]:
        """The endpoints of fleets that are served, by URL."""
        endpoints = (one.endpoint for one in self._desk.router.rules.topology.hardware.values())
        return {url: one for one in endpoints if one is not None and one.serves is not None for url in one.urls}

    async def _serve(self, url: str, endpoint: Endpoint) -> None:
        """Connect once, and serve what comes until the connection ends or queues.yaml says otherwise."""
        key = self._environment.get(endpoint.key_env or "", "")
        headers = headers_of(endpoint, key)
        try:
            tls = tls_context(endpoint.tls) if url.startswith("https:") else True
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=endpoint.connect_timeout)
            connector = aiohttp.TCPConnector(ssl=tls)
            async with (
                aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session,
                session.ws_connect(url + PATH, max_msg_size=MOST_READ, compress=0, heartbeat=HEARTBEAT) as socket,
            ):
                self._why.pop(url, None)
                await self._converse(socket, url, endpoint)
        except (aiohttp.ClientError, OSError, TimeoutError, PeerError, EndpointConfigError) as error:
            if self._why.get(url) != (why := str(error) or type(error).__name__):
                self._why[url] = why
                logger.warning("cannot take work of a site", extra={"url": url, "reason": why})

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse, url: str, endpoint: Endpoint) -> None:
        async def receive() -> bytes | None:
            message = await socket.receive()
            return message.data if message.type is aiohttp.WSMsgType.BINARY else None

        bound_unsent(socket)
        site = self._desk.router.rules.topology.site
        await socket.send_bytes(encode_frames([PeerServe(VERSION, site)]))
        connection = PeerConnection(
            self._desk, endpoint.serves, socket.send_bytes, lambda: self._wanted().get(url) == endpoint
        )
        await connection.serve(await connection.first(receive, within=None), receive)
