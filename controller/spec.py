"""The `spec` and `status` of HardwareClasses, read from Kubernetes objects and written to them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Any

import msgspec

from controller.decide.pools import Allotment, PoolRules, PoolState, PoolTrust

Object = Mapping[str, Any]

HASH = "pod-template-hash"
"""The label that separates the pods of a ReplicaSet from those of the Deployment's others."""


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of nodes: the Deployment whose pods run there, and the most that it may have."""

    name: str
    deployment: str
    most: int = 1000


class ClassSpec(PoolRules, frozen=True, kw_only=True, rename="camel"):
    """`spec` of a HardwareClass."""

    hardware_class: str = msgspec.field(name="class")
    router: str
    selector: str
    pools: tuple[PoolSpec, ...]
    replicas: int | None = None
    """Sets the count by hand, in place of the router."""


class PoolStatus(PoolTrust, frozen=True, kw_only=True):
    """A pool in the status: its pods, its state, and whether its Deployment is missing."""

    name: str
    missing: bool = False
    asked: int = 0
    ready: int = 0


class ClassStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`status` of a HardwareClass: the operator's only memory of it."""

    wanted: int | None = None
    reason: str = ""
    replicas: int = 0
    selector: str = ""
    pools: tuple[PoolStatus, ...] = ()


def trusts(spec: ClassSpec, status: ClassStatus) -> list[PoolTrust]:
    """The last state of each pool."""
    known: dict[str, PoolTrust] = {one.name: one for one in status.pools}
    return [known.get(pool.name, PoolTrust()) for pool in spec.pools]


def pool_state(pool: PoolSpec, asked: int | None, pods: Sequence[Mapping[str, Any]], now: float) -> PoolState:
    """A pool by its Deployment's replicas, None without a Deployment, and its pods."""
    alive = active(pods)
    waits = [
        now - datetime.fromisoformat(found["lastTransitionTime"]).timestamp()
        for pod in alive
        if (found := _condition(pod, "PodScheduled")).get("reason") == "Unschedulable"
    ]
    return PoolState(pool.name, asked or 0, len(ready(alive)), max([0.0, *waits]), 0 if asked is None else pool.most)


def active(pods: Sequence[Object]) -> list[Object]:
    """The pods that a ReplicaSet counts."""
    ended = ("Succeeded", "Failed")
    return [
        pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") not in ended
    ]


def ready(pods: Sequence[Object]) -> list[str]:
    """The names of the ready pods."""
    return [pod["metadata"]["name"] for pod in pods if _condition(pod, "Ready").get("status") == "True"]


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((one for one in pod["status"].get("conditions", ()) if one["type"] == kind), {})


def status_of(
    spec: ClassSpec, wanted: int, reason: str, pools: Sequence[PoolState], allotted: Allotment, missing: Set[str]
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
                phase=trust.phase,
                since=round(trust.since, 1),
                failures=trust.failures,
            )
            for one, asked, trust in zip(pools, allotted.replicas, allotted.trusts, strict=True)
        ),
    )
