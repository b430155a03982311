"""The state store's append-only file: rewritten where a full disk cut it short and the server's version needs that.

Redis 7.0 to 7.4 and Valkey up to 9.1.2 open the file without O_APPEND once they have rewritten it, or were a replica
(`openNewIncrAofForAppend` in their `aof.c`). What they take back of a write that was cut short then stays as a hole of
zeros, and after a restart they cannot read the file. As long as the server runs it has everything, so a rewrite repairs
it. When the embedded Valkey is upgraded, tests/integration/test_full_disk.py tells whether `_LAST_VALKEY` must move.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from math import inf

from redis.exceptions import ResponseError

from broker.valkey.connection import Line

logger = logging.getLogger(__name__)

_FIRST_REDIS, _LAST_REDIS, _LAST_VALKEY = (7, 0, 0), (7, 4, 999), (9, 1, 2)

_BUSY = "Background append only file rewriting already in progress"
"""How a server says that it rewrites the file: from before the write that was cut short, it may be."""


REFUSES_FOR = 2.0
"""Seconds after a refused write for which more refusals are expected: twice the time between two heartbeats."""


def leaves_holes(said: Mapping[str, str]) -> bool:
    """Whether the server's version, by its `INFO server`, is known to leave holes in the file."""
    if "valkey_version" in said:
        return _version(said["valkey_version"]) <= _LAST_VALKEY
    return _FIRST_REDIS <= _version(said.get("redis_version", "0")) <= _LAST_REDIS


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", text)[:3])


class AppendOnlyFile:
    """Watches what the server says of its file, as often as the fleet's facts are read. Every router does."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._cut = False
        self._refused: str | None = None
        self._refused_at = -inf
        self._fails = False

    @property
    def refuses(self) -> bool:
        """Whether the server takes no writes now: it cannot write to its disk, or refused a write just now."""
        return self._fails or time.monotonic() - self._refused_at < REFUSES_FOR

    async def look(self, said: Mapping[str, str]) -> None:
        """Take in `INFO server persistence errorstats`; once writes succeed again, ask for a rewrite where needed.

        They may fail for milliseconds, which the count of writes that were refused meanwhile tells of.
        """
        refused = said.get("errorstat_MISCONF", "")
        fails = self._fails = said.get("aof_last_write_status", "ok") != "ok"
        more = self._refused not in (None, refused)
        if more and said.get("rdb_last_bgsave_status", "ok") != "ok":  # nothing else says that it refuses for that
            self._refused_at = time.monotonic()
        if fails or more:
            if not self._cut:
                logger.error("the state store could not write its append-only file: is its disk full?")
            self._cut = True
        self._refused = refused
        if self._cut and not fails:
            if leaves_holes(said):
                await self._rewrite()
            else:
                self._cut = False

    async def _rewrite(self) -> None:
        try:
            await self._line.call("BGREWRITEAOF")
        except ResponseError as error:
            if _BUSY in str(error):
                return
            logger.error("the append-only file may have a hole: have it rewritten", extra={"error": str(error)})
        else:
            logger.warning("the append-only file is rewritten, for a write to it was cut short")
        self._cut = False
