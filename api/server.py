"""Serves the HTTP API with stock uvicorn and h11 inside the router's own event loop.

Measured on two busy cores: processor time of a 300-byte POST to a small application, and the memory that one connection
adds to the process when it sends `GET /v2/health/live` for 4 s as fast as it can:

| server | per request | one connection |
| --- | --- | --- |
| uvicorn 0.54, h11 0.16 | 125 us | 0.3 MB |
| uvicorn 0.54, httptools | 20 us | 99 MB |
| granian 2.8, embedded | 290 us | 0.1 MB |

granian's threads and the event loop wait for each other; its embedded server is marked experimental and cannot take a
free port. What uvicorn does not limit (slow heads, bodies and readers, idle connections, TLS handshakes) is limited by
a proxy in front of it: docs/security.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn

from api.errors import unforeseen
from api.gate import Application, Receive, Send
from tasks.queues.limits import Limits
from taxiway.contract.peers import MESSAGE, MOST_READ

HEAD = 2**16
"""Limit on a request's head, and on what follows the last chunk of a body, in bytes."""

_GRACE = 5.0  # seconds for open requests when the router stops, before their waits are ended
_LAST = 5  # seconds that they have after that
_BACKLOG = 2048  # connections that wait to be accepted
_IDLE_CONNECTION = 20
"""Seconds that an idle connection is kept after an answer, longer than clients reuse one: httpx, and so the openai
package, 5 s; aiohttp 15 s. If both ended it at the same time, a request would meet a closed connection."""

_CLOSE = (b"connection", b"close")


class HttpServer:
    """The HTTP API at an address; port 0 takes a free one. With `tls` it serves only HTTPS."""

    def __init__(
        self, app: Application, host: str, port: int, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # A frame that comes while a large body is sent waits for what the kernel has of that: no more than a message
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MESSAGE)
        self._scheme = "http" if tls is None else "https"
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._app = app
        self._parting = False
        config = uvicorn.Config(
            self._answer,
            http="h11",
            ws="wsproto",
            ws_max_size=MOST_READ,
            ws_per_message_deflate=False,  # tensors and short texts: it would cost each job more than it takes itself
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # it writes of each malformed request: any client could fill the log
            access_log=False,
            proxy_headers=False,  # client addresses are not used
            server_header=False,
            ssl_context_factory=None if tls is None else lambda *_: tls,
            limit_concurrency=limits.connections + 1,  # it refuses requests from this number on
            timeout_keep_alive=_IDLE_CONNECTION,
            timeout_graceful_shutdown=round(_GRACE) + _LAST,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=HEAD,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"{self._scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Serve, and return once requests are accepted."""
        asyncio.get_running_loop().set_exception_handler(_ignore_malformed)
        await self._server.startup(sockets=[self._socket])  # `serve` would replace the router's signal handlers
        self._serving = asyncio.create_task(self._server.main_loop(), name="http")

    def part(self) -> None:
        """Keep serving, but close each connection after its next answer."""
        self._parting = True

    async def stop(self, at_once: asyncio.Event, hurry: Callable[[], None]) -> None:
        """Accept no more connections, let open requests finish, and close.

        Requests have the grace period, or until `at_once`; then `hurry` is called, which ends all waits for jobs.
        """
        if self._serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await self._serving
        closing = asyncio.create_task(self._server.shutdown(sockets=[self._socket]))
        hurried = asyncio.create_task(at_once.wait())
        await asyncio.wait([closing, hurried], timeout=_GRACE, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        hurry()
        await closing
        for connection in list(self._server.server_state.connections):  # of clients that do not read, or not leave
            connection.transport.abort()
        while self.connections:
            await asyncio.sleep(0)

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        refused = False

        async def answering(message: Mapping[str, Any]) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                try:
                    await send({**message, "headers": [*message["headers"], _CLOSE]} if self._parting else message)
                except h11.LocalProtocolError:  # meanwhile uvicorn has refused the rest of a malformed request
                    refused = True
            elif not refused:
                await send(message)

        try:
            await self._app(scope, receive, answering)
        except Exception as error:
            unforeseen(scope.get("method", "GET"), scope["path"], error)
            raise


def _ignore_malformed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log no error for a body that is malformed after its answer: uvicorn fails to refuse it, and closes."""
    if not isinstance(context.get("exception"), h11.LocalProtocolError):
        loop.default_exception_handler(context)


def digest_of(certificate: Path) -> str:
    """SHA-256 of the first certificate in a file in PEM, in hexadecimal digits. Raises `ValueError` if it has none."""
    first = certificate.read_text().partition("-----END CERTIFICATE-----")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert("".join(first[:2]).strip())).hexdigest()


def open_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server context for TLS 1.2 and 1.3 with a certificate (its chain, in PEM) and its key.

    Raises:
        OSError: a file cannot be read, or they do not match (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
