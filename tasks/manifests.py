"""Kubernetes manifests of a fleet, from its queues.yaml: `python -m tasks.manifests | kubectl apply -f -`.

Routers are a Deployment behind a Service; each hardware class is a Deployment whose replicas KEDA sets to what a router
says (`GET /v1/scaling/{class}`), and an endpoint has one worker for each of its replicas. Broker, state store and the
secret `taxiway` are there already: docs/kubernetes.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from tasks.endpoints import Endpoint
from tasks.topology import HardwareClass, Limits, TopologyError, load_topology

PORT = 8080
"""The routers' HTTP port."""

SPARE = 60
"""Seconds that a pod has beyond its worker's grace."""

POLLING = 5
"""Seconds between two questions of KEDA."""

Manifest = dict[str, Any]

_ACCELERATORS = {"cuda": "nvidia.com/gpu", "tpu": "google.com/tpu"}
_PRODUCERS = {"name": "taxiway", "key": "TAXIWAY_PRODUCER_SECRET", "optional": True}
_TOKEN = {"parameter": "token", "name": "taxiway", "key": "SCALING_KEY"}
_ON_SPOT = [{"key": "taxiway/spot", "operator": "Exists", "effect": "NoSchedule"}]
_HARDENED = {
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Cluster:
    """Where the manifests go, where the images come from, and the seconds in which a worker that is to stop is gone."""

    namespace: str = "taxiway"
    images: str = "taxiway"
    tag: str = "latest"
    routers: int = 2
    grace: float = Limits().grace


def manifests(hardware: dict[str, HardwareClass], queues: str, cluster: Cluster) -> Iterator[Manifest]:
    """Every manifest in the order to apply them; `queues` is the text of queues.yaml, which pods mount."""
    yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}}
    yield _named("v1", "ConfigMap", "queues", cluster, data={"queues.yaml": queues})
    yield from _priorities()
    yield from _router(cluster, [name for name, one in hardware.items() if one.endpoint is None])
    yield _named("keda.sh/v1alpha1", "TriggerAuthentication", "router", cluster, spec={"secretTargetRef": [_TOKEN]})
    for name, one in hardware.items():
        yield from _workers(name, one, cluster)


def written(documents: Iterable[Manifest]) -> str:
    """The manifests as one YAML text."""
    text: str = yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)
    return text


class _Plain(yaml.SafeDumper):
    """Writes what is used twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _priorities() -> Iterator[Manifest]:
    """Routers go last when a node is full; workers on spot capacity go first."""
    for name, value, what in (
        ("taxiway-router", 1_000_000, "Routers of taxiway: without them nothing is placed."),
        ("taxiway-worker", 100_000, "Workers of taxiway."),
        ("taxiway-spot", 1_000, "Workers of taxiway whose work may be interrupted."),
    ):
        yield {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": value,
            "description": what,
        }


def _router(cluster: Cluster, scaled: Sequence[str]) -> Iterator[Manifest]:
    """Routers, who are told that KEDA starts devices of the `scaled` classes."""
    labels = {"app": "taxiway-router"}
    container = _container("router", "router", cluster)
    container = {
        **container,
        "env": [
            *container["env"],
            {"name": "TAXIWAY_KEYS", "value": "/keys/keys.jsonl"},
            {"name": "TAXIWAY_PARTING", "value": "5"},  # until the Service sends no more requests
            {"name": "TAXIWAY_STARTS", "value": ",".join(scaled)},
            {"name": "TAXIWAY_PRODUCER_SECRET", "valueFrom": {"secretKeyRef": _PRODUCERS}},
        ],
        "volumeMounts": [*container["volumeMounts"], {"name": "keys", "mountPath": "/keys", "readOnly": True}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": "http"}, "periodSeconds": 2},
        "livenessProbe": {"httpGet": {"path": "/v2/health/live", "port": "http"}, "periodSeconds": 10},
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
    }
    pod = {**_pod([container], "taxiway-router"), "terminationGracePeriodSeconds": 40}
    pod["volumes"].append({"name": "keys", "secret": {"secretName": "taxiway-keys"}})
    yield _deployment("router", labels, pod, cluster, replicas=cluster.routers)
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    yield _named("v1", "Service", "router", cluster, spec={"selector": labels, "ports": ports})
    yield _budget("router", labels, cluster)


def _workers(name: str, hardware: HardwareClass, cluster: Cluster) -> Iterator[Manifest]:
    called = f"worker-{name.replace('.', '-')}"
    if hardware.endpoint is not None:
        yield from _endpoint_workers(called, name, hardware.endpoint, cluster)
        return
    labels = {"app": "taxiway-worker", "taxiway/class": name}
    spot = hardware.capacity == "spot"
    container = {
        **_container("worker", f"worker-{hardware.device}", cluster),
        "args": ["--class", name, "--device", f"{hardware.device}:0"],
        "resources": _resources(hardware),
    }
    pod = {
        **_pod([container], "taxiway-spot" if spot else "taxiway-worker"),
        "terminationGracePeriodSeconds": math.ceil(cluster.grace) + SPARE,
        **({"tolerations": _ON_SPOT} if spot else {}),
    }
    yield _deployment(called, labels, pod, cluster, replicas=None)
    yield _budget(called, labels, cluster)
    yield _scaled(called, name, hardware, cluster)


def _endpoint_workers(called: str, name: str, endpoint: Endpoint, cluster: Cluster) -> Iterator[Manifest]:
    """A worker for each replica of an endpoint; it computes nothing, and nothing scales it."""
    for index in range(len(endpoint.replicas)):
        labels = {"app": "taxiway-worker", "taxiway/class": name, "taxiway/endpoint": str(index)}
        container = {
            **_container("worker", "worker-cpu", cluster),
            "args": ["--class", name, "--device", f"endpoint:{index}"],
            "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        }
        if endpoint.key_env is not None:
            key = {"name": endpoint.key_env, "valueFrom": {"secretKeyRef": {"name": called, "key": "key"}}}
            container["env"] = [*container["env"], key]
        pod = {
            **_pod([container], "taxiway-worker"),
            "terminationGracePeriodSeconds": math.ceil(cluster.grace) + SPARE,
        }
        yield _deployment(f"{called}-{index}", labels, pod, cluster, replicas=1)


def _resources(hardware: HardwareClass) -> Manifest:
    accelerator = _ACCELERATORS.get(hardware.device)
    memory = "4Gi" if accelerator is None else "16Gi"
    limits = {"memory": memory, **({} if accelerator is None else {accelerator: 1})}
    return {"requests": {"cpu": "1", "memory": memory}, "limits": limits}


def _scaled(called: str, name: str, hardware: HardwareClass, cluster: Cluster) -> Manifest:
    """KEDA asks a router for the replicas; while no router knows, it changes nothing."""
    trigger = {
        "type": "metrics-api",
        "metricType": "AverageValue",
        "metadata": {
            "url": f"http://router.{cluster.namespace}.svc:{PORT}/v1/scaling/{name}",
            "valueLocation": "replicas",
            "targetValue": "1",
            "activationTargetValue": "0",
            "authMode": "bearer",
        },
        "authenticationRef": {"name": "router"},
    }
    most = hardware.scaling.maximum
    spec = {
        "scaleTargetRef": {"name": called},
        "pollingInterval": POLLING,
        "cooldownPeriod": int(max(hardware.scaling.start, POLLING)),
        "minReplicaCount": hardware.scaling.minimum,
        "maxReplicaCount": 100 if most is None else max(most, 1),
        "triggers": [trigger],
    }
    return _named("keda.sh/v1alpha1", "ScaledObject", called, cluster, spec=spec)


def _container(name: str, image: str, cluster: Cluster) -> Manifest:
    secret = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": "taxiway", "key": key}}}
        for key in ("TAXIWAY_BROKER", "TAXIWAY_SECRET")
    ]
    return {
        "name": name,
        "image": f"{cluster.images}/{image}:{cluster.tag}",
        "env": secret,
        "securityContext": _HARDENED,
        "volumeMounts": [
            {"name": "queues", "mountPath": "/app/queues.yaml", "subPath": "queues.yaml", "readOnly": True},
            {"name": "cache", "mountPath": "/cache"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _pod(containers: list[Manifest], priority: str) -> Manifest:
    return {
        "priorityClassName": priority,
        "automountServiceAccountToken": False,
        "securityContext": {"fsGroup": 10001},
        "containers": containers,
        "volumes": [
            {"name": "queues", "configMap": {"name": "queues"}},
            {"name": "cache", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


def _deployment(
    name: str, labels: dict[str, str], pod: Manifest, cluster: Cluster, *, replicas: int | None
) -> Manifest:
    """Without `replicas` another, KEDA, sets them."""
    spec = {
        **({} if replicas is None else {"replicas": replicas}),
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return _named("apps/v1", "Deployment", name, cluster, spec=spec)


def _budget(name: str, labels: dict[str, str], cluster: Cluster) -> Manifest:
    """One at a time: a drained node takes no class away at once."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    return _named("policy/v1", "PodDisruptionBudget", name, cluster, spec=spec)


def _named(api: str, kind: str, name: str, cluster: Cluster, **rest: Any) -> Manifest:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": cluster.namespace}, **rest}


@click.command()
@click.option("--queues", type=click.Path(path_type=Path), default="queues.yaml", show_default=True, help="The fleet.")
@click.option("--namespace", default=Cluster.namespace, show_default=True, help="Where it runs.")
@click.option("--images", default=Cluster.images, show_default=True, help="Registry and path before the images' names.")
@click.option("--tag", default=Cluster.tag, show_default=True, help="The images' tag.")
@click.option("--routers", type=click.IntRange(1), default=Cluster.routers, show_default=True, help="Routers.")
def main(queues: Path, namespace: str, images: str, tag: str, routers: int) -> None:
    """Print the Kubernetes manifests of the fleet that queues.yaml describes."""
    try:
        topology = load_topology(queues)
    except TopologyError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    cluster = Cluster(namespace, images, tag, routers, topology.limits.grace)
    click.echo(written(manifests(topology.hardware, queues.read_text(), cluster)), nl=False)


if __name__ == "__main__":
    main()
