"""One trace a job, over real processes: a producer, a router and a worker, each with OpenTelemetry's SDK."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.settings import TREE, Settings
from tests.integration.router.test_mover import fleet_of, twins
from tests.producing import infer_body
from tests.routing import EchoDevice, eventually, router_process
from tests.spans import export_to, exported
from tests.working import worker_process

__all__ = ["twins"]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

SPANS = 7
"""Those of a job that was moved once."""

PRODUCER = """
import os, sys, taxiway
from tasks.telemetry import start_tracing
start_tracing("shop", os.environ)
with taxiway.Client(sys.argv[1]) as client:
    for number in range(60):
        client.submit("paced", str(number))
"""


@pytest.fixture
def spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in export_to(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def a_moved_trace(spans: Path) -> list[dict[str, Any]]:
    """The spans of a job that was moved once and has its result."""
    traces: dict[str, list[dict[str, Any]]] = {}
    for span in exported(spans):
        traces.setdefault(span["trace"], []).append(span)
    moved = [trace for trace in traces.values() if [span["name"] for span in trace].count("move") == 1]
    whole = [trace for trace in moved if len(trace) == SPANS]
    return whole[0] if whole else []


def test_a_moved_jobs_trace_goes_from_its_submission_to_its_result(twins: Settings, spans: Path) -> None:
    with fleet_of(twins) as fleet, ExitStack() as stack:
        stack.enter_context(router_process(twins))
        stack.enter_context(EchoDevice(twins, hardware_class="cpu.a", answering=False))
        subprocess.run([sys.executable, "-c", PRODUCER, twins.broker], cwd=TREE, check=True)
        eventually(lambda: fleet.waiting("cpu.a") == 60)
        stack.enter_context(worker_process(twins, "--class", "cpu.b"))
        trace = eventually(lambda: a_moved_trace(spans), within=120)
    names = {span["id"]: span["name"] for span in trace}
    assert [(names.get(span["parent"]), span["name"]) for span in trace] == [
        (None, "submit"),
        ("submit", "place"),
        ("place", "wait"),
        ("place", "move"),
        ("move", "wait"),
        ("move", "run"),
        ("move", "result"),
    ]
    submit, place, first, move, second, run, result = trace
    assert [span["service"] for span in trace] == ["shop", *["taxiway-router"] * 3, *["taxiway-worker"] * 3]
    assert len({span["job"] for span in trace}) == 1
    assert (first["class"], second["class"]) == ("cpu.a", "cpu.b")
    assert (place["class"], move["source"], move["target"], run["class"]) == ("cpu.a", "cpu.a", "cpu.b", "cpu.b")
    assert first["end"] == move["start"] == pytest.approx(second["start"], abs=4000)
    assert (second["end"], run["end"]) == (run["start"], result["start"])
    assert submit["start"] < place["end"] <= first["start"]


def test_the_http_api_continues_a_callers_trace_and_returns_the_jobs(settings: Settings, spans: Path) -> None:
    url, body = "/v2/models/echo/infer", infer_body("a")
    sampled, unsampled = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
    with router_process(settings) as router, httpx.Client(base_url=router.http) as http:
        refused = http.post(url, json=body, headers={"traceparent": sampled})
        assert refused.headers["traceparent"] == sampled
        with EchoDevice(settings):
            answer = http.post(url, json=body, headers={"traceparent": sampled, "tracestate": "shop=1"})
            assert http.post(url, json=body, headers={"traceparent": unsampled}).headers["traceparent"] == unsampled
            assert "traceparent" not in http.post(url, json=body).headers
        failed, placed = eventually(lambda: found if len(found := exported(spans)) == 2 else None)
    assert (failed["name"], failed["error"], refused.json()["code"]) == ("place", "no_device", "no_device")
    assert answer.headers["traceparent"] == f"00-{TRACE}-{placed['id']}-01"
    assert (placed["trace"], placed["parent"], placed["class"]) == (TRACE, SPAN, "cpu.batch")
