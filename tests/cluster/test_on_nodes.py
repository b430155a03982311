"""The chart on a real API server, with its scheduler and controllers, and made-up nodes of each cloud."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import recorded
from tests.cluster.chart import FLEET, Release, nodes_of, ready
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until

GPU = {"nvidia.com/gpu": "1"}

CLOUDS: dict[str, Any] = yaml.safe_load(recorded("charts/clouds.yaml"))
"""By cloud: its words for a smaller GPU and a larger one, and the labels of its nodes."""


@pytest.fixture
def nodes(plane: ControlPlane) -> Iterator[None]:
    """No node is left from one test to the next."""
    yield
    plane.http.request("DELETE", API["Node"])


def make_nodes(plane: ControlPlane, labels: dict[str, dict[str, str]], taint: str = "nvidia.com/gpu=present") -> None:
    """Two CPU nodes, an L4, an A100, and both as spot nodes, of which the first has no taint but the GPU's."""
    [(key, value)] = labels["spot"].items()
    add_node(plane, "cpu-1", {})
    add_node(plane, "cpu-2", {})
    add_node(plane, "cpu-spot", labels["spot"])
    for card in ("a100", "l4"):
        add_node(plane, card, labels[card], taint, GPU)
        add_node(plane, f"{card}-spot", labels[card] | labels["spot"], f"{key}={value}", GPU)


def values_for(cloud: str) -> dict[str, Any]:
    cards = CLOUDS[cloud]
    classes = {"gpu.realtime": {"accelerator": cards["small"]}, "gpu.spot": {"accelerator": cards["large"]}}
    return {"cloud": cloud, "autoscaler": "none", "classes": classes}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_class_runs_on_its_own_cards_on_spot_or_not_and_the_routers_apart(
    plane: ControlPlane, kubelets: Kubelets, nodes: None, chart: Path, cloud: str
) -> None:
    make_nodes(plane, CLOUDS[cloud]["labels"])
    fleet = Release(plane, chart, f"on-{cloud}")
    fleet.upgrade(FLEET, values_for(cloud))
    try:
        assert until(lambda: ready(fleet.pods()) == 2 and ready(fleet.pods("router")) == 2)
        assert nodes_of(fleet.of_class("gpu.realtime")) == {"l4"}
        assert nodes_of(fleet.of_class("gpu.spot")) == {"a100-spot"}
        assert len(nodes_of(fleet.pods("router"))) == 2
        assert fleet.of_class("cpu.batch") == []
    finally:
        fleet.helm("uninstall")


def test_a_tpu_class_gets_its_generation_and_all_chips_of_the_topology(
    plane: ControlPlane, kubelets: Kubelets, nodes: None, chart: Path
) -> None:
    label, topology = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
    for name, kind in (("v6e", "tpu-v6e-slice"), ("v5e", "tpu-v5-lite-podslice")):
        add_node(plane, name, {label: kind, topology: "2x2"}, "google.com/tpu=present", {"google.com/tpu": "4"})
    tpu = {"device": "tpu", "runtimes": ["echo"], "max_batch": 8, "max_wait": 0, "price": {"usd_per_hour": 1}}
    fleet = Release(plane, chart, "tpu")
    classes = {"tpu.bulk": {"accelerator": "tpu-v5-lite-podslice", "topology": "2x2"}}
    hardware = {"tpu.bulk": {**tpu, "scaling": {"minimum": 1}}}
    fleet.upgrade({**FLEET, "hardware": hardware}, {"cloud": "gke", "autoscaler": "none", "classes": classes})
    try:
        assert until(lambda: nodes_of(fleet.of_class("tpu.bulk")) == {"v5e"})
        [worker] = fleet.of_class("tpu.bulk")[0]["spec"]["containers"]
        assert worker["resources"]["limits"]["google.com/tpu"] == "4"
    finally:
        fleet.helm("uninstall")


def test_on_bare_metal_a_class_gets_its_card_or_a_part_of_one(
    plane: ControlPlane, kubelets: Kubelets, nodes: None, chart: Path
) -> None:
    product, mig = "nvidia.com/gpu.product", "nvidia.com/mig-1g.10gb"
    add_node(plane, "a100", {product: "NVIDIA-A100-SXM4-80GB"}, "nvidia.com/gpu=present", {mig: "7"})
    add_node(plane, "l4", {product: "NVIDIA-L4"}, "nvidia.com/gpu=present", GPU)
    hardware = {name: {**FLEET["hardware"]["gpu.realtime"]} for name in ("gpu.whole", "gpu.part")}
    classes = {
        "gpu.whole": {"accelerator": "NVIDIA-L4"},
        "gpu.part": {"accelerator": "NVIDIA-A100-SXM4-80GB", "mig": "1g.10gb"},
    }
    fleet = Release(plane, chart, "metal")
    fleet.upgrade({**FLEET, "hardware": hardware}, {"cloud": "metal", "autoscaler": "none", "classes": classes})
    try:
        assert until(lambda: nodes_of(fleet.of_class("gpu.whole") + fleet.of_class("gpu.part")) == {"l4", "a100"})
        assert nodes_of(fleet.of_class("gpu.part")) == {"a100"}
    finally:
        fleet.helm("uninstall")


@pytest.fixture
def on_gke(plane: ControlPlane, kubelets: Kubelets, nodes: None, chart: Path) -> Iterator[Release]:
    """A fleet with every class on its node."""
    make_nodes(plane, CLOUDS["gke"]["labels"])
    fleet = Release(plane, chart, "rolling")
    fleet.upgrade(FLEET, values_for("gke"))
    try:
        assert until(lambda: ready(fleet.pods()) == 2 and ready(fleet.pods("router")) == 2)
        yield fleet
    finally:
        fleet.helm("uninstall")
        assert until(lambda: not fleet.pods() + fleet.pods("router"))  # the next test's fleet has the same name


def test_an_edited_queues_yaml_rolls_the_only_gpu_and_is_rolled_back(on_gke: Release) -> None:
    def first() -> str:
        return ",".join(pod["metadata"]["uid"] for pod in on_gke.of_class("gpu.realtime"))

    def rolled(since: str) -> bool:
        found = on_gke.deployment("worker-gpu-realtime")["status"]
        return first() != since and found.get("updatedReplicas") == 1 and ready(on_gke.of_class("gpu.realtime")) == 1

    before = first()
    on_gke.upgrade(FLEET, values_for("gke"), {"limits": {"lease": 20}})
    assert until(lambda: rolled(before))
    assert nodes_of(on_gke.of_class("gpu.realtime")) == {"l4"}
    edited = first()
    on_gke.helm("rollback", "1")
    assert until(lambda: rolled(edited))


def test_an_upgrade_without_a_change_rolls_nothing_and_keeps_replicas_that_others_set(on_gke: Release) -> None:
    uids = {pod["metadata"]["uid"] for pod in on_gke.pods() + on_gke.pods("router")}
    name = f"/apis/apps/v1/namespaces/{on_gke.namespace}/deployments/fleet-worker-cpu-batch"
    on_gke.plane.patch(f"{name}/scale", {"spec": {"replicas": 3}})
    assert until(lambda: ready(on_gke.of_class("cpu.batch")) == 3)

    on_gke.upgrade(FLEET, values_for("gke"))

    assert on_gke.deployment("worker-cpu-batch")["spec"]["replicas"] == 3
    assert uids <= {pod["metadata"]["uid"] for pod in on_gke.pods() + on_gke.pods("router")}


def test_two_fleets_live_in_one_cluster_and_one_leaves_nothing(on_gke: Release) -> None:
    other = Release(on_gke.plane, on_gke.chart, "other", on_gke.name)
    other.upgrade(FLEET, values_for("gke"))
    other.helm("uninstall")
    claims = {"persistentvolumeclaim/data-fleet-valkey-0", "persistentvolumeclaim/data-fleet-valkey-1"}

    def left() -> set[str]:
        return {one for one in other.remaining() if "priorityclass" not in one} - claims

    assert until(lambda: left() == set()), left()
    classes = on_gke.plane.tool("kubectl", "get", "priorityclasses", "--output", "name").split()
    assert not [one for one in classes if "other-fleet" in one]
    assert [one for one in classes if "rolling-fleet" in one]


def test_the_fleets_own_test_is_a_pod_that_succeeds(on_gke: Release) -> None:
    assert "Succeeded" in on_gke.helm("test", "--timeout", "30s")


OTHERS = (
    ("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
    ("keda.sh", "v1alpha1", "TriggerAuthentication", "triggerauthentications"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"),
)
"""Resources of KEDA and of the Prometheus operator, which define what is in them."""


def define(plane: ControlPlane, group: str, version: str, kind: str, plural: str) -> None:
    anything = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    body = {
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group, "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
            "versions": [{"name": version, "served": True, "storage": True, "schema": anything}],
        },
    }  # fmt: skip
    plane.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
    assert until(lambda: plane.get(f"/apis/{group}/{version}/{plural}") is not None)


def test_without_keda_the_chart_is_refused_before_anything_is_installed(
    plane: ControlPlane, chart: Path, nodes: None, tmp_path: Path
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({**FLEET, **values_for("gke"), "autoscaler": "keda"}))
    command = ("install", "early", str(chart), "--namespace", "default", "--values", str(values))
    assert "autoscaler: keda needs KEDA 2.17 or later in this cluster" in plane.tool("helm", *command, fails=True)


def test_server_side_apply_takes_every_manifest_again_and_again(
    plane: ControlPlane, chart: Path, nodes: None, tmp_path: Path
) -> None:
    for one in OTHERS:
        define(plane, *one)
    values = tmp_path / "values.yaml"
    more = {"autoscaler": "keda", "metrics": {"serviceMonitor": True, "dashboard": True}}
    values.write_text(yaml.safe_dump({**FLEET, **values_for("gke"), **more}))
    manifests = plane.tool("helm", "template", "applied", str(chart), "--namespace", "default", "--values", str(values))
    for _ in range(2):
        plane.tool("kubectl", "apply", "--server-side", "--filename", "-", stdin=manifests)
    assert len(plane.items("/apis/keda.sh/v1alpha1/scaledobjects")) == 3
    plane.tool("kubectl", "delete", "--wait=false", "--filename", "-", stdin=manifests)
