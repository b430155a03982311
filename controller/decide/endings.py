"""How a class's pods end: which of them when it shrinks, by what would be lost, and all of them when it is deleted."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

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


def least(pods: Mapping[str, Ending], ready: Set[str], count: int) -> list[str]:
    """The names of `count` pods that lose least. Of those that lose the same, one that is not ready ends first."""
    return sorted(pods, key=lambda name: (deletion_cost(pods[name]), name in ready, name))[:count]


Drain = Literal["serve", "end", "gone"]
"""What becomes of a class that is being deleted: its waiting jobs are served, its pods end, or it may go."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a class: whether jobs wait (None: no router knows), its pods, and the seconds that one takes."""

    waiting: bool | None
    pods: int
    grace: float = 0.0


def drain(left: Left, age: float, bound: float) -> Drain:
    """What to do `age` seconds after a class was deleted; it is gone after `bound` and a pod's grace at most."""
    if left.waiting is not False and age < bound:
        return "serve"
    return "end" if left.pods and age < bound + left.grace else "gone"
