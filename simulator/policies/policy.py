"""The interface between the engine and its policies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from simulator.pool import Pool
from simulator.queue import Order
from simulator.traces.workload import Job

REFUSED = -1
"""Returned by `Policy.choose` for a job that it refuses."""


@dataclass(frozen=True, slots=True)
class Held:
    """Returned by `Policy.choose` for a job that is not bound to a class yet; devices are kept for it in `pool`."""

    pool: int


@dataclass(frozen=True, slots=True)
class Shift:
    """A waiting job that moves to another pool's queue: from that of `source`, or from holding.

    Without a `target` a held job is refused.
    """

    job: Job
    source: int | None
    target: int | None


class Policy(Protocol):
    """Decides where a job runs. One instance serves one run."""

    @property
    def order(self) -> Order:
        """How the class queues are served."""

    @property
    def clairvoyant(self) -> bool:
        """Whether the jobs' figures are based on their true outputs."""

    @property
    def beat(self) -> float:
        """Seconds between two calls of `look`; infinite for a policy that decides once."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """The index of a pool that runs the job, `REFUSED`, or `Held`. At least one pool can run it."""

    def look(self, pools: Sequence[Pool], now: float) -> Iterable[Shift]:
        """Changes for waiting jobs; each is applied before the next is requested."""

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """A job was answered, or dropped past its deadline, this many seconds after its arrival."""


class ByLevel:
    """Defaults of a policy: the product's queue, predicted outputs, one decision per job, and nothing learned."""

    order: Order = "level"
    clairvoyant = False
    beat = math.inf

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        return iter(())

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""


class ByDeadline(ByLevel):
    """The same with queues served by deadline."""

    order: Order = "deadline"


def able(job: Job, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that can run the job."""
    return [pool for pool in pools if pool.runs(job)]
