"""Rewrites the state store's append-only file after a full disk cut it short, and notices that writes are refused.

It stays while the embedded wheel, compose.yaml, the chart or Debian ship a server that leaves holes in that file:
Valkey before 9.1.3, Redis 7.0 to 7.4. tests/integration/broker/test_full_disk.py shows whether the embedded one does.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from math import inf

from taxiway.connection import AsyncConnection
from taxiway.valkey import ServerError

logger = logging.getLogger(__name__)

_FIRST_REDIS, _LAST_REDIS, _LAST_VALKEY = (7, 0, 0), (7, 4, 999), (9, 1, 2)

_BUSY = "Background append only file rewriting already in progress"
"""The server's error while it is already rewriting the file, possibly from before the write that was cut short."""

REFUSES_FOR = 2.0
"""Seconds after a refused write during which more refusals are expected: two heartbeats."""


def leaves_holes(info: Mapping[str, str]) -> bool:
    """Whether the server's version, from `INFO server`, is known to leave holes in the file."""
    if "valkey_version" in info:
        return _version(info["valkey_version"]) <= _LAST_VALKEY
    return _FIRST_REDIS <= _version(info.get("redis_version", "0")) <= _LAST_REDIS


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", text)[:3])


class AppendOnlyFile:
    """The server's append-only file. Every router reads the server's reports on it with the fleet's facts.

    Affected servers open the file without O_APPEND after a rewrite or after having been a replica
    (`openNewIncrAofForAppend` in their `aof.c`). When one truncates a write that was cut short, a hole of zeros is
    left, and the file cannot be read after a restart. A running server still has all data, so a rewrite repairs it.
    """

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._cut = False
        self._refused: str | None = None
        self._refused_at = -inf
        self._fails = False

    @property
    def refuses(self) -> bool:
        """Whether the server accepts no writes now: it cannot write to its disk, or recently refused a write."""
        return self._fails or time.monotonic() - self._refused_at < REFUSES_FOR

    async def observe(self, info: Mapping[str, str]) -> None:
        """Read `INFO server persistence errorstats`; once writes succeed again, request a rewrite if needed.

        Writes may fail for only milliseconds between two calls; the count of refused writes shows that.
        """
        refused = info.get("errorstat_MISCONF", "")
        fails = self._fails = info.get("aof_last_write_status", "ok") != "ok"
        more = self._refused not in (None, refused)
        if more and info.get("rdb_last_bgsave_status", "ok") != "ok":  # the only sign of a refusal for that reason
            self._refused_at = time.monotonic()
        if fails or more:
            if not self._cut:
                logger.error("the state store cannot write its append-only file: is its disk full?")
            self._cut = True
        self._refused = refused
        if self._cut and not fails:
            if leaves_holes(info):
                await self._rewrite()
            else:
                self._cut = False

    async def _rewrite(self) -> None:
        (answer,) = await self._connection.ask([("BGREWRITEAOF",)])
        if isinstance(answer, ServerError):
            if _BUSY in str(answer):
                return
            logger.error("append-only file may have a hole: run BGREWRITEAOF", extra={"error": str(answer)})
        else:
            logger.warning("rewriting the append-only file after a truncated write")
        self._cut = False
