"""An endpoint over HTTP: its kept connections, and what their failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver

from tasks.heartbeat import PeerFacts
from tasks.queues.endpoints import Endpoint, Tls
from taxiway.errors import TaxiwayError
from workers.endpoints.protocol import (
    MAX_REFUSAL,
    Conversation,
    EndpointError,
    Exchange,
    FaultKind,
    Tell,
    Value,
    refused,
    unready,
)
from workers.port import Row

IDLE_CONNECTION = 4.0
"""Seconds that an idle connection is kept: uvicorn, before vLLM and others, closes them after 5."""

MAX_LIST = 4 * 2**20
"""Bytes that are read of the answer to a probe."""

RESOLVED_FOR = 5
"""Seconds for which a name's addresses are kept."""

_JSON = {"Content-Type": "application/json"}
_LINGER = 0.25  # seconds for which a complete answer's end is awaited, so that its connection can be kept


class EndpointConfigError(Exception):
    """The endpoint's key or certificates cannot be read on this machine."""


class OneAddress(ThreadedResolver):
    """Resolves each name to one of its addresses, by its place among all of them in order."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The address. Raises `OSError` if the name has fewer."""
        found = {one["host"]: one for one in await super().resolve(host, port, family)}
        if self._place >= len(found):
            raise OSError(f"the name has {len(found)} address(es)")
        return [found[sorted(found)[self._place]]]


class EndpointLink:
    """Connections to one endpoint, for one event loop.

    Args:
        replica: one of the endpoint's `replicas`.
        key: its API key; empty for none.
        stall: seconds without a byte after which an answer counts as stalled.

    `url` is where the protocol's paths begin, and `root` the server's. `received` is when it last sent part of an
    answer, on the monotonic clock.

    Raises:
        EndpointConfigError: a certificate cannot be read.
    """

    def __init__(self, endpoint: Endpoint, replica: str, key: str, stall: float) -> None:
        url, pinned, number = replica.partition("#")
        self.url = url
        self._address = int(number) if pinned else None
        self._host = urlsplit(url).netloc
        self._connect_timeout, self._stall = endpoint.connect_timeout, stall
        self._headers = headers_of(endpoint, key)
        self._tls = tls_context(endpoint.tls) if url.startswith("https:") else None
        parts = urlsplit(url)
        self.root = f"{parts.scheme}://{parts.netloc}"
        self.received = 0.0

    @property
    def peer(self) -> PeerFacts | None:
        """None: an engine offers nothing."""
        return None

    async def open(self) -> None:
        """Be ready to connect."""
        resolver = None if self._address is None else OneAddress(self._address)
        tls = True if self._tls is None else self._tls
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=IDLE_CONNECTION, ssl=tls, resolver=resolver, ttl_dns_cache=RESOLVED_FOR
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout, sock_read=self._stall)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def ask(self, exchange: Exchange, tell: Tell) -> Row:
        """The outputs of the endpoint's answer; `tell` is called with generated text and other deltas as they arrive.

        If this is cancelled, the connection is closed.

        Raises:
            EndpointError: the endpoint failed.
            RequestError: the request is at fault.
        """
        exchange.sent = time.monotonic()
        try:
            async with self._request("POST", exchange.ask.path, exchange) as response:
                return await self._answer(response, exchange, tell)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            fault = self._fault(error)
            exchange.refused = exchange.refused or fault.kind is FaultKind.UNREACHED
            raise fault from error

    async def _answer(self, response: aiohttp.ClientResponse, exchange: Exchange, tell: Tell) -> Row:
        reader = exchange.reader = exchange.ask.read(response.headers)
        async for chunk in response.content.iter_any():
            self.received = time.monotonic()
            parts = reader.feed(chunk)
            if reader.pieces and not exchange.first:
                exchange.first = self.received
            if parts:
                tell(parts)
            if reader.done:
                await _end(response)
                break
        return reader.answer()

    async def probe(
        self, path: str, timeout: float, method: str = "GET", *, base: str = "", body: bytes = b"{}"
    ) -> bytes:
        """What the endpoint answers to a small request, in at most `timeout` seconds; what is posted is JSON.

        The path is below `base`, by default the endpoint's URL; `root` is that of its server.

        Raises:
            EndpointError: it does not answer with 200.
        """
        try:
            async with asyncio.timeout(timeout), self._request(method, path, base=base, body=body) as response:
                return await _read(response, MAX_LIST)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._fault(error) from error
        except TaxiwayError as error:
            raise EndpointError(FaultKind.UNREACHED, f"the endpoint refuses a probe: {error.message}") from error

    async def converse(self, talk: Conversation[Value], timeout: float, *, base: str = "") -> Value:
        """What comes of small requests that depend on each other's answers. Raises `EndpointError`."""
        try:
            method, path, body = next(talk)
            while True:
                method, path, body = talk.send(await self.probe(path, timeout, method, base=base, body=body))
        except StopIteration as found:
            value: Value = found.value
            return value

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, exchange: Exchange | None = None, *, base: str = "", body: bytes = b"{}"
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The endpoint's answer, if it has the status 200; a redirect would take the key elsewhere."""
        small = (body, _JSON) if method == "POST" else (None, None)  # MLServer reads a body in every POST
        content, headers = small if exchange is None else (exchange.ask.body, exchange.ask.headers)
        url = (base or self.url) + path
        async with self._session.request(method, url, data=content, headers=headers, allow_redirects=False) as response:
            if exchange is not None:
                exchange.headers, exchange.refused = response.headers, response.status != 200
            if response.status != 200:
                said = await _read(response, MAX_REFUSAL)
                meaning = unready if exchange is None else refused
                raise meaning(response.status, response.headers, said, time.time())
            yield response

    def _fault(self, error: Exception) -> EndpointError:
        """What a failed connection means."""
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return EndpointError(FaultKind.UNREACHED, f"TLS with {self._host} failed: {error.os_error or error}")
        if isinstance(error, aiohttp.ClientConnectorError):
            return EndpointError(FaultKind.UNREACHED, f"cannot connect to {self._host}: {error.os_error}")
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            timeout = self._connect_timeout
            return EndpointError(FaultKind.UNREACHED, f"no connection to {self._host} within {timeout:g} s")
        if isinstance(error, aiohttp.SocketTimeoutError):
            return EndpointError(FaultKind.BROKEN, f"{self._host} sent nothing for {self._stall:g} s")
        if isinstance(error, TimeoutError):
            return EndpointError(FaultKind.UNREACHED, f"{self._host} did not answer a probe in time")
        return EndpointError(FaultKind.BROKEN, f"the connection to {self._host} broke: {error or type(error).__name__}")


async def _end(response: aiohttp.ClientResponse) -> None:
    """Read what follows a complete answer: nothing, usually, but its end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            async for _ in response.content.iter_any():
                pass


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body, or somewhat more than its first `most` bytes."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most:
            break
    return body


def headers_of(endpoint: Endpoint, key: str) -> dict[str, str]:
    """The headers of each request to an endpoint, with its key if it has one."""
    return {**({"Authorization": f"Bearer {key}"} if key else {}), **endpoint.headers}


def tls_context(tls: Tls) -> ssl.SSLContext:
    """How an endpoint is connected to. Raises `EndpointConfigError`."""
    try:
        context = ssl.create_default_context(cafile=tls.authorities)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(file for file in (tls.authorities, tls.certificate, tls.key) if file is not None)
        raise EndpointConfigError(f"cannot read the certificates {named}: {error}") from error
    return context
