"""The chart's HorizontalPodAutoscalers under the real controller, by the router's wish as an external metric."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from tests.builders import recorded
from tests.cluster.chart import FLEET, Release
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until

DEFINITION: dict[str, Any] = yaml.safe_load(recorded("charts/metric.yaml"))
"""Serves what an adapter for Prometheus would; the name of a resource may have no underscore."""


def metered(fleet: Release, deployment: str, hardware_class: str) -> str:
    """Serve the metric that a fleet's HPA reads, and name it there; the HPA's path."""
    plane, definitions = fleet.plane, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    if plane.get(f"{definitions}/{DEFINITION['metadata']['name']}") is None:
        plane.create(definitions, DEFINITION)
    assert until(lambda: plane.get(_metrics(fleet)) is not None)
    hpa = f"/apis/autoscaling/v2beta2/namespaces/{fleet.namespace}/horizontalpodautoscalers/fleet-{deployment}"
    metrics = plane.get(hpa)["spec"]["metrics"]
    metrics[0]["external"]["metric"]["name"] = "wanted"
    plane.patch(hpa, {"spec": {"metrics": metrics}})
    body = {"apiVersion": "external.metrics.k8s.io/v1beta1", "kind": "ExternalMetricValue", "metricName": "wanted"}
    labels = {"class": hardware_class, "service": "fleet-router"}
    plane.create(_metrics(fleet), {**body, "metadata": {"name": "wanted", "labels": labels}})
    return hpa


def measure(fleet: Release, count: int) -> None:
    """The metric has this value from now on."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fleet.plane.patch(f"{_metrics(fleet)}/wanted", {"value": str(count), "timestamp": now})


def _metrics(fleet: Release) -> str:
    return f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{fleet.namespace}/wanted"


def test_an_hpa_follows_the_router_up_and_down_at_once_but_not_within_a_tenth(
    plane: ControlPlane, kubelets: Kubelets, chart: Path
) -> None:
    add_node(plane, "cpu", {})
    fleet = Release(plane, chart, "scaled")
    hardware = {"cpu.batch": {**FLEET["hardware"]["cpu.batch"], "scaling": {"minimum": 1}}}
    fleet.upgrade({**FLEET, "hardware": hardware}, {"autoscaler": "hpa"})
    hpa = metered(fleet, "worker-cpu-batch", "cpu.batch")

    def replicas() -> int:
        found: int = fleet.deployment("worker-cpu-batch")["spec"]["replicas"]
        return found

    def follows(count: int) -> float:
        measure(fleet, count)
        began = time.monotonic()
        assert until(lambda: replicas() == count, timeout=60), plane.get(hpa)["status"]
        return time.monotonic() - began

    try:
        took = {count: follows(count) for count in (11, 3, 12, 1)}
        assert max(took.values()) < 60, took  # 300 s without the chart's behaviour
        follows(11)
        measure(fleet, 12)
        assert not until(lambda: replicas() != 11, timeout=6)
    finally:
        fleet.helm("uninstall")
        plane.http.request("DELETE", API["Node"])
