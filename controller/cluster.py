"""The operator's access to its namespace of a Kubernetes cluster, and the Lease that elects one operator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import aiohttp
import kopf

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

Object = Mapping[str, Any]

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
        self,
        method: str,
        path: str,
        body: Object | None = None,
        params: Mapping[str, str] | None = None,
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
