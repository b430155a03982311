"""The seam between the engine and whoever decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from simulator.pool import Pool
from simulator.queue import Order
from simulator.traces.workload import Job

REFUSED = -1
"""What `Policy.choose` gives for a job that it turns away."""


@dataclass(frozen=True, slots=True)
class Held:
    """What `Policy.choose` gives for a job that it binds to no class yet; devices are kept for it in `pool`."""

    pool: int


@dataclass(frozen=True, slots=True)
class Shift:
    """A waiting job that goes to another pool's queue: from that of `source`, or from those that are held.

    Without a `target` a held job is turned away.
    """

    job: Job
    source: int | None
    target: int | None


class Policy(Protocol):
    """Decides where a job runs. One instance lives for one run."""

    @property
    def order(self) -> Order:
        """How the class queues are served."""

    @property
    def clairvoyant(self) -> bool:
        """Whether the jobs' figures are from their true outputs."""

    @property
    def beat(self) -> float:
        """Seconds between two looks; infinite for a policy that decides once."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """The index of a pool that runs the job, `REFUSED`, or that the policy holds it. At least one pool runs it."""

    def look(self, pools: Sequence[Pool], now: float) -> Iterable[Shift]:
        """What changes for jobs that wait; each is done before the next is asked for."""

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """A job was answered, or dropped past its deadline, so many seconds after its arrival."""


class ByLevel:
    """The traits of an ordinary policy: the product's queue, predictions, one decision a job, and nothing learned."""

    order: Order = "level"
    clairvoyant = False
    beat = math.inf

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        return iter(())

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""


class ByDeadline(ByLevel):
    """The same with queues that are served by deadline."""

    order: Order = "deadline"


def able(job: Job, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that can run the job."""
    return [pool for pool in pools if pool.runs(job)]
