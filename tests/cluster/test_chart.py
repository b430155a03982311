"""What the chart renders, without a cluster: schemas of current releases, refusals, and what every pod must have."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tasks.settings import TREE
from tasks.topology import load_topology, parse_topology
from tests.builders import recorded
from tests.cluster.chart import CHART, FLEET, rendered, template

OURS = yaml.safe_load((TREE / "queues.yaml").read_text())
VALUES: dict[str, Any] = yaml.safe_load(recorded("charts/values.yaml"))
ON_GKE = VALUES["on_gke"]
OURS_ON_GKE = {**ON_GKE, "classes": {name: ON_GKE["classes"][name] for name in ("gpu.realtime", "tpu.bulk")}}
ENGINES: dict[str, Any] = yaml.safe_load(recorded("charts/engines.yaml"))
ANOTHER_FLEET = VALUES["another_fleet"]
OUR_CORES = OURS["hardware"]["cpu.batch"]  # named in its table
BESIDE = {**ENGINES["far"], "endpoint": {**ENGINES["far"]["endpoint"], "url": "http://localhost:8000/v1"}}
WITH_ENGINES = {"hardware": ENGINES, "classes": VALUES["engine"]}
SPOT = {"hardware": {"gpu.spot": FLEET["hardware"]["gpu.spot"]}, "classes": {"gpu.spot": {"accelerator": "nvidia-l4"}}}
EVERYTHING = (OURS, OURS_ON_GKE, WITH_ENGINES, SPOT)
RELEASES = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", kubernetes_validate.latest_version())


def named(manifests: list[Any]) -> dict[tuple[str, str], Any]:
    return {(one["kind"], one["metadata"]["name"].removeprefix("fleet-")): one for one in manifests}


def pods(manifests: list[Any]) -> dict[str, Any]:
    """The pod specs of every Deployment and StatefulSet."""
    return {
        name: one["spec"]["template"]["spec"]
        for (kind, name), one in named(manifests).items()
        if kind in ("Deployment", "StatefulSet")
    }


@pytest.fixture(scope="module")
def everything(helm: Path) -> list[Any]:
    return rendered(helm, *EVERYTHING)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_since_1_29_accepts_every_manifest(helm: Path, release: str) -> None:
    options = ("--kube-version", release if release.count(".") == 2 else f"{release}.0")
    manifests = rendered(helm, *EVERYTHING, {"autoscaler": "hpa", "metrics": {"dashboard": True}}, options=options)
    assert len(manifests) > 35
    for manifest in manifests:
        kubernetes_validate.validate(manifest, release, strict=True)


def test_helm_finds_nothing_to_complain_of(helm: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({**OURS, **OURS_ON_GKE}))
    command = [str(helm), "lint", str(CHART), "--strict", "--values", str(values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_pods_read_the_queues_yaml_that_the_chart_was_given(helm: Path) -> None:
    without = {"rebalance": {"retarget": None}}
    manifests = rendered(helm, OURS, OURS_ON_GKE, without)
    text = named(manifests)["ConfigMap", "queues"]["data"]["queues.yaml"]
    expected = load_topology(TREE / "queues.yaml")
    found = parse_topology(text)
    assert found.hardware == expected.hardware
    assert found.limits == expected.limits
    assert found.rebalance.retarget is None


@pytest.mark.cases("values, complaint")
def test_wrong_values_are_refused_with_their_place(helm: Path, values: dict[str, Any], complaint: str) -> None:
    done = template(helm, OURS, OURS_ON_GKE, values)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_every_pod_is_confined_and_has_no_token(everything: list[Any]) -> None:
    for name, pod in pods(everything).items():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any("hostPath" in volume for volume in pod["volumes"]), name
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
            assert context.get("readOnlyRootFilesystem") or container["name"] == "engine", name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


def has(found: Any, expected: Any) -> bool:
    """Whether a part of a manifest has this: of a list of mappings each somewhere, and nothing at what is null."""
    match expected:
        case dict():
            return isinstance(found, dict) and all(has(found.get(key), one) for key, one in expected.items())
        case [dict(), *_]:
            return all(any(has(each, one) for each in found) for one in expected)
    return bool(found == expected)


@pytest.mark.cases("values, expected")
def test_the_manifests_follow_the_values(helm: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    manifests = rendered(helm, *EVERYTHING, values)
    found = {"/".join(names): one for names, one in named(manifests).items()}
    found |= {f"pod/{name}": pod for name, pod in pods(manifests).items()}
    for place, part in expected.items():
        assert has(found.get(place), part), place


def test_workers_are_probed_from_loading_to_hanging(everything: list[Any]) -> None:
    for name, pod in pods(everything).items():
        if name.startswith("worker-"):
            worker = pod["containers"][0]
            probes = worker["startupProbe"], worker["readinessProbe"], worker["livenessProbe"]
            assert [one["exec"]["command"][-1] for one in probes] == [*["docker/check_worker.sh"] * 2, "900"]
            assert worker["startupProbe"]["periodSeconds"] * worker["startupProbe"]["failureThreshold"] >= 900


def test_pods_end_within_the_drain_or_what_the_cloud_leaves_a_spot_pod(helm: Path, everything: list[Any]) -> None:
    found = pods(everything)
    assert found["worker-gpu-realtime"]["terminationGracePeriodSeconds"] == 120
    assert found["worker-gpu-spot"]["terminationGracePeriodSeconds"] == 15
    assert "kill -USR2 1" in found["worker-gpu-spot"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    elsewhere = pods(rendered(helm, *EVERYTHING[2:], {**OURS, "cloud": "gke"}, OURS_ON_GKE, {"limits": {"grace": 7.5}}))
    assert elsewhere["worker-cpu-batch"]["terminationGracePeriodSeconds"] == 68


def test_an_engines_weights_may_be_an_image_where_kubernetes_mounts_images(helm: Path) -> None:
    weights = {"weights": {"image": "registry/weights:1"}}
    mounted = {"gpu.vllm": {"accelerator": "nvidia-l4", "engine": {"preset": "vllm", **weights}}}
    values = (OURS, OURS_ON_GKE, {"hardware": ENGINES, "classes": mounted})
    found = named(rendered(helm, *values))["Deployment", "worker-gpu-vllm"]
    kubernetes_validate.validate(found, "1.35", strict=True)
    volumes = found["spec"]["template"]["spec"]["volumes"]
    assert {"name": "weights", "image": {"reference": "registry/weights:1", "pullPolicy": "IfNotPresent"}} in volumes


def test_each_replica_of_an_endpoint_elsewhere_has_a_worker_that_nothing_scales(everything: list[Any]) -> None:
    found = named(everything)
    for index in range(4):
        spec = found["Deployment", f"worker-far-{index}"]["spec"]
        assert spec["replicas"] == 1
        assert spec["template"]["spec"]["containers"][0]["args"][-1] == f"endpoint:{index}"
    scaled = {name for kind, name in found if kind == "ScaledObject"}
    assert scaled == {f"worker-{name}" for name in ("gpu-realtime", "tpu-bulk", "cpu-batch", "gpu-vllm", "gpu-spot")}
    router = pods(everything)["router"]["containers"][0]["env"]
    [starts] = [one["value"] for one in router if one["name"] == "TAXIWAY_STARTS"]
    assert starts == "cpu.batch,gpu.realtime,gpu.spot,gpu.vllm,tpu.bulk"


@pytest.mark.parametrize("autoscaler", ["keda", "controller"])
def test_another_fleet_has_a_worker_with_the_key_of_its_secret_that_nothing_scales(helm: Path, autoscaler: str) -> None:
    hardware = {"cpu.batch": OURS["hardware"]["cpu.batch"], "cloud": ANOTHER_FLEET}
    found = named(rendered(helm, {**OURS, "hardware": hardware, "autoscaler": autoscaler}))
    spec = found["Deployment", "worker-cloud-0"]["spec"]
    assert spec["replicas"] == 1
    (worker,) = spec["template"]["spec"]["containers"]
    (key,) = [one for one in worker["env"] if one["name"] == "CLOUD_KEY"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": "fleet-worker-cloud", "key": "key"}}
    ports = [port["port"] for rule in found["NetworkPolicy", "worker"]["spec"]["egress"] for port in rule["ports"]]
    assert 8443 in ports
    scaled = {name for kind, name in found if kind in ("ScaledObject", "HardwareClass")}
    assert scaled == {"worker-cpu-batch"}
    (router,) = [one for one in pods([*found.values()])["router"]["containers"] if one["name"] == "router"]
    assert "CLOUD_KEY" not in {one["name"] for one in router["env"]}, "no other process than its worker has the key"
    (reaching,) = found["NetworkPolicy", "worker"]["spec"]["podSelector"]["matchExpressions"]
    assert reaching["values"] == ["worker"]


def test_routers_connect_to_a_site_that_the_fleet_takes_work_from_with_its_key(helm: Path) -> None:
    cloud = {**ANOTHER_FLEET, "endpoint": {**ANOTHER_FLEET["endpoint"], "serves": "cloud"}}
    hardware = {"cpu.batch": OURS["hardware"]["cpu.batch"], "cloud": cloud}
    found = named(rendered(helm, {**OURS, "hardware": hardware}))
    (router,) = [one for one in pods([*found.values()])["router"]["containers"] if one["name"] == "router"]
    (key,) = [one for one in router["env"] if one["name"] == "CLOUD_KEY"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": "fleet-worker-cloud", "key": "key"}}
    (reaching,) = found["NetworkPolicy", "worker"]["spec"]["podSelector"]["matchExpressions"]
    assert reaching["values"] == ["worker", "router"]


@pytest.mark.parametrize("autoscaler", ["keda", "hpa"])
def test_autoscalers_follow_the_router_down_at_once(helm: Path, autoscaler: str) -> None:
    found = named(rendered(helm, *EVERYTHING, {"autoscaler": autoscaler}, options=("--kube-version", "1.35.0")))
    if autoscaler == "keda":
        spec = found["ScaledObject", "worker-gpu-vllm"]["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"], spec["cooldownPeriod"]) == (1, 4, 0)
        assert spec["fallback"] == {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicas"}
        assert spec["triggers"][0]["metadata"]["url"].endswith(":8080/v1/scaling/gpu.vllm")
        behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        behaviour = found["HorizontalPodAutoscaler", "worker-gpu-vllm"]["spec"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == 0
    assert behaviour["scaleDown"]["tolerance"] == behaviour["scaleUp"]["tolerance"] == "0"


def test_nothing_reaches_valkey_but_the_fleet(everything: list[Any]) -> None:
    policies = {name: one["spec"] for (kind, name), one in named(everything).items() if kind == "NetworkPolicy"}
    assert policies["fleet"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["fleet"]
    [rule] = policies["valkey"]["ingress"]
    [peer] = rule["from"]
    fleets = {"router", "worker", "tuner", "flower", "valkey"}
    assert set(peer["podSelector"]["matchExpressions"][0]["values"]) == fleets
    ports = {one["port"] for one in policies["worker"]["egress"][0]["ports"]}
    assert ports == {80, 443, 8000, 8123}


def test_a_pools_workers_are_told_what_its_nodes_cost(helm: Path) -> None:
    spot = {**FLEET["hardware"]["gpu.spot"], "price": {"usd_per_hour": 3, "spot_usd_per_hour": 1.5}}
    pools = [
        {"name": "demand", "accelerator": "nvidia-l4", "capacity": "on-demand"},
        {"name": "large", "accelerator": "nvidia-tesla-a100", "usd_per_hour": 4.25},
    ]
    classes = {"gpu.spot": {"accelerator": "nvidia-l4", "pools": pools}}
    values = {"hardware": {"gpu.spot": spot}, "classes": classes, "autoscaler": "controller"}
    found = pods(rendered(helm, *EVERYTHING, values))
    stated = {
        name.removeprefix("worker-"): one["value"]
        for name, pod in found.items()
        for one in pod["containers"][0].get("env", [])
        if one["name"] == "TAXIWAY_USD_PER_HOUR"
    }
    assert {name: price for name, price in stated.items() if name.startswith("gpu-spot")} == {
        "gpu-spot": "1.5", "gpu-spot-demand": "3", "gpu-spot-large": "4.25",
    }  # fmt: skip
    assert stated["cpu-batch"] == "0.05"
    assert "far-0" not in stated  # a server elsewhere is on no node of ours
