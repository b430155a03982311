"""How long a device stays busy with rows of ended jobs, and which waiting jobs a draining worker cannot finish. Pure.

A batch of ONNX, torch or JAX cannot be interrupted. When its jobs are cancelled or expire, the fleet's work counters
drop them although the device is still busy, so its heartbeat reports the occupied time.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

FEWEST = 1.0
"""Minimum remaining seconds assumed for a batch at its predicted end: one heartbeat, until the next check."""


@dataclass(frozen=True, slots=True)
class Occupation:
    """A running batch that cannot be interrupted: its start, on any clock, and its predicted seconds."""

    began: float
    predicted: float

    def ends_in(self, now: float) -> float:
        """Seconds until it ends; an overdue batch is assumed to need as long again as it is late."""
        return abs(self.predicted - (now - self.began))

    def longer_than(self, seconds: float, now: float) -> bool:
        """Whether it takes longer than `seconds`, by prediction or by now."""
        return max(self.predicted, now - self.began) > seconds

    def left(self, now: float, unwanted: float) -> float:
        """Remaining seconds attributed to the share `unwanted` of its rows.

        An overdue batch is assumed to need as long again as it is late.
        """
        return unwanted * max(abs(self.predicted - (now - self.began)), FEWEST) if unwanted else 0.0


Job = TypeVar("Job", bound=Hashable)

Stint = tuple[Collection[Job], float]
"""A waiting batch: the jobs with rows in it, and its run time in seconds."""


def unfinished(stints: Iterable[Stint[Job]], left: float) -> set[Job]:
    """The jobs that do not end within `left` seconds if the batches run one after another in this order.

    A batch is skipped if it would end too late, or if all its jobs have rows in a skipped batch: later batches get its
    time.
    """
    late: set[Job] = set()
    spent = 0.0
    for jobs, seconds in stints:
        if late.issuperset(jobs):
            continue
        if spent + seconds > left:
            late.update(jobs)
        else:
            spent += seconds
    return late
