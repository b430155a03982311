"""What operators see of a fleet: overview, `taxiway top`, scaling and metrics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tasks.settings import TREE, Settings
from taxiway.contract.keys import STARTS
from tests.routing import EchoDevice, eventually, router_process


@pytest.fixture
def http(settings: Settings) -> Iterator[httpx.Client]:
    """The HTTP API of a router whose device answers nothing, with three bulk jobs that wait."""
    row = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    body = {"inputs": [row], "parameters": {"service": "bulk"}}
    with (
        EchoDevice(settings, answering=False),
        router_process(settings) as router,
        httpx.Client(base_url=router.http, timeout=30, trust_env=False) as client,
    ):
        for _ in range(3):
            answer = client.post("/v2/models/echo/infer", json=body, headers={"prefer": "respond-async"})
            assert answer.status_code == 202
        yield client


def overview(http: httpx.Client) -> dict[str, Any]:
    return http.get("/v2/fleet").json()


def top(http: httpx.Client, *options: str) -> str:
    command = [sys.executable, "-m", "taxiway", "top", "--url", str(http.base_url), *options]
    return subprocess.run(
        command, cwd=TREE, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True
    ).stdout


def test_the_overview_counts_what_waits_and_since_when(http: httpx.Client) -> None:
    one = eventually(lambda: (found := overview(http)["classes"]["cpu.batch"])["devices"] == 1 and found)
    assert sum(one["depth"]) == 3
    assert 0 < one["oldest"] < 30
    assert one["warm"] == ["echo:1"]
    assert one["spending"] == one["usd_per_hour"] == 0.05
    assert overview(http)["classes"]["gpu.realtime"]["devices"] == 0


def test_a_jobs_position_counts_the_jobs_that_come_before_it(http: httpx.Client) -> None:
    def submit(**terms: Any) -> str:
        row = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["x"]}
        body = {"inputs": [row], "parameters": terms}
        return http.post("/v2/models/echo/infer", json=body, headers={"prefer": "respond-async"}).json()["id"]

    def positions(*jobs: str) -> list[int]:
        return [http.get(f"/v2/jobs/{job}").json()["position"] for job in jobs]

    first, second = submit(service="bulk"), submit(service="bulk")  # behind the three that wait
    assert positions(first, second) == [3, 4]
    urgent = submit(service="standard", deadline=60)
    assert positions(urgent, first, second) == [0, 4, 5]
    http.delete(f"/v2/jobs/{first}")
    assert positions(urgent, second) == [0, 4]


def test_top_fits_80_columns_and_names_every_class(http: httpx.Client) -> None:
    eventually(lambda: overview(http)["classes"]["cpu.batch"]["devices"] == 1)
    shown = top(http, "--once")
    assert max(map(len, shown.splitlines())) <= 80
    assert "1 devices  3 waiting  $0.05/h" in shown
    assert all(name in shown for name in ("cpu.batch", "gpu.realtime", "tpu.bulk"))
    assert json.loads(top(http, "--json"))["classes"]["cpu.batch"]["devices"] == 1


def test_a_class_has_a_number_of_replicas_with_its_reason(http: httpx.Client) -> None:
    eventually(lambda: http.get("/v1/scaling/cpu.batch").json().get("replicas") == 1)
    assert set(http.get("/v1/scaling/cpu.batch").json()) == {"class", "replicas", "devices", "reason"}
    assert http.get("/v1/scaling/gpu.realtime").json()["replicas"] == 0
    assert http.get("/v1/scaling/nowhere").status_code == 404


def test_get_changes_nothing_and_starts_are_declared_by_post(http: httpx.Client, settings: Settings) -> None:
    eventually(lambda: http.get("/v1/scaling/gpu.realtime").status_code == 200)
    assert http.get("/v1/scaling/gpu.realtime", params={"starts": "true"}).status_code == 200
    with redis.Redis.from_url(settings.broker) as store:
        assert store.hkeys(STARTS) == []

        said = http.post("/v1/scaling/gpu.realtime/starts")

        assert (said.status_code, said.json()) == (200, http.get("/v1/scaling/gpu.realtime").json())
        assert store.hkeys(STARTS) == [b"gpu.realtime"]
    assert http.post("/v1/scaling/nowhere/starts").status_code == 404


def test_prometheus_reads_the_metrics(http: httpx.Client) -> None:
    eventually(lambda: overview(http)["classes"]["cpu.batch"]["devices"] == 1)
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    waiting = {tuple(s.labels.values()): s.value for s in families["taxiway_waiting"].samples}
    assert sum(value for (name, _), value in waiting.items() if name == "cpu.batch") == 3
    (placed,) = families["taxiway_placed"].samples
    assert (placed.labels, placed.value) == ({"class": "cpu.batch", "model": "echo:1"}, 3)


def test_a_router_whose_port_is_taken_says_so_in_one_line(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        command = [sys.executable, "-m", "api", "--port", port]
        environment = {**os.environ, **settings.environment()}
        done = subprocess.run(
            command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    assert done.returncode == 3
    [line] = [line for line in map(json.loads, done.stderr.splitlines()) if line["level"] == "critical"]
    assert (line["event"], line["address"]) == ("cannot listen", f"127.0.0.1:{port}")
