"""The chart as it is installed in the tests: fleets, presets' nodes, and what an old API server needs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tasks.settings import TREE
from tests.builders import recorded
from tests.cluster.control_plane import API, ControlPlane

CHART = TREE / "charts" / "taxiway"

FLEET: dict[str, Any] = yaml.safe_load(recorded("charts/fleet.yaml"))
"""Two classes with a pod each from the start, and one that has none until it is wanted."""


def chart_for(folder: Path) -> Path:
    """The chart for the API server of these tests, with its versions of budgets and HPAs; pods count sooner."""
    copy = folder / "taxiway"
    shutil.copytree(CHART, copy)
    described = copy / "Chart.yaml"
    described.write_text("\n".join(line for line in described.read_text().splitlines() if "kubeVersion" not in line))
    for template in (copy / "templates").glob("*.*"):
        text = template.read_text().replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n")
        text = text.replace("minReadySeconds: 5", "minReadySeconds: 1")
        template.write_text(text.replace("apiVersion: autoscaling/v2\n", "apiVersion: autoscaling/v2beta2\n"))
    return copy


def rendered(helm: Path, *values: Mapping[str, Any], options: tuple[str, ...] = ()) -> list[Any]:
    """What the chart in the tree gives, without a cluster."""
    done = template(helm, *values, options=options)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def template(helm: Path, *values: Mapping[str, Any], options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart with these values over each other."""
    command = [str(helm), "template", "fleet", str(CHART), "--namespace", "air", "--values", "-", *options]
    return subprocess.run(
        command, input=yaml.safe_dump(merged(*values)), capture_output=True, text=True, check=False, timeout=60
    )


def merged(*values: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping, later values before earlier ones, as helm merges its files."""
    whole: dict[str, Any] = {}
    for one in values:
        for key, value in one.items():
            under = whole.get(key)
            whole[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return whole


class Release:
    """A fleet, installed by helm in a namespace of its own."""

    def __init__(self, plane: ControlPlane, chart: Path, namespace: str, name: str = "fleet") -> None:
        self.plane, self.chart, self.namespace, self.name = plane, chart, namespace, name
        if plane.get(f"{API['Namespace']}/{namespace}") is None:
            plane.create(API["Namespace"], {"metadata": {"name": namespace}})

    def upgrade(self, *values: Mapping[str, Any], options: tuple[str, ...] = (), fails: bool = False) -> str:
        """Install the fleet, or change it."""
        return self.plane.tool(
            "helm", "upgrade", "--install", self.name, str(self.chart), "--namespace", self.namespace, "--values", "-",
            *options, stdin=yaml.safe_dump(merged(*values)), fails=fails,
        )  # fmt: skip

    def helm(self, verb: str, *arguments: str) -> str:
        """Another verb of helm on this release."""
        return self.plane.tool("helm", verb, self.name, "--namespace", self.namespace, *arguments)

    def pods(self, component: str = "worker", **labels: str) -> list[Any]:
        """The fleet's pods of a component that are not being deleted."""
        wanted = {"app.kubernetes.io/instance": self.name, "app.kubernetes.io/component": component, **labels}
        selector = ",".join(f"{name}={value}" for name, value in wanted.items())
        found = self.plane.items(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def of_class(self, name: str, pool: str | None = None) -> list[Any]:
        """The pods of a hardware class, or of one of its pools."""
        return self.pods(**{"taxiway/class": name, **({} if pool is None else {"taxiway/pool": pool})})

    def deployment(self, name: str) -> Any:
        """A Deployment of the fleet, or None."""
        return self.plane.get(f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{self.name}-{name}")

    def remaining(self) -> Iterator[str]:
        """What there is in the namespace and in the cluster that carries the release's name."""
        kinds = "all,configmaps,serviceaccounts,secrets,pdb,networkpolicies,roles,rolebindings,hpa,pvc"
        for scope in (("--namespace", self.namespace, kinds), ("priorityclasses,clusterroles,clusterrolebindings",)):
            *where, what = scope
            yield from self.plane.tool(
                "kubectl", "get", what, *where, "--output", "name",
                "--selector", f"app.kubernetes.io/instance={self.name},app.kubernetes.io/name=taxiway",
            ).split()  # fmt: skip


def nodes_of(pods: list[Any]) -> set[str]:
    """Where pods are bound."""
    return {pod["spec"].get("nodeName", "") for pod in pods}


def ready(pods: list[Any]) -> int:
    """How many are ready."""
    return sum(
        any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
        for pod in pods
    )
