"""The reconciliation loop: each second it reconciles every HardwareClass with what its routers report.

Every step may be repeated. `Cluster` is its namespace of a Kubernetes cluster, in which a Lease elects one operator.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import aiohttp
import kopf
import msgspec

from controller.decide.pools import Allotment, PodLoss, PoolState, allot, cheapest_to_end, deletion_cost
from controller.spec import HASH, ClassSpec, ClassStatus, Object, active, pool_state, ready, status_of, trusts

GROUP, VERSION, CLASSES = "taxiway.dev", "v1alpha1", "hardwareclasses"

_APIS = {
    "pods": "/api/v1",
    "events": "/api/v1",
    "deployments": "/apis/apps/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    CLASSES: f"/apis/{GROUP}/{VERSION}",
}
"""Paths of the APIs that have the kinds of objects."""

COST = "controller.kubernetes.io/pod-deletion-cost"
"""Of two pods, the one with less ends first when their ReplicaSet shrinks: in Kubernetes 1.22 and later."""

UNANSWERED = (aiohttp.ClientError, TimeoutError)
"""What aiohttp raises for a request that failed."""


class ConflictError(aiohttp.ClientError):
    """Another process changed the object first."""


class Cluster:
    """The API of one namespace. Methods raise `UNANSWERED` if the server does not answer or refuses.

    `login` reads how to connect to the server, at each request, because tokens are replaced from time to time.
    """

    def __init__(self, login: Callable[[], kopf.ConnectionInfo], namespace: str) -> None:
        self._login, self._namespace = login, namespace
        connection = login()
        self._server = connection.server.rstrip("/")
        connector = aiohttp.TCPConnector(ssl=connection.as_ssl_context())
        self._http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(10), trust_env=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def objects(self, kind: str, selector: str) -> list[Object]:
        """The objects of a kind, such as `pods`, with these labels."""
        found: list[Object] = (await self._ask("GET", self._path(kind), params={"labelSelector": selector}))["items"]
        return found

    async def end_pod(self, name: str) -> None:
        """Delete a pod, with its grace period, if it still exists."""
        try:
            await self._ask("DELETE", self._path("pods", name))
        except aiohttp.ClientResponseError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def asked(self, deployment: str) -> int | None:
        """The replicas of a Deployment; None if there is none."""
        found = await self._find(self._path("deployments", deployment, "scale"))
        return None if found is None else found["spec"].get("replicas", 0)

    async def scale(self, deployment: str, replicas: int) -> None:
        """Set the replicas of a Deployment."""
        await self._ask("PATCH", self._path("deployments", deployment, "scale"), {"spec": {"replicas": replicas}})

    async def note_cost(self, pod: str, cost: int) -> None:
        """Set which pod ends first when its ReplicaSet shrinks."""
        path = self._path("pods", pod)
        await self._ask("PATCH", path, {"metadata": {"annotations": {COST: str(cost)}}})

    async def write_status(self, name: str, status: Object) -> None:
        """Replace fields of the status of a HardwareClass."""
        await self._ask("PATCH", self._path(CLASSES, name, "status"), {"status": status})

    async def add_event(self, about: Object, reason: str, message: str) -> None:
        """Add an event to an object."""
        now, place = _now(), about["metadata"]
        event = {
            "metadata": {"generateName": f"{place['name']}-", "namespace": place["namespace"]},
            "involvedObject": {
                "apiVersion": about["apiVersion"], "kind": about["kind"], "name": place["name"],
                "namespace": place["namespace"], "uid": place["uid"],
            },
            "type": "Normal", "reason": reason, "message": message, "source": {"component": "taxiway-controller"},
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        }  # fmt: skip
        await self._ask("POST", self._path("events"), event)

    async def lease(self, name: str) -> Object | None:
        """A Lease; None if there is none."""
        return await self._find(self._path("leases", name))

    async def write_lease(self, name: str, holder: str, seconds: int, before: Object | None) -> None:
        """Take or renew a Lease.

        Raises:
            ConflictError: it has changed since it was `before`.
        """
        spec = {"holderIdentity": holder, "leaseDurationSeconds": seconds, "renewTime": _now("microseconds")}
        if before is None:
            await self._ask("POST", self._path("leases"), {"metadata": {"name": name}, "spec": spec})
        else:
            version = before["metadata"]["resourceVersion"]
            body = {"metadata": {"name": name, "resourceVersion": version}, "spec": spec}
            await self._ask("PUT", self._path("leases", name), body)

    def _path(self, kind: str, *names: str) -> str:
        return "/".join((_APIS[kind], "namespaces", self._namespace, kind, *names))

    async def _find(self, path: str) -> Object | None:
        try:
            return await self._ask("GET", path)
        except aiohttp.ClientResponseError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _ask(
        self, method: str, path: str, body: Object | None = None, params: Mapping[str, str] | None = None
    ) -> Object:
        headers = self._login().as_http_headers()
        if body is not None:
            headers["Content-Type"] = f"application/{'merge-patch+' if method == 'PATCH' else ''}json"
        content = None if body is None else json.dumps(body)
        where = self._server + path
        async with self._http.request(method, where, data=content, headers=headers, params=params) as answer:
            if answer.status == HTTPStatus.CONFLICT:
                raise ConflictError(path)
            answer.raise_for_status()
            found: Object = json.loads(await answer.read())
            return found


def _now(precision: str = "seconds") -> str:
    return datetime.now(UTC).isoformat(timespec=precision).replace("+00:00", "Z")


DURATION = 15
"""Seconds for which a Lease is valid after its renewal."""

RENEWAL = 5.0
"""Seconds between two renewals."""


class OperatorLease:
    """Takes and keeps one Lease. Expiry is measured from when a renewal was seen, not by the holder's clock."""

    def __init__(self, cluster: Cluster, lease: str, name: str) -> None:
        self._cluster, self._lease, self._name = cluster, lease, name
        self._renewed = -RENEWAL
        self._held = False
        self._seen: tuple[Object | None, float] = (None, 0.0)

    async def leads(self) -> bool:
        """Take or keep the Lease; returns whether it is ours."""
        now = time.monotonic()
        if self._held and now < self._renewed + RENEWAL:
            return True
        found = await self._cluster.lease(self._lease)
        spec = None if found is None else found["spec"]
        if spec != self._seen[0]:
            self._seen = (spec, now)
        self._held = False
        if spec is not None and spec["holderIdentity"] != self._name and now < self._seen[1] + DURATION:
            return False
        try:
            await self._cluster.write_lease(self._lease, self._name, DURATION, found)
        except ConflictError:
            return False
        self._held, self._renewed = True, now
        return True


class Routers:
    """The routers' HTTP API. Methods raise `UNANSWERED` while no router knows."""

    def __init__(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(5), trust_env=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def wanted(self, router: str, hardware_class: str) -> tuple[int, str]:
        """The devices that a class should have, and why; it declares that they are started on demand."""
        target = await self._ask("POST", f"{router}/v1/scaling/{hardware_class}/starts")
        return target["replicas"], target["reason"]

    async def endings(self, router: str) -> Mapping[str, PodLoss]:
        """What would be lost with each pod, by the pod's name."""
        devices = (await self._ask("GET", f"{router}/v2/fleet"))["devices"]
        return {one["worker"].rpartition("@")[2]: msgspec.convert(one, PodLoss) for one in devices}

    async def _ask(self, method: str, url: str) -> Mapping[str, Any]:
        async with self._http.request(method, url) as answer:
            answer.raise_for_status()
            found: Mapping[str, Any] = json.loads(await answer.read())
            return found


RECONCILE_EVERY = 1.0
"""Seconds between two reconciliations of a class."""

logger = logging.getLogger(__name__)


class Operator:
    """Reconciles the HardwareClasses of one namespace with what their routers want."""

    def __init__(self, cluster: Cluster, routers: Routers, leader: OperatorLease) -> None:
        self._cluster, self._routers, self._leader = cluster, routers, leader
        self._classes: dict[str, Object] = {}
        self._published: dict[str, ClassStatus] = {}
        self._leads = False

    def observe(self, change: str | None, body: Object) -> None:
        """Record that a HardwareClass exists, has changed, or is gone (`DELETED`)."""
        name = body["metadata"]["name"]
        if change == "DELETED":
            self._classes.pop(name, None)
            self._published.pop(name, None)
        else:
            self._classes[name] = body

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as loops:
            for step in (self._lead, self._reconcile_classes):
                loops.create_task(_repeat(step))

    async def _lead(self) -> None:
        try:
            self._leads = await self._leader.leads()
        except UNANSWERED:
            self._leads = False
            raise
        if not self._leads:
            self._published.clear()

    async def _reconcile_classes(self) -> None:
        if self._leads:
            await asyncio.gather(*map(self._try_class, list(self._classes.values())))

    async def _try_class(self, body: Object) -> None:
        name = body["metadata"]["name"]
        try:
            spec = msgspec.convert(body["spec"], ClassSpec)
            await self._reconcile(name, body, spec)
        except (msgspec.ValidationError, *UNANSWERED) as error:
            logger.warning("class left unchanged", extra={"class": name, "error": str(error) or repr(error)})

    async def _reconcile(self, name: str, body: Object, spec: ClassSpec) -> None:
        before = self._published.get(name) or msgspec.convert(body.get("status") or {}, ClassStatus)
        now, pods = time.time(), await self._cluster.objects("pods", spec.selector)
        wanted, reason = await self._wanted(spec, before)
        if wanted is None:
            return
        by_pool: Mapping[str, list[Any]] = defaultdict(list)
        for pod in pods:
            by_pool[pod["metadata"]["labels"].get("taxiway/pool", "")].append(pod)
        asked = await asyncio.gather(*(self._cluster.asked(pool.deployment) for pool in spec.pools))
        pools = [
            pool_state(pool, count, by_pool[pool.name], now) for pool, count in zip(spec.pools, asked, strict=True)
        ]
        allotted = allot(wanted, pools, trusts(spec, before), now, spec)
        missing = {pool.name for pool, count in zip(spec.pools, asked, strict=True) if count is None}
        status = status_of(spec, wanted, reason, pools, allotted, missing)
        await self._publish(name, status)  # first, so that a successor judges pools as this operator did
        await self._apply(body, spec, pools, allotted, reason, by_pool)

    async def _wanted(self, spec: ClassSpec, before: ClassStatus) -> tuple[int | None, str]:
        """The count that was set by hand, the router's, or the last one while no router knows, and its reason."""
        if spec.replicas is not None:
            return spec.replicas, "set by hand"
        try:
            return await self._routers.wanted(spec.router, spec.hardware_class)
        except UNANSWERED as error:
            logger.warning("router does not know", extra={"class": spec.hardware_class, "error": str(error)})
            return before.wanted, before.reason

    async def _publish(self, name: str, status: ClassStatus) -> None:
        if status != self._published.get(name):
            await self._cluster.write_status(name, msgspec.to_builtins(status))
            self._published[name] = status

    async def _apply(
        self,
        body: Object,
        spec: ClassSpec,
        pools: Sequence[PoolState],
        allotted: Allotment,
        reason: str,
        pods: Mapping[str, Sequence[Object]],
    ) -> None:
        for pool, found, replicas in zip(spec.pools, pools, allotted.replicas, strict=True):
            if replicas == found.asked:
                continue
            if 0 < replicas < found.asked:
                await self._end(spec, active(pods[pool.name]), replicas)
            await self._cluster.scale(pool.deployment, replicas)
            message = f"{pool.deployment}: {found.asked} to {replicas} pods: {reason}"
            logger.info("scaled", extra={"class": spec.hardware_class, "change": message})
            await self._cluster.add_event(body, "Scaled", message[:1000])

    async def _end(self, spec: ClassSpec, pods: Sequence[Object], left: int) -> None:
        """Delete the pods that lose least, before their Deployment shrinks and its ReplicaSet chooses by itself.

        A pod with which the ReplicaSet replaces one of these meanwhile is not ready, so that pod is deleted then. In
        the middle of a rollout Kubernetes decides which of two ReplicaSets shrinks, so it gets the pods' deletion
        costs.
        """
        try:
            endings = await self._routers.endings(spec.router)
        except UNANSWERED:
            return  # Kubernetes chooses
        lost = {pod["metadata"]["name"]: endings.get(pod["metadata"]["name"], PodLoss()) for pod in pods}
        if len({pod["metadata"]["labels"].get(HASH) for pod in pods}) > 1:
            await asyncio.gather(*(self._cluster.note_cost(name, deletion_cost(one)) for name, one in lost.items()))
        else:
            ending = cheapest_to_end(lost, set(ready(pods)), len(pods) - left)
            await asyncio.gather(*map(self._cluster.end_pod, ending))


async def _repeat(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        began = time.monotonic()
        try:
            await step()
        except UNANSWERED as error:
            logger.warning("cluster does not answer", extra={"error": str(error)})
        await asyncio.sleep(max(RECONCILE_EVERY - (time.monotonic() - began), 0.1))
