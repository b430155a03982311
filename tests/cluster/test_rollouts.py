"""A change of queues.yaml that the operator rolls out: canary first, routers last, through its death, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.chart import FLEET, Release, ready
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until
from tests.cluster.operating import Controller, Wishes, operated

SPACE = "/apis/taxiway.dev/v1alpha1/namespaces/rolled"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/rolled/leases/taxiway-controller"
VALUES: dict[str, Any] = {
    "cloud": "gke",
    "autoscaler": "controller",
    "classes": {name: {"accelerator": "nvidia-l4"} for name in ("gpu.realtime", "gpu.spot")},
    "controller": {"rollout": {"canary": "cpu.batch", "share": 0.5, "watch": 2, "timeout": 60, "jobs": 5}},
}
ORDER = ("cpu.batch", "gpu.realtime", "router")


@pytest.fixture
def fleet(plane: ControlPlane, kubelets: Kubelets, chart: Path) -> Iterator[Release]:
    add_node(plane, "cpu", {})
    add_node(plane, "l4", {"cloud.google.com/gke-accelerator": "nvidia-l4"}, "", {"nvidia.com/gpu": "4"})
    release = Release(plane, chart, "rolled")
    release.upgrade(FLEET, VALUES)
    yield release
    release.helm("uninstall")
    assert until(lambda: maps(release) == set()), maps(release)
    plane.http.request("DELETE", API["Node"])


def maps(fleet: Release) -> set[str]:
    """The ConfigMaps with a queues.yaml."""
    label = "app.kubernetes.io/component=queues"
    found = fleet.plane.items("/api/v1/namespaces/rolled/configmaps", labelSelector=label)
    return {one["metadata"]["name"] for one in found}


@pytest.fixture
def wishes() -> Iterator[Wishes]:
    with Wishes() as running:
        running.wanted |= {"cpu.batch": 2, "gpu.realtime": 1}
        yield running


@pytest.fixture
def controller(fleet: Release, wishes: Wishes, tmp_path: Path) -> Iterator[Controller]:
    with operated(fleet, tmp_path, wishes.url, as_is=True) as running:
        yield running


def lease_of(seconds: int) -> dict[str, Any]:
    """A queues.yaml that differs in one limit."""
    return {"limits": {"lease": seconds}}


def generations(fleet: Release) -> dict[str, list[str]]:
    """By class, and of the routers: which queues.yaml each pod reads. The last to change is read first."""
    pods = {"router": fleet.pods("router"), **{name: fleet.of_class(name) for name in reversed(ORDER[:2])}}
    return {
        name: [
            volume["configMap"]["name"]
            for pod in found
            for volume in pod["spec"]["volumes"]
            if volume["name"] == "queues"
        ]
        for name, found in pods.items()
    }


def status(fleet: Release) -> Any:
    found = fleet.plane.get(f"{SPACE}/fleets/fleet").get("status", {})
    conditions = {one["type"]: (one["status"], one["reason"]) for one in found.get("conditions", [])}
    return {"phase": None, **found.get("rollout", {}), "conditions": conditions, "said": found.get("stage")}


def settle(fleet: Release) -> str:
    """Wait until all is as declared; the queues.yaml that every pod reads."""

    def settled() -> bool:
        counts = {name: len(found) for name, found in generations(fleet).items()}
        deployments = [fleet.deployment(one) for one in ("router", "worker-cpu-batch", "worker-gpu-realtime")]
        return (
            counts == {"cpu.batch": 2, "gpu.realtime": 1, "router": 2}
            and status(fleet)["phase"] == "idle"
            and all(one["spec"].get("paused") for one in deployments)
            and ready(fleet.pods()) == 3
            and ready(fleet.pods("router")) == 2
        )

    assert until(settled, timeout=90), status(fleet)
    [found] = {name for names in generations(fleet).values() for name in names}
    return found


def rolled(fleet: Release, before: str, meanwhile: Callable[[], None]) -> None:
    """Wait until a rollout has ended, and check at each look that no class changes before the one in front of it."""

    def ended() -> bool:
        reads = generations(fleet)
        changed = [any(one != before for one in reads[name]) for name in ORDER]
        whole = [all(one != before for one in reads[name]) for name in ORDER]
        for index in (1, 2):
            assert not changed[index] or whole[index - 1], reads
        meanwhile()
        return status(fleet)["phase"] == "idle" and all(whole)

    assert until(lambda: status(fleet)["phase"] != "idle"), status(fleet)
    assert until(ended, timeout=120), status(fleet)


def test_a_change_rolls_class_by_class_through_the_operators_death(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    before = settle(fleet)
    usual = {"Ready": ("True", "Serving"), "Degraded": ("False", "AsDeclared"), "Progressing": ("False", "Steady")}
    assert until(lambda: status(fleet)["conditions"] == usual), status(fleet)
    deaths = set()

    def die_once_in_each_stage() -> None:
        found = status(fleet)
        if found["phase"] == "rolling" and found["stage"] not in deaths:
            deaths.add(found["stage"])
            controller.kill()
            fleet.plane.http.request("DELETE", LEASE)  # as if its time were over
            controller.start()

    fleet.upgrade(FLEET, VALUES, lease_of(20))
    rolled(fleet, before, die_once_in_each_stage)
    assert {0, 2} <= deaths
    changed = settle(fleet)
    assert before in maps(fleet)  # for a pod that starts again meanwhile

    fleet.helm("rollback", "1")
    rolled(fleet, changed, lambda: None)
    assert settle(fleet) == before


def test_new_pods_that_fail_their_jobs_are_taken_back_and_the_next_change_rolls(
    fleet: Release, wishes: Wishes, controller: Controller
) -> None:
    before = settle(fleet)
    untouched = {pod["metadata"]["uid"] for pod in fleet.of_class("gpu.realtime") + fleet.pods("router")}
    fleet.upgrade(FLEET, VALUES, lease_of(30))

    def is_back() -> bool:
        for pod in fleet.of_class("cpu.batch"):
            mounted = [one["configMap"]["name"] for one in pod["spec"]["volumes"] if "configMap" in one]
            done = {"cpu.batch": {"outcomes": {"failed": 9, "succeeded": 1}, "latency": {}}}
            if before not in mounted:
                name = pod["metadata"]["name"]
                wishes.devices = [{"worker": f"cpu.batch.cpu-0@{name}", "hardware_class": "cpu.batch", "done": done}]
        return bool(wishes.devices) and status(fleet)["phase"] == "idle"

    assert until(is_back, timeout=60), status(fleet)
    assert settle(fleet) == before
    assert untouched == {pod["metadata"]["uid"] for pod in fleet.of_class("gpu.realtime") + fleet.pods("router")}
    assert status(fleet)["said"] == "rolled back: cpu.batch: 90% of 10 jobs failed, 0% before"
    assert until(lambda: status(fleet)["conditions"]["Degraded"] == ("True", "RolledBack")), status(fleet)
    table = fleet.plane.tool("kubectl", "get", "fleet", "fleet", "--namespace", "rolled")
    assert "rolled back" in table

    wishes.devices = []
    fleet.upgrade(FLEET, VALUES, lease_of(40))  # helm finds no field that the operator holds against it
    assert until(lambda: status(fleet)["phase"] == "rolling"), status(fleet)
