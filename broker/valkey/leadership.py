"""The election of the leader: one router at a time, by a lease in the state store and a unique fencing token."""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf

from broker.valkey.lua import Call
from taxiway.contract.keys import LEAD, LEADS, PLAN, TUNER, TUNERS
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey.aio import Connection
from taxiway.valkey.resp import fleet_errors


def tune_call(name: str, lease: float) -> Call:
    """Takes or keeps the only tuner's lease; 0 gives it up. Answers with its fencing token, empty if another has it."""
    return Call("fleet/lead", [TUNER, TUNERS], [name, int(lease * 1000)])


def plan_call(before: bytes, plan: bytes) -> Call:
    """Replaces the stored plan if it is still `before`, empty if there was none; answers 1 if so, else 0."""
    return Call("fleet/plan", [PLAN], [before, plan])


class Leadership:
    """This router's part in the election.

    Moves and draws pass the token; the store refuses one that is not the leader's.
    """

    def __init__(self, url: str, name: str, lease: float) -> None:
        self._connection = Connection(url)
        self._name, self._lease = name, lease
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
        asked = time.monotonic()
        self._token = await self._lead(self._lease)
        self._until = asked + self._lease
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
        with fleet_errors("state store"):
            token: bytes = await self._connection.run(
                Call("fleet/lead", [LEAD, LEADS], [self._name, int(lease * 1000)])
            )
        return token.decode()
