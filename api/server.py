"""Serves the HTTP door with stock uvicorn inside the router's own event loop, behind our own limits.

Measured on two busy cores: CPU time of a 300-byte POST to a small application, and the memory that one connection adds
to the process when it sends `GET /v2/health/live` for 5 s as fast as it can (12 to 17 MB of requests):

| server | per request | one connection | does not limit |
| --- | --- | --- | --- |
| uvicorn 0.54, httptools | 25 us | 650 MB | pipelining, slow heads, bodies and readers |
| uvicorn, h11 | 118 us | 1 MB | slow heads, bodies and readers |
| uvicorn, zttp 0.0.35 | 29 us | 8 MB | the same; it is an early release |
| granian 2.8, embedded | 67 us | 0 MB | readers, handshakes, connections (they wait); a free port cannot be requested |
| hypercorn 0.18 | 250 us | 1 MB | slow bodies and readers |
| uvicorn, httptools, behind `Connection` | 33 us | 0 MB | |

An infer request costs the router some 270 us in all, so granian, h11 and hypercorn would add 12 % and more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.connection import Bounded, Connection, Shared
from api.gate import Application
from tasks.topology import Limits

_GRACE = 5.0  # seconds for open requests when the router stops, before their waits are ended
_LAST = 5  # seconds that they have after that
_LOOK = 0.5  # seconds between two checks for slow clients
_BACKLOG = 2048  # connections that wait to be accepted
_DAY = 86400  # seconds


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the router has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The HTTP door at an address; port 0 takes a free one. With `tls` it serves only HTTPS."""

    def __init__(
        self, app: Application, host: str, port: int, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._tls = tls
        self._scheme = "http" if tls is None else "https"
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            Bounded(app),
            http=HttpToolsProtocol,
            log_config=None,
            log_level="error",  # it warns of each malformed request: any client could fill the log
            access_log=False,
            proxy_headers=False,  # client addresses are not used
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_DAY,  # `Connection` enforces SILENT itself
            timeout_graceful_shutdown=round(_GRACE) + _LAST,
            ws="none",
        )
        self._server = _Server(config)
        make = partial(HttpToolsProtocol, config, self._server.server_state)
        self._shared = Shared(limits, lambda state: make(app_state=state))
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"{self._scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._shared.connections)

    async def start(self) -> None:
        """Serve, and return once requests are accepted."""
        loop, within = asyncio.get_running_loop(), self._shared.limits.head if self._tls is not None else None
        self._listener = await loop.create_server(
            lambda: Connection(self._shared),
            sock=self._socket,
            ssl=self._tls,
            ssl_handshake_timeout=within,
            backlog=_BACKLOG,
        )
        serving = self._server.serve(sockets=[])  # uvicorn's own listener does not limit handshakes
        self._tasks = [asyncio.create_task(serving, name="http"), asyncio.create_task(self._check(), name="http-check")]

    def part(self) -> None:
        """Keep serving, but close each connection after its present or next answer."""
        self._shared.parting = True

    async def stop(self, at_once: asyncio.Event, hurry: Callable[[], None]) -> None:
        """Accept no more connections, let open requests finish, and close.

        Requests have the grace period, or until `at_once`; then `hurry` is called, which ends all waits for jobs.
        """
        if self._listener is None:
            self._socket.close()
            return
        self._listener.close()
        self._server.should_exit = True
        serving, looking = self._tasks
        hurried = asyncio.create_task(at_once.wait())
        await asyncio.wait([serving, hurried], timeout=_GRACE, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        hurry()
        await serving
        looking.cancel()
        for connection in list(self._shared.connections):
            connection.abort()
        while self._shared.connections:
            await asyncio.sleep(0)

    async def _check(self) -> None:
        """Close the connections of clients that are too slow."""
        while True:
            await asyncio.sleep(_LOOK)
            now = asyncio.get_running_loop().time()
            for connection in list(self._shared.connections):
                connection.look(now)


def open_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server context for TLS 1.2 and 1.3 with a certificate (its chain, in PEM) and its key.

    Raises:
        OSError: a file cannot be read, or they do not match (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
