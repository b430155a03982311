"""A minimal HTTP/1.1 client that keeps the measurement on the server, with one connection per concurrent request.

Bodies are made beforehand. Of an answer only status and length are read, and the content if it has items.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import cast

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END = b"\r\n\r\n"


class HttpCaller:
    """Posts bodies to one path of a loopback server.

    Args:
        bodies: requests, sent in rotation.
        count: the items in an answer's body, 1 by default.
    """

    def __init__(
        self,
        *,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        kind: str,
        count: Callable[[bytes], float] = lambda _: 1.0,
    ) -> None:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {kind}\r\ncontent-length: "
        self._requests = [head.encode() + f"{len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._port = port
        self._count = count
        self._free: list[_Connection] = []

    async def __aenter__(self) -> HttpCaller:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._free:
            connection.close()
        await asyncio.sleep(0)  # they close in the loop's next turn

    async def ask(self, number: int) -> float:
        """The items in the answer to that request.

        Raises:
            OSError: the connection was lost.
            ValueError: a status other than 200, or an answer without a length.
        """
        return self._count(await self.body(number))

    async def alone(self, number: int) -> float:
        """The same for a caller with a single request at a time."""
        return await self.ask(number)

    async def body(self, number: int) -> bytes:
        """The answer's body. Raises as `ask` does."""
        connection = self._unused() or await self._connect()
        body = await connection.exchange(self._requests[number % len(self._requests)])
        self._free.append(connection)
        return body

    def _unused(self) -> _Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.open:  # servers close connections that were idle for some seconds
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
        return connection


class _Connection(asyncio.Protocol):
    """A connection with one request at a time. After a failure it is closed and removed from the pool."""

    def __init__(self) -> None:
        self.open = True
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[bytes] | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def exchange(self, request: bytes) -> asyncio.Future[bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, received: bytes) -> None:
        self._received += received
        end = self._received.find(_END)
        if end < 0:
            return
        length = _LENGTH.search(self._received, 0, end)
        if length is None or self._received[9:12] != b"200":
            self._fail(ValueError(f"an unexpected answer: {self._received[:300]!r}"))
        elif len(self._received) >= (whole := end + len(_END) + int(length[1])):
            body, self._received = self._received[end + len(_END) : whole], b""
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(body)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()

    def _fail(self, error: Exception) -> None:
        self.open = False
        self._transport.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
