"""The loop: every second each HardwareClass and each Fleet is brought to what is wanted. Any part may be repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

from controller.cluster import CLASSES, COST, FINALIZER, Cluster, ConflictError, Object
from controller.decide.endings import Ending, Left, deletion_cost, drain
from controller.decide.pools import Allotment, Seen, allot
from controller.fleets import Fleets
from controller.leader import Leader
from controller.routers import Routers
from controller.spec import ClassSpec, ClassStatus, age, longest_grace, seen, standings, status_of

PERIOD = 1.0
"""Seconds between two looks at a class."""

logger = logging.getLogger(__name__)


class Operator:
    """The HardwareClasses of one namespace, and what brings them to their routers' wishes."""

    def __init__(self, cluster: Cluster, routers: Routers, leader: Leader) -> None:
        self._cluster, self._routers, self._leader = cluster, routers, leader
        self._classes: dict[str, Object] = {}
        self._fleets: dict[str, Object] = {}
        self._rollouts = Fleets(cluster, routers)
        self._said: dict[str, ClassStatus] = {}
        self._chosen: set[str] = set()

    def notice(self, change: str | None, body: Object) -> None:
        """A HardwareClass is there, has changed, or is gone (`DELETED`)."""
        name = body["metadata"]["name"]
        if change == "DELETED":
            self._classes.pop(name, None)
            self._said.pop(name, None)
        else:
            self._classes[name] = body

    def notice_fleet(self, change: str | None, body: Object) -> None:
        """The same of a Fleet."""
        name = body["metadata"]["name"]
        if change == "DELETED":
            self._fleets.pop(name, None)
            self._rollouts.forget(name)
        else:
            self._fleets[name] = body

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            began = time.monotonic()
            try:
                if await self._leader.leads():
                    fleets = map(self._look_at_fleet, list(self._fleets.values()))
                    await asyncio.gather(*map(self._look, list(self._classes.values())), *fleets)
                else:
                    self._said.clear()
                    self._rollouts.forget()
            except httpx.HTTPError as error:
                logger.warning("cluster does not answer", extra={"error": str(error)})
            await asyncio.sleep(max(PERIOD - (time.monotonic() - began), 0.1))

    async def _look(self, body: Object) -> None:
        name = body["metadata"]["name"]
        try:
            spec = msgspec.convert(body["spec"], ClassSpec)
            await self._reconcile(name, body, spec)
        except ConflictError:
            pass  # the watch brings what changed
        except (msgspec.ValidationError, httpx.HTTPError) as error:
            logger.warning("class left unchanged", extra={"class": name, "error": str(error) or repr(error)})

    async def _look_at_fleet(self, body: Object) -> None:
        try:
            await self._rollouts.look(body, self._classes)
        except (msgspec.ValidationError, httpx.HTTPError) as error:
            name = body["metadata"]["name"]
            logger.warning("fleet left unchanged", extra={"fleet": name, "error": str(error) or repr(error)})

    async def _reconcile(self, name: str, body: Object, spec: ClassSpec) -> None:
        before = self._said.get(name) or msgspec.convert(body.get("status") or {}, ClassStatus)
        now, pods = time.time(), await self._cluster.pods(spec.selector)
        if (deleted := age(body, now)) is not None:
            wanted, reason = await self._drain(body, spec, pods, deleted)
        else:
            await self._adopt(body)
            wanted, reason = await self._wanted(spec, before)
        if wanted is None:
            return
        by_pool: Mapping[str, list[Any]] = defaultdict(list)
        for pod in pods:
            by_pool[pod["metadata"]["labels"].get("taxiway/pool", "")].append(pod)
        asked = await asyncio.gather(*(self._cluster.asked(pool.deployment) for pool in spec.pools))
        pools = [seen(pool, count, by_pool[pool.name], now) for pool, count in zip(spec.pools, asked, strict=True)]
        allotted = allot(wanted, pools, standings(spec, before), now, spec.rules)
        missing = {pool.name for pool, count in zip(spec.pools, asked, strict=True) if count is None}
        status = status_of(spec, wanted, reason, pools, allotted, missing)
        await self._remember(name, status)  # first: a successor judges pools as this one did
        await self._apply(body, spec, pools, allotted, reason)

    async def _wanted(self, spec: ClassSpec, before: ClassStatus) -> tuple[int | None, str]:
        """The count that was set by hand, that of the router, or the last one while no router knows."""
        if spec.replicas is not None:
            return spec.replicas, "set by hand"
        try:
            return await self._routers.wanted(spec.router, spec.hardware_class)
        except httpx.HTTPError as error:
            logger.warning("router does not know", extra={"class": spec.hardware_class, "error": str(error)})
            return before.wanted, before.reason

    async def _adopt(self, body: Object) -> None:
        """Take a new class over: it is not gone before its pods have drained."""
        finalizers = body["metadata"].get("finalizers", [])
        if FINALIZER not in finalizers:
            await self._cluster.finalize(body, [*finalizers, FINALIZER])

    async def _drain(self, body: Object, spec: ClassSpec, pods: list[Object], deleted: float) -> tuple[int | None, str]:
        """The count of a class that is being deleted; None once it may go."""
        waiting: bool | None = None
        with contextlib.suppress(httpx.HTTPError):
            waiting = await self._routers.waits(spec.router, spec.hardware_class)
        step = drain(Left(waiting, len(pods), longest_grace(pods)), deleted, spec.drain)
        if step == "serve":
            with contextlib.suppress(httpx.HTTPError):
                count, _ = await self._routers.wanted(spec.router, spec.hardware_class, starts=False)
                return count, "deleted: the jobs that wait for it are served"
            return None, ""
        if step == "gone":
            others = [one for one in body["metadata"].get("finalizers", []) if one != FINALIZER]
            await self._cluster.finalize(body, others)
            return None, ""
        return 0, "deleted: its pods end"

    async def _remember(self, name: str, status: ClassStatus) -> None:
        if status != self._said.get(name):
            await self._cluster.say_status(CLASSES, name, msgspec.to_builtins(status))
            self._said[name] = status

    async def _apply(self, body: Object, spec: ClassSpec, pools: list[Seen], allotted: Allotment, reason: str) -> None:
        for pool, found, replicas in zip(spec.pools, pools, allotted.replicas, strict=True):
            if replicas < found.asked and pool.deployment not in self._chosen:
                await self._choose(spec, pool.name)
                self._chosen.add(pool.deployment)
                continue  # the ReplicaSet controller reads the costs from a cache, which has them at the next look
            self._chosen.discard(pool.deployment)
            if replicas == found.asked:
                continue
            await self._cluster.scale(pool.deployment, replicas)
            message = f"{pool.deployment}: {found.asked} to {replicas} pods: {reason}"
            logger.info("scaled", extra={"class": spec.hardware_class, "said": message})
            await self._cluster.say_event(body, "Scaled", message[:1000])

    async def _choose(self, spec: ClassSpec, pool: str) -> None:
        """Say of each pod of the pool what would be lost with it, so that the right ones end."""
        try:
            endings = await self._routers.endings(spec.router)
        except httpx.HTTPError:
            return  # Kubernetes chooses
        for pod in await self._cluster.pods(f"{spec.selector},taxiway/pool={pool}"):
            name, cost = pod["metadata"]["name"], str(deletion_cost(endings.get(pod["metadata"]["name"], Ending())))
            if pod["metadata"].get("annotations", {}).get(COST, "0") != cost:
                await self._cluster.note_cost(name, cost)
