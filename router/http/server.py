"""Serves the HTTP door with uvicorn inside the router's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from router.http.connection import CLOSE, Connection
from router.http.gate import Application
from tasks.topology import Limits

_GRACE = 5.0  # seconds that open requests have when the router stops, before what they wait for is given up
_LAST = 5  # seconds that they have from then on
_LOOK = 0.5  # seconds between two looks after slow clients


class _Server(uvicorn.Server):
    """uvicorn with our connections, and without signal handlers: the router has its own."""

    def __init__(self, config: uvicorn.Config, limits: Limits, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._limits = limits
        self._tls = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        make = partial(Connection, self._limits, self.config, self.server_state)
        within = self._limits.head if self._tls is not None else None
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                make, sock=one, ssl=self._tls, ssl_handshake_timeout=within, backlog=self.config.backlog
            )
            for one in sockets or ()
        ]
        self.started = True

    def part(self) -> None:
        """From now on answers end their connections, and what their clients ask next goes to another router."""
        self.config.encoded_headers.append(CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        for connection in self.server_state.connections:
            connection.part()  # type: ignore[union-attr]  # they are all ours

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % int(10 * _LOOK) == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.look(now)  # type: ignore[union-attr]  # they are all ours
        return await super().on_tick(counter)


class HttpServer:
    """The HTTP door at an address; port 0 takes a free one. With `tls` it speaks HTTPS alone."""

    def __init__(
        self, app: Application, host: str, port: int, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=2048)
        self._scheme = "http" if tls is None else "https"
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="httptools",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody asks who called
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(_GRACE) + _LAST,
            ws="none",
        )
        self._server = _Server(config, limits, tls)
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"{self._scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many it holds."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Serve, and return once requests are accepted."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        if self._task.done():
            self._task.result()

    def part(self) -> None:
        """Serve on, but no connection for longer than the answer under way, or the next one."""
        self._server.part()

    async def stop(self, at_once: asyncio.Event, hurry: Callable[[], None]) -> None:
        """Accept no more, let open requests end, and close.

        They have their grace, or until `at_once`; then `hurry` is called, so that what waits for a job waits no more.
        """
        self._server.should_exit = True
        if self._task is None:
            return
        hurried = asyncio.create_task(at_once.wait())
        await asyncio.wait([self._task, hurried], timeout=_GRACE, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        hurry()
        await self._task


def is_loopback(host: str) -> bool:
    """Whether a door at `host` is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def open_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 and 1.3 under a certificate (its chain, in PEM) and its key.

    Raises:
        OSError: a file cannot be read, or they do not belong together (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
