"""A router's session on a Valkey broker, and its in-flight lists: what it took is there until it is forwarded."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from broker.valkey.lua import Call
from taxiway.contract.keys import ARRIVALS, LEVELS, SESSIONS, in_flight_key, session_key
from taxiway.valkey.aio import Connection

LASTS = 5.0
"""Seconds without a sign after which what a router took is put back."""

RENEW = 1.0
"""Seconds between two signs of life."""

REMEMBERED = 1200.0
"""Seconds for which an ended session is looked after: longer than Linux resends what a lost connection holds."""

REMEMBERED_AT_MOST = 256
"""Ended sessions that are looked after at once: a network that breaks every second leaves one each time."""

RECENT = 60.0
"""Seconds since its last sign for which an ended session is looked at each time; later, seldom."""

SELDOM = 10
"""Looks of which one is at all ended sessions, and the others at the recent ones."""

TAKES = "takes"
"""The list for what a router takes together; the others are for what it waits for, one a level."""

SOURCES = (TAKES, *map(str, range(LEVELS)))


class Session:
    """One router's sessions, one after the other."""

    def __init__(self, connection: Connection, router: str) -> None:
        self._connection = connection
        self._router = router
        self._looks = 0
        self._number = 0
        self._ahead = 0.0
        self.name, self._newborn, self._signed = "", True, -math.inf
        self._begin()

    @property
    def key(self) -> str:
        """The key of the present session."""
        return session_key(self.name)

    @property
    def due(self) -> bool:
        """Whether it is time for a sign."""
        return time.monotonic() - self._signed > RENEW

    def in_flight(self, source: str) -> str:
        """The list of what was taken from `source` in the present session."""
        return in_flight_key(self.name, source)

    def now(self) -> float:
        """The server's time, as of its last answer and this host's clock since."""
        return time.monotonic() + self._ahead

    def set_clock(self, now: float) -> None:
        """Take the server's time from an answer that just came."""
        self._ahead = now - time.monotonic()

    async def sign(self) -> bool:
        """Show that the router lives; False where its session had ended: then it has to `end`."""
        name, newborn = self.name, self._newborn
        now, lives = await self._connection.run(sign_call(name, LASTS, begins=newborn))
        self.set_clock(float(now))
        if name == self.name:
            self._signed, self._newborn = time.monotonic(), False
        return bool(lives)

    async def end(self, *, reached: bool) -> None:
        """End the present session, put back all that is in flight under it, and begin another.

        `reached` says that the server answered every move into its lists, so that nobody has to look after it.
        """
        await self._connection.call("DEL", self.key)
        await self._recover_all([self.name], remembered=-1.0 if reached else REMEMBERED)
        self._begin()

    async def give_back(self, lists: Sequence[str]) -> None:
        """Put back what is in these lists; the session goes on."""
        await self._connection.run(Call("session_give_back", [ARRIVALS, *lists]))

    async def recover(self) -> int:
        """Put back what is in flight under the sessions of others that ended; how many messages.

        A session that ended long ago is looked at seldom.
        """
        self._looks += 1
        oldest = "-inf" if self._looks % SELDOM == 0 else self.now() - LASTS - RECENT
        sessions: list[Any] = await self._connection.call("ZRANGEBYSCORE", SESSIONS, oldest, "+inf")
        names = [session.decode() for session in sessions]
        return await self._recover_all([name for name in names if name != self.name], remembered=REMEMBERED)

    async def _recover_all(self, sessions: Sequence[str], *, remembered: float) -> int:
        return sum([int(await self._connection.run(recover_call(session, remembered))) for session in sessions])

    def _begin(self) -> None:
        self._number += 1
        self.name = f"{self._router}.{self._number}"
        self._newborn, self._signed = True, -math.inf


def sign_call(session: str, lasts: float, *, begins: bool) -> Call:
    """Shows that a session lasts; answers the time, and 0 where it had ended."""
    return Call("session_sign", [SESSIONS, session_key(session)], [session, int(lasts * 1000), "1" if begins else ""])


def recover_call(session: str, remembered: float, most: int = REMEMBERED_AT_MOST) -> Call:
    """Puts back what is in flight under a session that ended; answers how many messages."""
    keys = [SESSIONS, session_key(session), ARRIVALS, *(in_flight_key(session, source) for source in SOURCES)]
    return Call("session_recover", keys, [session, remembered, most])
