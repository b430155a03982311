"""Keeps receipts in the state store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from broker.port import StoredReceipts
from tasks.queues.receipts import Chain, PlacementReceipt
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import RECEIPTS

UNWRITTEN = 10_000
"""Receipts that wait for a state store that does not answer; beyond that the oldest are dropped, which leaves a gap."""


class AuditLog:
    """One router's receipts. Each is kept here until the state store has it, so that an outage leaves no gap."""

    def __init__(self, calls: AsyncConnection, chain: Chain, most: int) -> None:
        self._calls, self._chain, self._most = calls, chain, most
        self._unwritten: dict[bytes, None] = {}

    def add(self, receipts: Iterable[PlacementReceipt]) -> None:
        """Sign receipts, to be written with the next ones, or by the next `write`."""
        for receipt in receipts:
            self._unwritten[self._chain.seal(receipt)] = None
        while len(self._unwritten) > UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]

    def sealed(self, receipts: Iterable[PlacementReceipt]) -> StoredReceipts | None:
        """What is to be written together with the jobs of these receipts; None if there is nothing."""
        self.add(receipts)
        return StoredReceipts(list(self._unwritten), self._most) if self._unwritten else None

    def written(self, lines: Sequence[bytes]) -> None:
        """The state store has these lines."""
        for line in lines:
            self._unwritten.pop(line, None)

    async def write(self, receipts: Iterable[PlacementReceipt] = ()) -> None:
        """Write receipts that no job is written with, and those that wait. Raises `BrokerUnavailableError`."""
        if waiting := self.sealed(receipts):
            bound = ("MAXLEN", "~", waiting.most)
            await self._calls.calls(*(("XADD", RECEIPTS, *bound, "*", "line", line) for line in waiting.lines))
            self.written(waiting.lines)
