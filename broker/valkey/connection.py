"""How fleet processes reach Valkey or Redis from asyncio: bounded in time, no hidden retries, errors in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hiredis
from redis.asyncio import Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from broker.valkey.lua import Call, script
from taxiway.contract.durability import refusal
from taxiway.valkey.line import RespLine
from taxiway.valkey.resp import READ

ANSWER = 1.5
"""Seconds within which a server must answer: a caller is told within two."""


_UNKNOWN_SCRIPT = "NOSCRIPT"  # how a server says that it has forgotten a script


class _Packing(Connection):
    """Packs commands in C: in Python each argument costs as much as the rest of a command."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """The bytes of a command; its name may be several words."""
        name, *rest = args
        return [hiredis.pack_command((*name.split(), *rest))]


class _PackingTls(_Packing, SSLConnection):
    """The same under TLS: the address says which certificates (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`)."""


def connect(
    url: str, *, answer: float | None = ANSWER, connections: int | None = None, protocol: int | None = None
) -> Redis:
    """A client of the server at `url`; nothing is sent yet. `answer` is None for commands that block.

    At most so many `connections` are open at once, 100 unless said. `protocol` is RESP's version, redis-py's own choice
    unless said.

    redis-py would try ten times by itself: here each failure is seen at once, and who calls decides.
    """
    return Redis.from_url(
        url,
        connection_class=_PackingTls if url.startswith("rediss") else _Packing,
        socket_timeout=answer,
        socket_connect_timeout=ANSWER,
        socket_keepalive=True,
        max_connections=connections,
        socket_read_size=READ,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        protocol=protocol,
    )


class Line:
    """One connection for calls that come one after the other: what redis-py does around a call takes as long again.

    Connects with the first call, and anew with the next one after a failure. `answer` as in `connect`.
    """

    def __init__(self, url: str, *, answer: float | None = ANSWER) -> None:
        self._line = RespLine(connect(url, answer=None, protocol=2).connection_pool, ANSWER)
        self._answer = answer
        self._turn = asyncio.Lock()

    @property
    def connected(self) -> bool:
        """Whether it has a connection that the server did not end."""
        return self._line.connected

    async def call(self, *command: Any) -> Any:
        """The server's answer to a command; who comes while another waits for an answer waits, too."""
        return (await self.calls(command))[0]

    async def calls(self, *commands: Sequence[Any]) -> list[Any]:
        """The server's answers to commands that are sent together, as RESP 2 has them. Raises an error among them."""
        async with self._turn, asyncio.timeout(self._answer):
            answers = await self._line.ask(commands)
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise answer
        return answers

    async def run(self, call: Call) -> Any:
        """The answer of a script."""
        try:
            return await self.call(*call.command)
        except ResponseError as error:
            if not str(error).startswith(_UNKNOWN_SCRIPT):
                raise
            await self.call("SCRIPT", "LOAD", script(call.name).text)
            return await self.call(*call.command)

    async def close(self) -> None:
        """Disconnect."""
        self._line.close()


async def run(client: Redis, call: Call) -> Any:
    """The answer of a script."""
    try:
        return await client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # redis-py annotates only a part
    except NoScriptError:
        await client.script_load(script(call.name).text)
        return await client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # the same


@contextmanager
def fleet_errors(server: str) -> Iterator[None]:
    """Raises a `FleetUnavailable`, naming `server`, for everything that says that it did not answer, or has no room."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise refusal(server, error) from error
