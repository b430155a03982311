"""The `spec` and `status` of HardwareClasses and Fleets, read from Kubernetes objects and written to them. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from controller.decide.pools import Allotment, Phase, PoolRules, PoolState, PoolTrust
from controller.decide.rollout import DeployedPart, JobFigures, Rollout, RolloutLimits, Stage, judge

Object = Mapping[str, Any]

_USUAL = PoolRules()

HASH = "pod-template-hash"
"""The label that separates the pods of a ReplicaSet from those of the Deployment's others."""

NODE_REPORT_WITHIN = 30.0
"""Seconds after a pod's grace period within which its node reports that it is gone."""


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of nodes: the Deployment whose pods run there, and the most that it may have."""

    name: str
    deployment: str
    most: int = 1000


class ClassSpec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`spec` of a HardwareClass."""

    hardware_class: str = msgspec.field(name="class")
    router: str
    selector: str
    pools: tuple[PoolSpec, ...]
    replicas: int | None = None
    """Sets the count by hand, in place of the router."""
    # Seconds
    stock_out: float = _USUAL.stock_out
    retry: float = _USUAL.retry
    hold: float = _USUAL.hold
    drain: float = 120.0
    """For which its waiting jobs are served after its deletion, before its pods are stopped."""

    @property
    def rules(self) -> PoolRules:
        """The times of its pools."""
        return PoolRules(self.stock_out, self.retry, self.hold)


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A pool in the status: its pods, its state, and whether its Deployment is missing."""

    name: str
    missing: bool = False
    asked: int = 0
    ready: int = 0
    phase: Phase = "trusted"
    since: float = 0.0
    failures: int = 0


class ClassStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`status` of a HardwareClass: the operator's only memory of it."""

    wanted: int | None = None
    reason: str = ""
    replicas: int = 0
    selector: str = ""
    pools: tuple[PoolStatus, ...] = ()


def trusts(spec: ClassSpec, status: ClassStatus) -> list[PoolTrust]:
    """The last state of each pool."""
    known = {one.name: PoolTrust(one.phase, one.since, one.failures) for one in status.pools}
    return [known.get(pool.name, PoolTrust()) for pool in spec.pools]


def pool_state(pool: PoolSpec, asked: int | None, pods: Sequence[Mapping[str, Any]], now: float) -> PoolState:
    """A pool by its Deployment's replicas, None without a Deployment, and its pods."""
    alive = active(pods)
    waits = [
        now - _seconds(found["lastTransitionTime"])
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


def age(body: Mapping[str, Any], now: float) -> float | None:
    """Seconds since an object was deleted; None if it was not."""
    deleted = body["metadata"].get("deletionTimestamp")
    return None if deleted is None else now - _seconds(deleted)


def longest_grace(pods: Sequence[Mapping[str, Any]]) -> float:
    """Seconds after which the last of these pods is gone and its node has reported it."""
    graces: list[float] = [pod["spec"].get("terminationGracePeriodSeconds", 30.0) for pod in pods]
    return NODE_REPORT_WITHIN + max([0.0, *graces])


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((one for one in pod["status"].get("conditions", ()) if one["type"] == kind), {})


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


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


_REVISION = "deployment.kubernetes.io/revision"


@dataclass(frozen=True, slots=True)
class RolloutSpec(RolloutLimits):
    """The stages of a change, the canary first, and the limits of its pods."""

    stages: tuple[Stage, ...] = ()


class FleetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`spec` of a Fleet: the routers' address and Deployment, and the labels of all its objects.

    `classes` names its HardwareClasses, and `queues` the ConfigMap with its queues.yaml.
    """

    router: str
    routers: str
    selector: str
    classes: tuple[str, ...] = ()
    queues: str = ""
    rollout: RolloutSpec = RolloutSpec()

    @property
    def parts(self) -> frozenset[str]:
        """All Deployments of its stages."""
        return frozenset(name for stage in self.rollout.stages for name in stage.parts)


class Condition(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A condition as in Kubernetes: `status` is True or False."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: str = ""


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`status` of a Fleet: the operator's only memory of a rollout, with each class's figures before it."""

    rollout: Rollout = Rollout()
    baseline: dict[str, JobFigures] = {}
    stage: str = ""
    conditions: tuple[Condition, ...] = ()


def digest(template: Object) -> str:
    """The digest of a pod template, without the label that only a ReplicaSet's template has."""
    labels = {name: value for name, value in template["metadata"].get("labels", {}).items() if name != HASH}
    annotations = template["metadata"].get("annotations", {})
    text = json.dumps([labels, annotations, template["spec"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


Sets = dict[str, Object]
"""A Deployment's ReplicaSets by the digests of their templates, the newest last."""


def sets_of(deployment: Object, sets: Sequence[Object]) -> Sets:
    """The Deployment's ReplicaSets among `sets`."""
    uid = deployment["metadata"]["uid"]
    owned = [one for one in sets if any(ref["uid"] == uid for ref in one["metadata"].get("ownerReferences", []))]
    owned.sort(key=lambda one: int(one["metadata"].get("annotations", {}).get(_REVISION, 0)))
    return {digest(one["spec"]["template"]): one for one in owned}


def part_of(deployment: Object, sets: Sets) -> DeployedPart:
    """A Deployment as a part of a rollout.

    Kubernetes makes the ReplicaSet of an earlier template the newest as soon as a Deployment has that template again,
    paused or not. So the template that runs is that of most pods; revisions decide only if there are none.
    """
    wants = digest(deployment["spec"]["template"])
    own = sets[wants]["status"] if wants in sets else {}
    return DeployedPart(
        wants=wants,
        runs=max(reversed(sets), key=lambda one: sets[one]["status"].get("replicas", 0), default=""),
        asked=deployment["spec"].get("replicas", 1),
        updated=own.get("replicas", 0),
        ready=own.get("availableReplicas", 0),
        old=sum(one["status"].get("replicas", 0) for template, one in sets.items() if template != wants),
    )


def earlier_template(sets: Sets, wanted: str) -> Object | None:
    """The pod template of that digest, as a Deployment has it; None if its ReplicaSet is gone."""
    if wanted not in sets:
        return None
    found = sets[wanted]["spec"]["template"]
    labels = {name: value for name, value in found["metadata"].get("labels", {}).items() if name != HASH}
    return {**found, "metadata": {**found["metadata"], "labels": labels}}


def changed_pods(rollout: Rollout, sets: Mapping[str, Sets], pods: Sequence[Object]) -> set[str]:
    """The names of pods that have the new template of their Deployment."""
    before, target = rollout.before or {}, rollout.target or {}
    hashes = {
        sets[name][template]["metadata"]["labels"][HASH]
        for name, template in target.items()
        if template != before.get(name) and template in sets.get(name, {})
    }
    return {pod["metadata"]["name"] for pod in pods if pod["metadata"].get("labels", {}).get(HASH) in hashes}


def figures_of(devices: Sequence[Object], pods: set[str] | None = None) -> dict[str, JobFigures]:
    """The figures of devices since their start, by class: of those in `pods`, or of all."""
    found: dict[str, JobFigures] = {}
    for device in devices:
        if pods is not None and device["worker"].rpartition("@")[2] not in pods:
            continue
        for done in device.get("done", {}).values():
            name = device["hardware_class"]
            found[name] = found.get(name, JobFigures()).plus(_figures(done))
    return found


def _figures(done: Object) -> JobFigures:
    outcomes = done.get("outcomes", {})
    failed = outcomes.get("failed", 0) + outcomes.get("dead", 0)
    run = done.get("latency", {}).get("run") or (0.0,)
    return JobFigures(outcomes.get("succeeded", 0) + failed, failed, run[-1])


def harm_of(baseline: Mapping[str, JobFigures], after: Mapping[str, JobFigures], limits: RolloutLimits) -> str:
    """Why the changed pods are worse than before; empty if they are not."""
    for name, figures in sorted(after.items()):
        if why := judge(baseline.get(name, JobFigures()), figures, limits):
            return f"{name}: {why}"
    return ""


def conditions(
    spec: FleetSpec, rollout: Rollout, classes: Mapping[str, ClassStatus | None], routers: int, *, answers: bool
) -> Iterator[Condition]:
    """The conditions of a fleet with `routers` ready routers: Ready, Degraded and Progressing.

    `answers` says whether a router answered.
    """
    yield _stated("Ready", "Serving", _not_ready(classes, routers), negative=True)
    yield _stated("Degraded", "AsDeclared", _degraded(spec, rollout, classes, answers=answers))
    yield _stated("Progressing", "Steady", _progress(spec, rollout, classes))


def _stated(kind: str, usual: str, found: tuple[str, str], *, negative: bool = False) -> Condition:
    status = bool(found[0]) != negative
    return Condition(type=kind, status=str(status), reason=found[0] or usual, message=found[1])


def _not_ready(classes: Mapping[str, ClassStatus | None], routers: int) -> tuple[str, str]:
    if not routers:
        return "NoRouter", "no router is ready"
    wanted = {name: one.replicas for name, one in classes.items() if one is not None and one.wanted}
    idle = bool(wanted) and not any(wanted.values())
    return ("NoWorker", f"no pod is ready of {', '.join(wanted)}") if idle else ("", "")


def _degraded(
    spec: FleetSpec, rollout: Rollout, classes: Mapping[str, ClassStatus | None], *, answers: bool
) -> tuple[str, str]:
    if gone := [name for name, one in classes.items() if one is None or any(pool.missing for pool in one.pools)]:
        return "Missing", f"its HardwareClass or a Deployment is missing: {', '.join(gone)}"
    if not answers:
        return "RouterUnreachable", f"{spec.router} does not answer: classes keep their pods"
    pools = [
        f"{n}/{p.name}" for n, one in classes.items() if one is not None for p in one.pools if p.phase != "trusted"
    ]
    if pools:
        return "PoolOut", f"without capacity: {', '.join(pools)}"
    return ("RolledBack", rollout.why) if rollout.why.startswith("rolled back") else ("", "")


def _progress(spec: FleetSpec, rollout: Rollout, classes: Mapping[str, ClassStatus | None]) -> tuple[str, str]:
    if rollout.phase != "idle":
        return rollout.phase.capitalize(), stage_of(spec, rollout)
    short = [name for name, one in classes.items() if one is not None and one.replicas < (one.wanted or 0)]
    return ("Scaling", f"fewer pods are ready than wanted of {', '.join(short)}") if short else ("", "")


def stage_of(spec: FleetSpec, rollout: Rollout) -> str:
    """The rollout's stage in words."""
    if rollout.phase == "idle":
        return rollout.why
    if rollout.phase == "returning":
        return f"back to the earlier pods: {rollout.why}"
    if rollout.phase == "pending":
        return "Deployments have changed"
    parts = (
        ", ".join(spec.rollout.stages[rollout.stage].parts) if rollout.stage < len(spec.rollout.stages) else "nothing"
    )
    return f"stage {rollout.stage + 1} of {len(spec.rollout.stages)}: {parts}"


def since(conditions_now: Sequence[Condition], before: Sequence[Condition], now: str) -> tuple[Condition, ...]:
    """The conditions with the times at which their status last changed."""
    times = {(one.type, one.status): one.last_transition_time for one in before}
    return tuple(
        msgspec.structs.replace(one, last_transition_time=times.get((one.type, one.status)) or now)
        for one in conditions_now
    )


def queues_in(template: Object) -> set[str]:
    """The ConfigMaps that a pod template mounts."""
    volumes = template["spec"].get("volumes") or []
    return {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
