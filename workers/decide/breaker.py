"""Whether an endpoint gets work: a circuit breaker. Pure.

It opens when the endpoint cannot be reached, or after `FAILURES` failures in a row of requests that reached it. While
it is open, probes go out at growing intervals. The first that succeeds lets one request at a time through, and the
first answer closes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FAILURES = 3
"""Failed requests in a row that open the breaker, while the endpoint answers probes."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 30.0
"""Seconds until the first probe of an open breaker, doubled each time it opens again, and at most."""


class State(StrEnum):
    """What may pass: all, nothing, or one request at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """The state, and why it is open. A new one is open until the first probe.

    `failures` and `openings` count what happened since the last answer; `probe_at` is when the next probe is due while
    it is open, on the caller's clock.
    """

    state: State = State.OPEN
    reason: str = "not probed yet"
    probe_at: float = 0.0
    failures: int = 0
    openings: int = 0

    def slots(self, slots: int) -> int:
        """How many requests may run, of so many slots."""
        return {State.CLOSED: slots, State.OPEN: 0, State.HALF_OPEN: 1}[self.state]

    def answered(self) -> Breaker:
        """After a request that was answered. One that began before the breaker opened does not close it."""
        return self if self.state is State.OPEN else Breaker(State.CLOSED, "")

    def failed(self, reason: str, now: float) -> Breaker:
        """After a request that reached the endpoint, and failed there."""
        failures = self.failures + 1
        if self.state is State.CLOSED and failures < FAILURES:
            return Breaker(State.CLOSED, "", failures=failures)
        return self.unreached(reason, now)

    def unreached(self, reason: str, now: float) -> Breaker:
        """After a probe that failed, or a request that could not be sent."""
        if self.state is State.OPEN and now < self.probe_at:  # what was in flight tells nothing new
            return self
        pause = min(FIRST_PAUSE * 2.0 ** min(self.openings, 20), LONGEST_PAUSE)
        return Breaker(State.OPEN, reason, now + pause, self.failures, self.openings + 1)

    def probed(self) -> Breaker:
        """After a probe that succeeded."""
        if self.state is not State.OPEN:
            return self
        return Breaker(State.HALF_OPEN if self.openings else State.CLOSED, "", 0.0, self.failures, self.openings)
