"""How fleet processes reach Valkey or Redis from asyncio: bounded in time, no hidden retries, errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from taxiway.errors import BrokerUnavailableError

ANSWER = 1.5
"""Seconds within which a server must answer: a caller is told within two."""


def connect(url: str, *, answer: float | None = ANSWER) -> Redis:
    """A client of the server at `url`; nothing is sent yet. `answer` is None for commands that block.

    redis-py would try ten times by itself: here each failure is seen at once, and who calls decides.
    """
    return Redis.from_url(
        url,
        socket_timeout=answer,
        socket_connect_timeout=ANSWER,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


@contextmanager
def told_plainly(server: str) -> Iterator[None]:
    """Raises `BrokerUnavailableError`, naming `server`, for everything that says it did not answer."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise BrokerUnavailableError(f"the {server} did not answer: {error}", retry_after=1.0) from error
