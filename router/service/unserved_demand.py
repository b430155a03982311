"""Counts requests that were refused for lack of hardware: they are demand, though no job was made of them."""

from __future__ import annotations

from tasks.history import SLICE, UnservedTerms, slice_of, unserved_text
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import unserved_key


class UnservedDemand:
    """What one router refused for lack of hardware since it started, `total`, and what it still has to write of that.

    Refusals of a second count with the terms of the last of them that has the same model, tenant, service and labels,
    so that a flood of unlike requests takes little of the state store. What cannot be written is lost.
    """

    def __init__(self, calls: AsyncConnection, keep: int) -> None:
        self.total = 0
        self._calls, self._keep = calls, keep
        self._counted: dict[tuple[int | str, ...], tuple[UnservedTerms, int]] = {}

    def add(self, now: float, asked: UnservedTerms) -> None:
        """Count a refusal at `now` seconds of the store's clock."""
        kind = (slice_of(now), asked.model, asked.tenant, asked.terms.service, asked.terms.locality)
        self._counted[kind] = asked, self._counted.get(kind, (asked, 0))[1] + 1
        self.total += 1

    async def write(self) -> None:
        """Add the counts to those of all routers. Raises `BrokerUnavailableError`."""
        counted, self._counted = self._counted, {}
        begins = {int(begin) for begin, *_ in counted}
        counts = [
            ("HINCRBY", unserved_key(str(begin)), unserved_text(asked), times)
            for (begin, *_), (asked, times) in counted.items()
        ]
        if counts:
            until = (("EXPIREAT", unserved_key(str(begin)), begin + SLICE + self._keep) for begin in begins)
            await self._calls.calls(*counts, *until)
