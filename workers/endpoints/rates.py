"""The rate limits of an endpoint: what its worker may send now, and what it learns of them from answers."""

from __future__ import annotations

import asyncio
import math
import time

from tasks.endpoints import Rate
from tasks.heartbeat import Allowed
from workers.decide.rates import Bucket, Rates, begin, learned
from workers.endpoints.asking import Exchange
from workers.endpoints.faults import EndpointError, FaultKind

LONGEST = 0.5
"""Seconds that a row waits in its slot for its turn; for longer its job returns to the queue, where it may be moved."""

_SMOOTHING = 0.1


class RateGate:
    """What may be sent. For one event loop; any thread may read `room`, `wait` and `allowed`."""

    def __init__(self, rate: Rate) -> None:
        self._size = 1.0
        self.state(rate)

    def state(self, rate: Rate) -> None:
        """Go by what queues.yaml says; what was learned is forgotten."""
        self._stated = rate
        self._rates = begin(rate.requests_per_minute, rate.tokens_per_minute, time.monotonic())

    def follow(self, rate: Rate) -> None:
        """Go by what queues.yaml says now, if that has changed."""
        if rate != self._stated:
            self.state(rate)

    @property
    def room(self) -> float:
        """How many rows of the usual size may be sent now; infinite without limits."""
        return math.floor(room) if math.isfinite(room := self._rates.room(self._size, time.monotonic())) else room

    @property
    def wait(self) -> float:
        """Seconds until a row of the usual size may be sent."""
        return self._rates.wait(self._size, time.monotonic())

    @property
    def allowed(self) -> Allowed | None:
        """What heartbeats tell of it; None without limits."""
        rates, now = self._rates, time.monotonic()
        if rates == Rates():
            return None
        (requests, left), (tokens, tokens_left) = _told(rates.requests, now), _told(rates.tokens, now)
        return Allowed(requests=requests, requests_left=left, tokens=tokens, tokens_left=tokens_left)

    async def enter(self, size: int) -> None:
        """Wait until a row of at most `size` tokens may be sent, and count it.

        Raises:
            EndpointError: that takes too long; it says how long.
        """
        while (wait := self._rates.wait(size, time.monotonic())) > 0:
            if wait > LONGEST:
                raise EndpointError(FaultKind.BUSY, f"rate limit of the endpoint: next request in {wait:.3g} s", wait)
            await asyncio.sleep(wait)
        self._rates = self._rates.taken(size, time.monotonic())

    def leave(self, exchange: Exchange, size: int) -> None:
        """Count what a row that was let in with `size` really took, and learn what its answer told."""
        used, now = exchange.tokens, time.monotonic()
        took = used.input + used.output
        self._size += _SMOOTHING * (max(took, 1) - self._size) if exchange.ran else 0.0
        unsent = 0.0 if exchange.sent else -1.0
        self._rates = learned(self._rates.taken(took - size, now, requests=unsent), exchange.headers, now)


def _told(bucket: Bucket | None, now: float) -> tuple[float | None, float]:
    return (None, 0.0) if bucket is None else (round(bucket.rate, 6), round(bucket.left(now), 3))
