"""The operator against a real API server: exact counts, pools, the right pods, and its own death."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import recorded
from tests.cluster.chart import FLEET, Release, nodes_of, ready
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until
from tests.cluster.operating import Controller, Wishes, operated

PODS = "/api/v1/namespaces/operated/pods"
COST = "controller.kubernetes.io/pod-deletion-cost"
L4, SPOT = "cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"
VALUES: dict[str, Any] = yaml.safe_load(recorded("charts/values.yaml"))["operated"]
QUIET = {"hardware": {name: {"scaling": {"minimum": 0}} for name in ("gpu.realtime", "gpu.spot")}}


@pytest.fixture
def fleet(plane: ControlPlane, kubelets: Kubelets, chart: Path) -> Iterator[Release]:
    """Sixteen L4s on demand, four on a spot node, and no worker yet."""
    add_node(plane, "cpu", {})
    add_node(plane, "l4", {L4: "nvidia-l4"}, "nvidia.com/gpu=present", {"nvidia.com/gpu": "16"})
    add_spot(plane)
    release = Release(plane, chart, "operated")
    release.upgrade(FLEET, QUIET, VALUES)
    yield release
    release.helm("uninstall", "--ignore-not-found")
    assert until(lambda: list(release.plane.items(f"{HARDWARE}")) == [])
    plane.http.request("DELETE", API["Node"])


HARDWARE = "/apis/taxiway.dev/v1alpha1/namespaces/operated/hardwareclasses"


def add_spot(plane: ControlPlane) -> None:
    add_node(plane, "l4-spot", {L4: "nvidia-l4", SPOT: "true"}, "nvidia.com/gpu=present", {"nvidia.com/gpu": "4"})


@pytest.fixture
def wishes() -> Iterator[Wishes]:
    with Wishes() as running:
        yield running


@pytest.fixture
def controller(fleet: Release, wishes: Wishes, tmp_path: Path) -> Iterator[Controller]:
    with operated(fleet, tmp_path, wishes.url) as running:
        yield running


def settle(fleet: Release, name: str, count: int) -> None:
    """Wait until a class has so many pods, and all are ready."""
    assert until(lambda: len(found := fleet.of_class(name)) == ready(found) == count, timeout=60)


def alive(fleet: Release) -> list[str]:
    """The names of the class's pods, without those that end."""
    pods = [pod["metadata"] for pod in fleet.of_class("gpu.realtime")]
    return sorted(pod["name"] for pod in pods if "deletionTimestamp" not in pod)


def seconds_until_asked(fleet: Release, wishes: Wishes, count: int) -> float:
    """Until the Deployment has as many replicas as the router wants; then until they run."""
    wishes.wanted["gpu.realtime"] = count
    began = time.monotonic()
    assert until(lambda: fleet.deployment("worker-gpu-realtime")["spec"]["replicas"] == count)
    took = time.monotonic() - began
    settle(fleet, "gpu.realtime", count)
    return took


def test_a_class_has_exactly_the_pods_that_its_router_wants_and_says_why(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    seconds_until_asked(fleet, wishes, 11)  # the operator starts
    took = {count: seconds_until_asked(fleet, wishes, count) for count in (12, 1, 16, 0)}
    assert statistics.median(took.values()) < 3, took  # a look, and what it asks the API server
    assert until(lambda: fleet.of_class("gpu.realtime") == [])
    table = fleet.plane.tool("kubectl", "get", "hwc", "fleet-worker-gpu-realtime", "--namespace", "operated")
    assert "gpu.realtime was asked for" in table
    events = fleet.plane.tool("kubectl", "get", "events", "--namespace", "operated", "--output", "wide")
    assert "fleet-worker-gpu-realtime: 12 to 1 pods: gpu.realtime was asked for" in events
    assert controller.stop() == 0


def test_a_reclaimed_spot_pool_moves_to_the_next_and_back(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    wishes.wanted["gpu.spot"] = 2
    settle(fleet, "gpu.spot", 2)
    assert nodes_of(fleet.of_class("gpu.spot")) == {"l4-spot"}

    reclaim(fleet)
    assert until(lambda: ready(fleet.of_class("gpu.spot", "other")) == 2, timeout=60), controller.log

    add_spot(fleet.plane)
    fewest = [2]

    def is_back() -> bool:
        fewest[0] = min(fewest[0], ready(fleet.of_class("gpu.spot")))
        return ready(fleet.of_class("gpu.spot", "first")) == 2 and fleet.of_class("gpu.spot", "other") == []

    assert until(is_back, timeout=90), controller.log
    assert fewest == [2]


def reclaim(fleet: Release) -> None:
    """The spot node goes, and its pods with it."""
    fleet.plane.http.request("DELETE", f"{API['Node']}/l4-spot")
    for pod in fleet.of_class("gpu.spot"):
        path = f"{PODS}/{pod['metadata']['name']}"
        fleet.plane.http.request("DELETE", path, json={"gracePeriodSeconds": 0})


def test_an_operator_that_is_killed_in_the_middle_is_followed_by_one_that_ends_the_work(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    lease = "/apis/coordination.k8s.io/v1/namespaces/operated/leases/taxiway-controller"
    for round in range(3):
        wishes.wanted |= {"gpu.realtime": 12 - round, "gpu.spot": 2 + round}
        assert until(lambda: fleet.plane.get(lease) is not None), controller.log
        controller.kill()
        fleet.plane.http.request("DELETE", lease)  # as if its time were over
        controller.start()
    settle(fleet, "gpu.realtime", 10)
    settle(fleet, "gpu.spot", 4)


def test_the_pods_that_end_are_those_that_lose_least(fleet: Release, wishes: Wishes, controller: Controller) -> None:
    seconds_until_asked(fleet, wishes, 4)
    assert until(lambda: len(alive(fleet)) == 4)
    names = alive(fleet)
    held: tuple[dict[str, Any], ...] = (
        {"running": 4},
        {"warm": ["a", "b"]},
        {"held": 1},
        {"running": 9, "draining": True},
    )
    wishes.devices = [{"worker": f"gpu.realtime.cuda-0@{name}", **one} for name, one in zip(names, held, strict=True)]

    def there() -> list[dict[str, Any]]:
        """The pods by their metadata, those that end included, without what a ReplicaSet replaced meanwhile."""
        found = [pod["metadata"] for pod in fleet.plane.items(PODS, labelSelector="taxiway/class=gpu.realtime")]
        return [pod for pod in found if pod["name"] in names]

    def ended(count: int) -> bool:
        """Whether just the first `count` of those that lose least end."""
        ending = {pod["name"] for pod in there() if "deletionTimestamp" in pod}
        assert ending <= {names[index] for index in (3, 2, 1)[:count]}
        return len(ending) == count

    def costs() -> list[str | None]:
        return [pod.get("annotations", {}).get(COST) for pod in there()]

    try:
        for name in names:  # a pod that ends stays to be seen
            fleet.plane.patch(f"{PODS}/{name}", {"metadata": {"finalizers": ["taxiway.test/seen"]}})
        for left in (3, 2):
            wishes.wanted["gpu.realtime"] = left
            assert until(partial(ended, 4 - left)), controller.log
            settle(fleet, "gpu.realtime", left)
        assert costs() == [None] * 4
        fleet.plane.patch(f"{PODS}/{names[0]}", {"metadata": {"labels": {"pod-template-hash": "earlier"}}})
        wishes.wanted["gpu.realtime"] = 1  # as in a rollout, its pods are of two ReplicaSets
        assert until(lambda: costs()[:2] == ["4000", "20"]), controller.log
    finally:
        for name in names:
            fleet.plane.patch(f"{PODS}/{name}", {"metadata": {"finalizers": None}})
        fleet.plane.http.request("DELETE", f"{PODS}/{names[0]}")


def test_a_count_that_was_set_by_hand_goes_before_the_routers(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    wishes.wanted["gpu.realtime"] = 3
    settle(fleet, "gpu.realtime", 3)
    fleet.plane.tool(
        "kubectl", "scale", "hwc", "fleet-worker-gpu-realtime", "--replicas", "1", "--namespace", "operated"
    )
    settle(fleet, "gpu.realtime", 1)
    fleet.plane.patch(f"{HARDWARE}/fleet-worker-gpu-realtime", {"spec": {"replicas": None}})
    settle(fleet, "gpu.realtime", 3)


def test_other_changes_are_corrected_and_a_missing_deployment_is_reported(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    wishes.wanted |= {"gpu.realtime": 2, "gpu.spot": 1}
    settle(fleet, "gpu.realtime", 2)
    deployments = "/apis/apps/v1/namespaces/operated/deployments"
    fleet.plane.patch(f"{deployments}/fleet-worker-gpu-realtime/scale", {"spec": {"replicas": 5}})
    fleet.plane.http.request("DELETE", f"{deployments}/fleet-worker-gpu-spot")
    settle(fleet, "gpu.realtime", 2)

    def pools() -> list[bool]:
        found = fleet.plane.get(f"{HARDWARE}/fleet-worker-gpu-spot").get("status", {})
        return [pool["missing"] for pool in found.get("pools", [])]

    assert until(lambda: pools() == [True, False]), controller.log
    assert until(lambda: ready(fleet.of_class("gpu.spot", "other")) == 1), controller.log
