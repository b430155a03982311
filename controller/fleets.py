"""Fleets: their conditions, staged rollouts of changes, and the ConfigMaps that pods still read."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from controller.cluster import FLEETS, UNANSWERED, Cluster, Object
from controller.decide.rollout import RolloutStep, advance
from controller.routers import Routers
from controller.spec import (
    ClassStatus,
    FleetSpec,
    FleetStatus,
    Sets,
    changed_pods,
    conditions,
    earlier_template,
    figures_of,
    harm_of,
    part_of,
    queues_in,
    sets_of,
    since,
    stage_of,
)

UNUSED_CONFIG_KEPT = 600.0
"""Seconds for which a ConfigMap that no pod template mounts is kept: helm creates it before the Deployments."""

logger = logging.getLogger(__name__)


class Fleets:
    """The Fleets of a namespace."""

    def __init__(self, cluster: Cluster, routers: Routers) -> None:
        self._cluster, self._routers = cluster, routers
        self._published: dict[str, FleetStatus] = {}

    def forget(self, name: str | None = None) -> None:
        """Forget the published status of a Fleet that is gone, or of all, because another operator leads."""
        if name is None:
            self._published.clear()
        else:
            self._published.pop(name, None)

    async def reconcile(self, body: Object, classes: Mapping[str, Object]) -> None:
        """Advance a Fleet by one step. `classes` are the HardwareClasses of the namespace by name."""
        name, spec = body["metadata"]["name"], msgspec.convert(body["spec"], FleetSpec)
        before = self._published.get(name) or msgspec.convert(body.get("status") or {}, FleetStatus)
        found = {one["metadata"]["name"]: one for one in await self._cluster.objects("deployments", spec.selector)}
        parts = {part: found[part] for part in spec.parts & found.keys()}
        all_sets = await self._cluster.objects("replicasets", spec.selector)
        sets = {part: sets_of(one, all_sets) for part, one in parts.items()}
        devices = await self._devices(spec)
        step, status = await self._decide(spec, before, parts, sets, devices)
        known = {one: _status_of(classes.get(one)) for one in spec.classes}
        routers = found.get(spec.routers, {}).get("status", {}).get("readyReplicas", 0)
        stated = list(conditions(spec, step.rollout, known, routers, answers=devices is not None))
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        status = msgspec.structs.replace(
            status, stage=stage_of(spec, step.rollout), conditions=since(stated, before.conditions, now)
        )
        await self._publish(body, before, status)  # first, so that a successor continues from here
        await self._apply(parts, sets, step)
        await self._tidy(body, spec, [*found.values(), *all_sets])

    async def _devices(self, spec: FleetSpec) -> Sequence[Object] | None:
        try:
            return await self._routers.devices(spec.router)
        except UNANSWERED:
            return None

    async def _decide(
        self,
        spec: FleetSpec,
        before: FleetStatus,
        parts: Mapping[str, Object],
        sets: Mapping[str, Sets],
        devices: Sequence[Object] | None,
    ) -> tuple[RolloutStep, FleetStatus]:
        """The next step. While no router reports its devices, new pods are judged by whether they become ready."""
        rollout, limits, harm = before.rollout, spec.rollout, ""
        if rollout.phase in ("rolling", "watching") and devices is not None:
            pods = await self._cluster.objects("pods", spec.selector)
            harm = harm_of(before.baseline, figures_of(devices, changed_pods(rollout, sets, pods)), limits)
        seen = {name: part_of(one, sets[name]) for name, one in parts.items()}
        step = advance(rollout, spec.rollout.stages, seen, harm, round(time.time(), 1), limits)
        begins = rollout.phase == "idle" and step.rollout.phase != "idle"
        baseline = figures_of(devices or ()) if begins else before.baseline
        return step, FleetStatus(rollout=step.rollout, baseline=baseline)

    async def _publish(self, body: Object, before: FleetStatus, status: FleetStatus) -> None:
        name = body["metadata"]["name"]
        if status == self._published.get(name):
            return
        await self._cluster.write_status(FLEETS, name, msgspec.to_builtins(status))
        self._published[name] = status
        if status.rollout.phase != before.rollout.phase or status.rollout.stage != before.rollout.stage:
            logger.info("rollout", extra={"fleet": name, "phase": status.rollout.phase, "stage": status.stage})
            reason = {"idle": "RolloutEnded", "returning": "RollingBack"}.get(status.rollout.phase, "Rollout")
            await self._cluster.add_event(body, reason, f"{status.rollout.phase}: {status.stage}"[:1000])

    async def _apply(self, parts: Mapping[str, Object], sets: Mapping[str, Sets], step: RolloutStep) -> None:
        for name, deployment in parts.items():
            await self._cluster.disown(deployment)  # if an operator died over it
            if name not in step.open and not deployment["spec"].get("paused", False):
                await self._cluster.pause(name, paused=True)
        for name in step.restore:
            template = earlier_template(sets[name], (step.rollout.before or {})[name])
            if template is None:
                logger.warning("earlier pods are unknown", extra={"deployment": name})
            else:
                await self._cluster.restore(name, template)
        for name in step.open:
            if parts[name]["spec"].get("paused", False):
                await self._cluster.pause(name, paused=False)

    async def _tidy(self, body: Object, spec: FleetSpec, holders: Sequence[Object]) -> None:
        """Own the ConfigMaps of the fleet's queues.yaml, and delete those that nothing mounts any longer."""
        used = {spec.queues}.union(*(queues_in(one["spec"]["template"]) for one in holders))
        for one in await self._cluster.objects("configmaps", f"{spec.selector},app.kubernetes.io/component=queues"):
            place = one["metadata"]
            if not place.get("ownerReferences"):
                await self._cluster.own_queues(place["name"], body)
            elif place["name"] not in used and _age(place) > UNUSED_CONFIG_KEPT:
                await self._cluster.delete("configmaps", place["name"])


def _status_of(body: Object | None) -> ClassStatus | None:
    return None if body is None else msgspec.convert(body.get("status") or {}, ClassStatus)


def _age(place: Mapping[str, Any]) -> float:
    return time.time() - datetime.fromisoformat(place["creationTimestamp"].replace("Z", "+00:00")).timestamp()
