"""Which running jobs yield to more urgent ones that would be late, and why.

All slots of an endpoint may be in use by generations that take long and are not urgent, or a device by such a callable.
A delay makes a job's lateness as likely as is the share of its slack that the delay takes. So a job that waits is worth
that share of the US dollars that it costs when it is late, if it is in time with a slot now. A yield costs the time to
repeat what is not saved, and that share of the yielding job's own lateness. So a job is worth more the closer its
deadline, and the one that costs least yields.

A job that was cut `most` times yields no more, so that bulk work is never starved by yields. One job yields for one
that waits; a slot that becomes free by itself before a job must start is left to it if no yield is worth it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router.decide.classify import level_of
from tasks.topology import LATE_USD_PER_HOUR, Topology
from taxiway.contract.keys import LEVELS

SWITCH = 0.25
"""Seconds from a request to yield until another job runs in the slot: llama.cpp frees one 0.09 s after its connection
is closed (SmolLM2, one thread), and a message and a fetch come before and after."""

LET_START = 0.05
"""Seconds that a job has to be taken by a worker with a free slot, and between two looks at those that were not."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A job that waits for a slot of its class."""

    job: str
    left: float
    """Seconds until it is due."""
    run: float
    """Seconds from its start to its answer, at most."""
    penalty: float
    """US dollars that it costs when it is late."""

    @property
    def start(self) -> float:
        """Seconds until it must start, to be in time."""
        return self.left - self.run

    def loss(self, wait: float) -> float:
        """US dollars that it is expected to cost to wait so many seconds, and not for a yield."""
        return self.penalty * min(max(wait - SWITCH, 0.0) / self.start, 1.0) if self.start > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Occupant:
    """A running job that can yield its slot."""

    job: str
    token: str
    left: float
    """Seconds until its answer, at most, if it goes on."""
    redo: float
    """Seconds of its next run that repeat what was done."""
    due: float
    """Seconds until it is due; infinite without a deadline."""
    penalty: float
    """US dollars that it costs when it is late."""
    price: float
    """US dollars of a second of its device, whose other rows wait while a prompt is read."""
    cuts: int
    """How often it was cut."""

    def loss(self, waiter: Waiter) -> float:
        """US dollars that a yield to this job is expected to cost."""
        slack, delay = self.due - self.left, self.redo + SWITCH + waiter.run
        risk = min(delay / slack, 1.0) if slack > 0 else 1.0
        return self.redo * self.price + risk * self.penalty


@dataclass(frozen=True, slots=True)
class Yielding:
    """A running job is to yield to one that waits."""

    occupant: Occupant
    waiter: Waiter
    reason: str


def preempt(waiters: Sequence[Waiter], occupants: Sequence[Occupant], *, most: int) -> list[Yielding]:
    """The yields of one class now, most valuable waiting job first. No job is in two of them.

    Args:
        waiters: jobs that wait though no slot is free, in any order.
        occupants: the running jobs that can yield, in any order; those that cannot count as running on and on.
        most: cuts of one job after which it does not yield.
    """
    running = sorted(occupants, key=lambda one: (one.left, one.job))
    yields: list[Yielding] = []
    for waiter in sorted(waiters, key=lambda one: (-one.penalty, one.left, one.job)):
        wait = running[0].left if running else math.inf
        able = [one for one in running if one.cuts < most and one.left > SWITCH]
        cheapest = min(able, key=lambda one: (one.loss(waiter), one.job), default=None)
        if waiter.start >= SWITCH and cheapest is not None and cheapest.loss(waiter) < waiter.loss(wait):
            running.remove(cheapest)
            yields.append(Yielding(cheapest, waiter, _reason(cheapest, waiter, wait)))
        elif running and wait <= waiter.start:
            del running[0]  # its slot is free in time
    return yields


def late_rates(topology: Topology) -> tuple[float, ...]:
    """US dollars an hour that it costs when all jobs of a level are late; queues.yaml may say it of services."""
    said = topology.plan.late_usd_per_hour
    rates = [LATE_USD_PER_HOUR[min(level, len(LATE_USD_PER_HOUR) - 1)] for level in range(LEVELS)]
    named: dict[int, float] = {}
    for name, service in topology.service.items():
        level = level_of(service.deadline, service.priority)
        named[level] = max(named.get(level, 0.0), said.get(name, 0.0))
    return tuple(named.get(level) or rate for level, rate in enumerate(rates))


def penalty(rate: float, seconds: float) -> float:
    """US dollars that a job of so many seconds costs when it is late: its share of an hour at this rate."""
    return rate / 3600 * max(seconds, 0.0) if math.isfinite(seconds) else math.inf


def _reason(occupant: Occupant, waiter: Waiter, wait: float) -> str:
    value, loss = f"{waiter.penalty:.2g} USD if it is late", f"{occupant.loss(waiter):.2g} USD"
    waits = f"would wait {wait:.3g} s, must start within {waiter.start:.3g} s"
    return (
        f"yields to {waiter.job}, which {waits} and costs {value}; this costs {loss} ({occupant.redo:.3g} s to repeat)"
    )
