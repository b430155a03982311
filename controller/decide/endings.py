"""Which of a class's pods end first when it shrinks: Kubernetes deletes those with the lowest cost."""

from __future__ import annotations

from dataclasses import dataclass

RUNNING, WARM, HELD = 1000, 10, 1
"""Costs: a row that runs is lost work and outweighs all else; a variant takes seconds to load; a held job returns."""

MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Ending:
    """What would be lost with a pod: rows on its device, variants that it has loaded, jobs that it fetched."""

    running: int = 0
    warm: int = 0
    held: int = 0
    draining: bool = False


def deletion_cost(pod: Ending) -> int:
    """The value of the annotation `controller.kubernetes.io/pod-deletion-cost`. A pod that drains ends first."""
    if pod.draining:
        return -1
    return min(RUNNING * pod.running + WARM * pod.warm + HELD * pod.held, MOST)
