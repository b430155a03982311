"""The fleet's processes: what they report of themselves and follow, and the leases that one at a time has.

The leading router, the tuner at work and the process that has a worker's name are one at a time. A holder that is
silent loses its lease, by the server's clock. Where its writes must not come after those of the next holder, they carry
its fencing token, which the store checks. A batch has its owner in its own record, and a router's session is never
taken up again once it ended: neither is a lease of this kind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple

from broker.valkey import Call
from tasks.models.folder import Watched
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import CATALOGUES, CATALOGUES_SEEN, DEVICES, HEARTBEATS, LEAD, LEADS, PLAN
from taxiway.errors import BrokerUnavailableError


def heartbeat_call(worker: str, facts: bytes) -> Call:
    """Publishes a device's facts under the server's time; without facts, removes the device."""
    return Call("fleet/heartbeat", [DEVICES, HEARTBEATS], [worker, facts])


def plan_call(before: bytes, plan: bytes) -> Call:
    """Replaces the stored plan if it is still `before`, empty if there was none; answers 1 if so, else 0."""
    return Call("fleet/replace", [PLAN], [before, plan])


def watch_call(arguments: Sequence[str | bytes]) -> Call:
    """Reports what a process serves, as a `Reporter` has it; `watch_answer` reads the answer."""
    return Call("fleet/watch", [CATALOGUES, CATALOGUES_SEEN], arguments)


def watch_answer(answer: Sequence[Any]) -> Watched:
    """Whether the store has this process's report, and its time."""
    known, now = answer
    return Watched(bool(known), float(now))


class LeaseHolder(NamedTuple):
    """Who has a lease now."""

    token: str  # the holder's name, or its fencing token; empty if it is free
    left: float  # seconds that another's lease lasts; 0 if it is the caller's

    @property
    def own(self) -> str:
        """The token if the caller has the lease, else empty."""
        return "" if self.left else self.token


def lease_call(keys: Sequence[str], name: str, seconds: float) -> Call:
    """Takes or prolongs the lease `keys[0]`; 0 seconds give it up. `keys[1]` counts its holders, for fencing tokens."""
    return Call("fleet/lease", keys, [name, round(seconds * 1000)])


def lease_answer(answer: Sequence[Any]) -> LeaseHolder:
    """Who has the lease."""
    return LeaseHolder(answer[0].decode(), answer[1] / 1000)


class Leadership:
    """This router's part in the election. Moves and draws pass the token; the store refuses any but the leader's.

    `keys` are of the token and of the number of its changes: there is an election for each pair.
    """

    def __init__(self, url: str, name: str, lease: float, keys: tuple[str, str] = (LEAD, LEADS)) -> None:
        self._connection = AsyncConnection(url, server="state store")
        self._name, self._lease, self._keys = name, lease, keys
        self._token, self._until = "", -inf

    @property
    def token(self) -> str:
        """The fencing token of this router's lead; empty if another router may lead, by this host's clock."""
        return self._token if time.monotonic() < self._until else ""

    async def campaign(self) -> str:
        """Take or keep the lead for another lease; returns the fencing token, empty while another router leads.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        began = time.monotonic()
        self._token = await self._lead(self._lease)
        self._until = began + self._lease
        return self._token

    async def resign(self) -> None:
        """Let another router lead at once."""
        self._token = ""
        with suppress(BrokerUnavailableError):  # otherwise the lease expires
            await self._lead(0.0)

    async def close(self) -> None:
        """Resign, and disconnect."""
        await self.resign()
        self._connection.close()

    async def _lead(self, lease: float) -> str:
        return lease_answer(await self._connection.run(lease_call(self._keys, self._name, lease))).own
