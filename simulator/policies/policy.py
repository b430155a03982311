"""The seam between the engine and whoever decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from simulator.pool import Order, Pool
from simulator.workload import Job

REFUSED = -1
"""What `Policy.choose` gives for a job that it turns away."""


class Policy(Protocol):
    """Decides where a job runs. One instance lives for one run."""

    @property
    def order(self) -> Order:
        """How the class queues are served."""

    @property
    def clairvoyant(self) -> bool:
        """Whether the jobs' figures are from their true outputs."""

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """The index of a pool that runs the job, or `REFUSED`. At least one pool runs it."""

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """A job was answered, or dropped past its deadline, so many seconds after its arrival."""


class ByLevel:
    """The traits of an ordinary policy: the product's queue, predictions, and nothing learned."""

    order: Order = "level"
    clairvoyant = False

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""


class ByDeadline(ByLevel):
    """The same with queues that are served by deadline."""

    order: Order = "deadline"


def able(job: Job, pools: Sequence[Pool]) -> list[Pool]:
    """The pools that can run the job."""
    return [pool for pool in pools if pool.runs(job)]
