"""How an endpoint's slots are used: each row's share of its time, and the utilisation. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from workers.endpoints.asking import Exchange


@dataclass(frozen=True, slots=True)
class Seat:
    """A row's slot since a time: with how much of the endpoint each running row had until then."""

    since: float
    shares: float


def pieces_of(exchange: Exchange, now: float) -> tuple[float | None, float | None]:
    """Seconds until the first part of an answer came, and for each token after it until `now`; None where unknown."""
    if not exchange.first:
        return None, None
    first = exchange.first - exchange.sent
    more = exchange.tokens.output - 1
    return first, (now - exchange.first) / more if more > 0 else None


class SlotUsage:
    """Rows on an endpoint of so many slots. Times are seconds on one clock.

    n rows that run together have a n-th of the endpoint each, so that the shares of all rows add up to its busy time.
    """

    def __init__(self, slots: int) -> None:
        self.running = 0
        self._slots = slots
        self._at = 0.0
        self._shares = 0.0
        self._used = 0.0

    def enter(self, now: float) -> Seat:
        """A row begins."""
        self._advance(now)
        self.running += 1
        return Seat(now, self._shares)

    def leave(self, seat: Seat, now: float) -> tuple[float, float]:
        """A row ends: the seconds that it ran, and its share of the endpoint's time in seconds."""
        self._advance(now)
        self.running -= 1
        return now - seat.since, self._shares - seat.shares

    def resize(self, slots: int, now: float) -> None:
        """The endpoint has so many slots from now on."""
        self._advance(now)
        self._slots = slots

    def used(self, now: float) -> float:
        """Seconds for which slots were used, a slot counting by its part of all."""
        return self._used + self.running / self._slots * max(now - self._at, 0.0)

    def _advance(self, now: float) -> None:
        self._used = self.used(now)
        if self.running:
            self._shares += (now - self._at) / self.running
        self._at = now
