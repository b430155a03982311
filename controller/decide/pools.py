"""How many pods each pool of a hardware class gets, and how they end: which of them first, and all with their class.

The first pool that has capacity gets the pods, and gets them back once it has capacity again. A pool is *trusted* until
pods of it found no node for `stock_out` seconds, then *out* for a while, then on *trial*: asked for few pods more than
run there, while others serve. It is trusted again once it serves all, `hold` seconds after the trial began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

DOUBLINGS = 4
"""A pool that is out again and again is tried after up to two to the power of this times `retry` seconds."""

Phase = Literal["trusted", "out", "trial"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Seconds: without a node until a pool is out, until it is tried again, and until a pool on trial is trusted."""

    stock_out: float = 180.0
    retry: float = 300.0
    hold: float = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A pool as it is: pods asked for, ready ones, seconds that one has lacked a node, and the most it may have."""

    name: str
    asked: int
    ready: int
    short: float = 0.0
    most: int = 1000


@dataclass(frozen=True, slots=True)
class Standing:
    """What is thought of a pool since a time, and how often it was out since it was last long trusted."""

    phase: Phase = "trusted"
    since: float = 0.0
    failures: int = 0

    def until(self, rules: Rules) -> float:
        """When a pool that is out is tried again."""
        return self.since + rules.retry * 2.0 ** min(self.failures - 1, DOUBLINGS)


@dataclass(frozen=True, slots=True)
class Allotment:
    """Pods of each pool, and what is now thought of it, in the order of the pools."""

    replicas: tuple[int, ...]
    standings: tuple[Standing, ...]


def allot(wanted: int, pools: Sequence[Seen], standings: Sequence[Standing], now: float, rules: Rules) -> Allotment:
    """Spread `wanted` pods over pools, first choice first; `now` is in seconds of the standings' clock.

    Pods that are ready count wherever they run, so a pool on trial takes over from the next only what it serves.
    If every pool is out, the first is asked for what is missing: a cloud's autoscaler goes on trying.
    """
    left, replicas, judged = wanted, [], []
    for seen, standing in zip(pools, standings, strict=True):
        judged.append(judge(seen, standing, left, now, rules))
        asked, served = _share(left, seen, judged[-1])
        replicas.append(asked)
        left -= served
    if left > 0 and all(one.phase == "out" for one in judged):
        replicas[0] = min(replicas[0] + left, pools[0].most)
    return Allotment(tuple(replicas), tuple(judged))


def judge(seen: Seen, standing: Standing, wanted: int, now: float, rules: Rules) -> Standing:
    """What is thought of a pool now, if `wanted` pods could use it."""
    if standing.phase == "out":
        return Standing("trial", now, standing.failures) if now >= standing.until(rules) else standing
    if seen.short >= rules.stock_out:
        return Standing("out", now, standing.failures + 1)
    if standing.phase == "trial" and 0 < min(wanted, seen.most) <= seen.ready:
        return Standing("trusted", now, standing.failures) if now >= standing.since + rules.hold else standing
    if standing.failures and standing.phase == "trusted" and now >= standing.since + rules.retry * 2.0**DOUBLINGS:
        return Standing("trusted", now)
    return standing


def _share(left: int, seen: Seen, standing: Standing) -> tuple[int, int]:
    """Pods that a pool is asked for, and how many of them the next pools need not have."""
    if standing.phase == "trusted":
        asked = min(left, seen.most)
        return asked, asked
    running = min(left, seen.ready, seen.most)
    if standing.phase == "out":
        return running, running
    return min(left, seen.most, seen.ready + max(seen.ready, 1)), running


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
