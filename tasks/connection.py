"""How fleet processes reach Valkey or Redis from asyncio: bounded in time, no hidden retries, errors in our words."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import hiredis
from redis.asyncio import Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from taxiway.acceptance import refusal

ANSWER = 1.5
"""Seconds within which a server must answer: a caller is told within two."""


_READ = 2**18
"""Bytes of an answer that are read at once: with redis-py's 64 KiB, a large one takes four times the processor time."""


class _Packing(Connection):
    """Packs commands in C: in Python each argument costs as much as the rest of a command."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """The bytes of a command; its name may be several words."""
        name, *rest = args
        return [hiredis.pack_command((*name.split(), *rest))]


class _PackingTls(_Packing, SSLConnection):
    """The same under TLS: the address says which certificates (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`)."""


def connect(url: str, *, answer: float | None = ANSWER, connections: int | None = None) -> Redis:
    """A client of the server at `url`; nothing is sent yet. `answer` is None for commands that block.

    At most so many `connections` are open at once, 100 unless said.

    redis-py would try ten times by itself: here each failure is seen at once, and who calls decides.
    """
    return Redis.from_url(
        url,
        connection_class=_PackingTls if url.startswith("rediss") else _Packing,
        socket_timeout=answer,
        socket_connect_timeout=ANSWER,
        socket_keepalive=True,
        max_connections=connections,
        socket_read_size=_READ,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


class Line:
    """One connection for calls that come one after the other: what a client does around a call takes as long again.

    Connects with the first call, and anew with the next one after a failure. `answer` as in `connect`.
    """

    def __init__(self, url: str, *, answer: float | None = ANSWER) -> None:
        pool = connect(url, answer=None).connection_pool
        self._connection = pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py annotates only a part
        self._answer = answer
        self._turn = asyncio.Lock()

    @property
    def hung_up(self) -> bool:
        """Whether the server ended the connection."""
        reader = self._connection._reader  # what redis-py offers to ask this waits for the socket
        return reader is not None and reader.at_eof()

    async def call(self, *command: Any) -> Any:
        """The server's answer to a command; who comes while another waits for an answer waits, too."""
        connection = self._connection
        async with self._turn, asyncio.timeout(self._answer):
            if self.hung_up:
                await connection.disconnect(nowait=True)
            await connection.send_packed_command(connection.pack_command(*command), check_health=False)
            return await connection.read_response()

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The answer of a script."""
        call = ("EVALSHA", _sha(script), len(keys), *keys, *args)
        try:
            return await self.call(*call)
        except NoScriptError:
            await self.call("SCRIPT LOAD", script)
            return await self.call(*call)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.disconnect(nowait=True)


@cache
def _sha(script: str) -> str:
    """The name by which a server knows a script."""
    return hashlib.sha1(script.encode()).hexdigest()


@contextmanager
def told_plainly(server: str) -> Iterator[None]:
    """Raises a `FleetUnavailable`, naming `server`, for everything that says that it did not answer, or has no room."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise refusal(server, error) from error
