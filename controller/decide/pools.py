"""How many pods each pool of a hardware class gets, and which pods are stopped first.

The first pool that has capacity gets the pods, and gets them back once it has capacity again. A pool is *trusted* until
one of its pods has found no node for `stock_out` seconds, then *out* for a while, then on *trial*: it gets few pods
more than run there, while other pools serve. It is trusted again once it serves all, `hold` seconds after the trial
began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import msgspec

from taxiway.backoff import Backoff

MOST_PAUSE = 16
"""A pool that is repeatedly out is tried after up to `MOST_PAUSE` · `retry` seconds."""

Phase = Literal["trusted", "out", "trial"]


class PoolRules(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Seconds without a node until a pool is out, until it is tried again, and until a pool on trial is trusted."""

    stock_out: float = 180.0
    retry: float = 300.0
    hold: float = 60.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool's requested and ready pods, the seconds for which a pod has lacked a node, and its maximum."""

    name: str
    asked: int
    ready: int
    short: float = 0.0
    most: int = 1000


class PoolTrust(msgspec.Struct, frozen=True):
    """A pool's phase since a time, and how often it was out since it was last trusted for long."""

    phase: Phase = "trusted"
    since: float = 0.0
    failures: int = 0

    def until(self, rules: PoolRules) -> float:
        """When a pool that is out is tried again."""
        return self.since + Backoff(rules.retry, rules.retry * MOST_PAUSE).pause(self.failures)


@dataclass(frozen=True, slots=True)
class Allotment:
    """The pods and the new state of each pool, in the order of the pools."""

    replicas: tuple[int, ...]
    trusts: tuple[PoolTrust, ...]


def allot(
    wanted: int, pools: Sequence[PoolState], trusts: Sequence[PoolTrust], now: float, rules: PoolRules
) -> Allotment:
    """Spread `wanted` pods over pools, first choice first; `now` is in seconds of the standings' clock.

    Ready pods count wherever they run, so a pool on trial takes over from the next only what it serves. If every pool
    is out, the first gets the missing pods, so that a cloud's autoscaler keeps trying.
    """
    left, replicas, judged = wanted, [], []
    for pool, trust in zip(pools, trusts, strict=True):
        judged.append(judge(pool, trust, left, now, rules))
        asked, served = _share(left, pool, judged[-1])
        replicas.append(asked)
        left -= served
    if left > 0 and all(one.phase == "out" for one in judged):
        replicas[0] = min(replicas[0] + left, pools[0].most)
    return Allotment(tuple(replicas), tuple(judged))


def judge(pool: PoolState, trust: PoolTrust, wanted: int, now: float, rules: PoolRules) -> PoolTrust:
    """A pool's new state, if `wanted` pods could use it."""
    if trust.phase == "out":
        return PoolTrust("trial", now, trust.failures) if now >= trust.until(rules) else trust
    if pool.short >= rules.stock_out:
        return PoolTrust("out", now, trust.failures + 1)
    if trust.phase == "trial" and 0 < min(wanted, pool.most) <= pool.ready:
        return PoolTrust("trusted", now, trust.failures) if now >= trust.since + rules.hold else trust
    if trust.failures and trust.phase == "trusted" and now >= trust.since + rules.retry * MOST_PAUSE:
        return PoolTrust("trusted", now)
    return trust


def _share(left: int, pool: PoolState, trust: PoolTrust) -> tuple[int, int]:
    """The pods that a pool gets, and how many of them the next pools need not have."""
    if trust.phase == "trusted":
        asked = min(left, pool.most)
        return asked, asked
    running = min(left, pool.ready, pool.most)
    if trust.phase == "out":
        return running, running
    return min(left, pool.most, pool.ready + max(pool.ready, 1)), running


RUNNING, WARM, HELD = 1000, 10, 1
"""Costs of stopping a pod: a running row is lost work and outweighs all else; a loaded variant took seconds to load; a
held job returns to its queue."""

MOST_WORKERS = 1_000_000


class PodLoss(msgspec.Struct, frozen=True):
    """What would be lost with a pod, as routers report it: running rows, loaded variants, jobs that it fetched."""

    running: int = 0
    warm: tuple[str, ...] = ()
    held: int = 0
    draining: bool = False


def deletion_cost(pod: PodLoss) -> int:
    """The value of the annotation `controller.kubernetes.io/pod-deletion-cost`. A pod that drains ends first."""
    if pod.draining:
        return -1
    return min(RUNNING * pod.running + WARM * len(pod.warm) + HELD * pod.held, MOST_WORKERS)


def cheapest_to_end(pods: Mapping[str, PodLoss], ready: Set[str], count: int) -> list[str]:
    """The names of the `count` pods that lose least; of equals, those that are not ready first."""
    return sorted(pods, key=lambda name: (deletion_cost(pods[name]), name in ready, name))[:count]
