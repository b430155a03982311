"""`python -m controller`: the operator of one namespace, until SIGTERM.

In a pod it uses the pod's service account; elsewhere `KUBECONFIG` and `TAXIWAY_NAMESPACE`. `TAXIWAY_SCALING_KEY` is its
API key at the routers, and `TAXIWAY_LEASE` names the Lease by which several operators elect one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from typing import Any

import kopf

from controller.operator import CLASSES, GROUP, VERSION, Cluster, Operator, OperatorLease, Routers


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    kopf.configure(log_format=kopf.LogFormat.JSON)
    namespace = os.environ.get("TAXIWAY_NAMESPACE") or _connection().default_namespace or "default"
    registry = kopf.OperatorRegistry()
    running: dict[str, Any] = {}

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return _connection()

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.scanning.disabled = True  # the definitions exist, and nothing else is watched
        settings.posting.enabled = False
        cluster, routers = Cluster(_connection, namespace), Routers(os.environ.get("TAXIWAY_SCALING_KEY", ""))
        operator = Operator(cluster, routers, _leader(cluster))
        running.update(operator=operator, task=asyncio.create_task(operator.run()), open=(cluster, routers))

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        running["task"].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running["task"]
        for one in running["open"]:
            await one.close()

    @kopf.on.probe(registry=registry)
    def working(**_: Any) -> bool:
        return not running["task"].done()

    @kopf.on.event(GROUP, VERSION, CLASSES, registry=registry)
    def observe(type: str | None, body: kopf.Body, **_: Any) -> None:  # the names are kopf's
        running["operator"].observe(type, dict(body))

    kopf.run(
        registry=registry,
        standalone=True,
        namespace=namespace,
        liveness_endpoint=os.environ.get("TAXIWAY_LIVENESS") or None,
    )


def _connection() -> kopf.ConnectionInfo:
    """The API server and the account there, by the pod's mounted files or a kubeconfig."""
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise SystemExit("no Kubernetes cluster: expected a pod with a service account, or KUBECONFIG")
    return found


def _leader(cluster: Cluster) -> OperatorLease:
    name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    return OperatorLease(cluster, os.environ.get("TAXIWAY_LEASE", "taxiway-controller"), name)


if __name__ == "__main__":
    main()
