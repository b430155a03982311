from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tasks.manifests import Cluster, manifests, written
from tasks.topology import HardwareClass, load_topology, parse_topology

ROOT = Path(__file__).parents[2]
SPOT = """
hardware:
  gpu.spot:
    device: cuda
    runtimes: [onnx]
    max_batch: 8
    max_wait: 0.01
    capacity: spot
    price: {usd_per_hour: 1, spot_usd_per_hour: 0.3}
    scaling: {minimum: 1, maximum: 4, start: 90}
service: {standard: {deadline: 5}}
default_service: standard
"""

ENGINE = """
hardware:
  gpu.vllm:
    device: endpoint
    endpoint: {protocol: openai, url: ["http://a/v1", "http://b/v1"], slots: 8, models: {chat: m}, key_env: VLLM_KEY}
    price: {usd_per_hour: 1}
service: {standard: {deadline: 5}}
default_service: standard
"""


def of(hardware: dict[str, HardwareClass]) -> dict[tuple[str, str], Any]:
    text = written(manifests(hardware, "hardware: {}", Cluster()))
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


@pytest.mark.parametrize("queues", [(ROOT / "queues.yaml").read_text(), SPOT, ENGINE], ids=["ours", "spot", "engine"])
def test_kubernetes_accepts_every_manifest(queues: str) -> None:
    for manifest in of(parse_topology(queues).hardware).values():
        if not manifest["apiVersion"].startswith("keda.sh/"):
            kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_each_class_is_a_deployment_that_keda_scales_by_what_a_router_says() -> None:
    hardware = load_topology(ROOT / "queues.yaml").hardware
    found = of(hardware)
    for name in hardware:
        called = f"worker-{name.replace('.', '-')}"
        assert "replicas" not in found["Deployment", called]["spec"]
        scaled = found["ScaledObject", called]["spec"]
        assert scaled["scaleTargetRef"] == {"name": called}
        (trigger,) = scaled["triggers"]
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["url"].endswith(f":8080/v1/scaling/{name}")
        assert ("PodDisruptionBudget", called) in found
        assert (trigger["metadata"]["authMode"], trigger["authenticationRef"]) == ("bearer", {"name": "router"})
    pod = found["Deployment", "router"]["spec"]["template"]["spec"]
    assert {"name": "TAXIWAY_STARTS", "value": ",".join(hardware)} in pod["containers"][0]["env"]
    (token,) = found["TriggerAuthentication", "router"]["spec"]["secretTargetRef"]
    assert (token["name"], token["parameter"]) == ("taxiway", "token")


def test_each_replica_of_an_endpoint_has_a_worker_with_its_key_that_keda_leaves_alone() -> None:
    found = of(parse_topology(ENGINE).hardware)
    for index in (0, 1):
        spec = found["Deployment", f"worker-gpu-vllm-{index}"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert (spec["replicas"], container["args"]) == (1, ["--class", "gpu.vllm", "--device", f"endpoint:{index}"])
        key = {"name": "VLLM_KEY", "valueFrom": {"secretKeyRef": {"name": "worker-gpu-vllm", "key": "key"}}}
        assert key in container["env"]
    assert not [name for kind, name in found if kind == "ScaledObject"]
    router = found["Deployment", "router"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "TAXIWAY_STARTS", "value": ""} in router["env"]


def test_routers_in_a_cluster_let_in_who_has_a_key_only() -> None:
    pod = of(load_topology(ROOT / "queues.yaml").hardware)["Deployment", "router"]["spec"]["template"]["spec"]
    assert {"name": "TAXIWAY_KEYS", "value": "/keys/keys.jsonl"} in pod["containers"][0]["env"]
    assert {"name": "keys", "secret": {"secretName": "taxiway-keys"}} in pod["volumes"]


def test_a_spot_class_runs_where_spot_nodes_are_and_makes_room_first() -> None:
    found = of(parse_topology(SPOT).hardware)
    pod = found["Deployment", "worker-gpu-spot"]["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "taxiway-spot"
    assert pod["tolerations"][0]["key"] == "taxiway/spot"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    scaled = found["ScaledObject", "worker-gpu-spot"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"], scaled["cooldownPeriod"]) == (1, 4, 90)


def test_pods_are_hardened_and_have_time_to_drain() -> None:
    for (kind, name), manifest in of(load_topology(ROOT / "queues.yaml").hardware).items():
        if kind == "Deployment":
            pod = manifest["spec"]["template"]["spec"]
            assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
            assert pod["terminationGracePeriodSeconds"] >= (40 if name == "router" else 120)
