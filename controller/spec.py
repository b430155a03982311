"""A HardwareClass as the cluster has it: what is asked of the operator, and what it has said. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Any

import msgspec

from controller.decide.pools import Allotment, Rules, Seen, Standing

_USUAL = Rules()

GRACE = 30.0
"""Seconds beyond a pod's grace period in which its node reports that it is gone."""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of nodes: the Deployment whose pods run there, and the most that it may have."""

    name: str
    deployment: str
    most: int = 1000


class ClassSpec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`spec` of a HardwareClass. With `replicas` somebody sets the count by hand, in place of the router.

    Once it is deleted, jobs that wait for it are served for `drain` seconds at most before its pods end.
    """

    hardware_class: str = msgspec.field(name="class")
    router: str
    selector: str
    pools: tuple[Pool, ...]
    replicas: int | None = None
    stock_out: float = _USUAL.stock_out
    retry: float = _USUAL.retry
    hold: float = _USUAL.hold
    drain: float = 120.0

    @property
    def rules(self) -> Rules:
        """The times of its pools."""
        return Rules(self.stock_out, self.retry, self.hold)


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A pool in the status: its pods, what is thought of it, and whether its Deployment is missing."""

    name: str
    missing: bool = False
    asked: int = 0
    ready: int = 0
    phase: str = "trusted"
    since: float = 0.0
    failures: int = 0


class ClassStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`status` of a HardwareClass: all that the operator remembers."""

    wanted: int | None = None
    reason: str = ""
    replicas: int = 0
    selector: str = ""
    pools: tuple[PoolStatus, ...] = ()


def standings(spec: ClassSpec, status: ClassStatus) -> list[Standing]:
    """What was thought of each pool."""
    known = {one.name: one for one in status.pools}
    return [msgspec.convert(_standing(known.get(pool.name)), Standing) for pool in spec.pools]


def _standing(pool: PoolStatus | None) -> Mapping[str, Any]:
    return {} if pool is None else {"phase": pool.phase, "since": pool.since, "failures": pool.failures}


def seen(pool: Pool, asked: int | None, pods: Sequence[Mapping[str, Any]], now: float) -> Seen:
    """A pool by its Deployment's replicas, None without a Deployment, and its pods."""
    alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    ready = sum(_condition(pod, "Ready").get("status") == "True" for pod in alive)
    waits = [
        now - _seconds(found["lastTransitionTime"])
        for pod in alive
        if (found := _condition(pod, "PodScheduled")).get("reason") == "Unschedulable"
    ]
    return Seen(pool.name, asked or 0, ready, max([0.0, *waits]), 0 if asked is None else pool.most)


def age(body: Mapping[str, Any], now: float) -> float | None:
    """Seconds since an object was deleted; None if it is not."""
    deleted = body["metadata"].get("deletionTimestamp")
    return None if deleted is None else now - _seconds(deleted)


def longest_grace(pods: Sequence[Mapping[str, Any]]) -> float:
    """Seconds after which the last of these pods is gone, with some for its node to say so."""
    graces: list[float] = [pod["spec"].get("terminationGracePeriodSeconds", 30.0) for pod in pods]
    return GRACE + max([0.0, *graces])


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((one for one in pod["status"].get("conditions", ()) if one["type"] == kind), {})


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def status_of(
    spec: ClassSpec, wanted: int, reason: str, pools: Sequence[Seen], allotted: Allotment, missing: Set[str]
) -> ClassStatus:
    """The status after a decision."""
    return ClassStatus(
        wanted=wanted,
        reason=reason,
        replicas=sum(one.ready for one in pools),
        selector=spec.selector,
        pools=tuple(
            PoolStatus(
                name=one.name,
                missing=one.name in missing,
                asked=asked,
                ready=one.ready,
                phase=standing.phase,
                since=round(standing.since, 1),
                failures=standing.failures,
            )
            for one, asked, standing in zip(pools, allotted.replicas, allotted.standings, strict=True)
        ),
    )
