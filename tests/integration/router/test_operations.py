"""What operators see of a fleet: overview, `taxiway top`, scaling and metrics."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tasks.settings import Settings
from taxiway.contract.keys import STARTS
from tests.command_line import program
from tests.producing import infer_body
from tests.routing import echo_fleet, eventually


@pytest.fixture(scope="module")
def http(lasting: Settings) -> Iterator[httpx.Client]:
    """The HTTP API of a router whose device answers nothing, with three bulk jobs that wait."""
    with echo_fleet(lasting, answering=False) as fleet:
        for _ in range(3):
            submit(fleet.http, service="bulk")
        yield fleet.http


def submit(http: httpx.Client, **terms: Any) -> str:
    answer = http.post("/v2/models/echo/infer", json=infer_body("x", **terms), headers={"prefer": "respond-async"})
    assert answer.status_code == 202
    return str(answer.json()["id"])


def overview(http: httpx.Client) -> dict[str, Any]:
    return http.get("/v2/fleet").json()


def test_the_overview_counts_what_waits_and_since_when(http: httpx.Client) -> None:
    one = eventually(lambda: (found := overview(http)["classes"]["cpu.batch"])["devices"] == 1 and found)
    assert sum(one["depth"]) == 3
    assert 0 < one["oldest"] < 30
    assert one["warm"] == ["echo:1"]
    assert one["spending"] == one["usd_per_hour"] == 0.05
    assert overview(http)["classes"]["gpu.realtime"]["devices"] == 0


def test_a_jobs_position_counts_the_jobs_that_come_before_it(settings: Settings) -> None:
    with echo_fleet(settings, answering=False) as fleet:

        def positions(*jobs: str) -> list[int]:
            return [fleet.http.get(f"/v2/jobs/{job}").json()["position"] for job in jobs]

        first, second = submit(fleet.http, service="bulk"), submit(fleet.http, service="bulk")
        assert positions(first, second) == [0, 1]
        urgent = submit(fleet.http, service="standard", deadline=60)
        assert positions(urgent, first, second) == [0, 1, 2]
        fleet.http.delete(f"/v2/jobs/{first}")
        assert positions(urgent, second) == [0, 1]


def test_a_class_has_replicas_with_a_reason_that_a_get_leaves_alone_and_starts_that_are_declared_by_post(
    http: httpx.Client, state: redis.Redis
) -> None:
    eventually(lambda: http.get("/v1/scaling/cpu.batch").json().get("replicas") == 1)
    assert set(http.get("/v1/scaling/cpu.batch").json()) == {"class", "replicas", "devices", "reason"}
    assert http.get("/v1/scaling/gpu.realtime").json()["replicas"] == 0
    assert http.get("/v1/scaling/nowhere").status_code == 404
    assert http.get("/v1/scaling/gpu.realtime", params={"starts": "true"}).status_code == 200
    assert state.hkeys(STARTS) == []
    said = http.post("/v1/scaling/gpu.realtime/starts")
    assert (said.status_code, said.json()) == (200, http.get("/v1/scaling/gpu.realtime").json())
    assert state.hkeys(STARTS) == [b"gpu.realtime"]
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
        done = program("api", "--port", port, settings=settings)

    assert done.returncode == 3
    [line] = [line for line in map(json.loads, done.stderr.splitlines()) if line["level"] == "critical"]
    assert (line["event"], line["address"]) == ("cannot listen", f"127.0.0.1:{port}")
