"""What the metrics count, and which troubles the doctor finds in them."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from api.operators.metrics import Latency, exposition
from api.operators.view import Calibration, ClassView, FleetView, PlannedCell, PlanView, calibration, problems
from api.routing.counters import LATELY, Counts, OutcomeCounters, RecentOutcomes
from local.doctor import calibrations
from tasks.heartbeat import BOUNDS, STAGES, DeviceFacts, Done, EndpointFacts, Use, count, empty, held_of, median_of
from tasks.topology import Price
from tests.builders import a_device
from tests.unit.router.decide.test_rebalance import two_classes

ROOT = Path(__file__).parents[3]


def figures(*seconds: float) -> list[float]:
    counted = empty()
    for one in seconds:
        count(counted, one)
    return counted


WORKERS = OutcomeCounters()
WORKERS.outcomes["gpu", "succeeded"] = 5
WORKERS.rejected["gpu",] = 8
WORKERS.used["gpu", "talk:1"] = Use(rows=3, aborted=1, input=10, cached=4, output=5)
WORKERS.dollars["gpu", "talk:1", "lab"] = 0.5
COUNTED: Mapping[str, Counts] = {
    "placed": {("gpu", "generate:1"): 7},
    "moved": {("gpu", "cpu", "save"): 2},
    "yields": {("gpu",): 3},
    "refused": {("overloaded",): 4},
    "ended": {("expired",): 6},
    "parked": {(): 9},
    "webhook_attempts": {("delivered",): 3},
    **WORKERS.counted(),
}
LATENCY: Latency = {("gpu", stage): figures(0.03, 9000.0) for stage in (*STAGES, "bound", "first", "token")}
ENDPOINT = a_device("gpu", kind="endpoint", endpoint=EndpointFacts(state="half-open"))


def a_class(**changes: object) -> ClassView:
    facts: dict[str, object] = {
        "device": "cuda",
        "devices": 2,
        "emulated": 1,
        "usd_per_hour": 0.71,
        "spending": 1.42,
        "utilisation": 0.5,
        "depth": (1, 2, 0, 4),
        "oldest": 1.5,
        "work": (0.1, 0.2, 0.0, 3.0),
        "held": (0.0, 0.0, 0.0, 9.0),
        "rows_per_second": 12.5,
        "running": 3,
        "warm": ("generate:1",),
        "replicas": 3,
        "lacks": 1,
        "why": "the test says so",
        "price": Price(1.0),
    }
    return ClassView(**(facts | changes))  # type: ignore[arg-type]


def families(**changes: object) -> list[Metric]:
    """What Prometheus reads of a fleet of one class."""
    devices = (*two_classes()[2].devices, ENDPOINT)
    classes = {"gpu": a_class(**changes)}
    view = FleetView(stale=False, now=0.0, held=3, dead=1, classes=classes, devices=devices, moves=())
    return [*text_string_to_metric_families(exposition(view, COUNTED, LATENCY).decode())]


def samples(**changes: object) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for family in families(**changes) for s in family.samples}


def test_every_figure_of_a_class_is_a_sample_that_prometheus_reads() -> None:
    found = samples()
    assert found["taxiway_devices", "gpu"] == 2
    assert found["taxiway_waiting", "gpu", "3"] == 4
    assert found["taxiway_held_seconds", "gpu", "3"] == 9
    assert found["taxiway_wanted_replicas", "gpu"] == 3
    assert found["taxiway_placed_total", "gpu", "generate:1"] == 7
    assert found["taxiway_moved_total", "save", "gpu", "cpu"] == 2
    assert found["taxiway_stale",] == 0
    assert (found["taxiway_held_jobs",], found["taxiway_dead_letters",]) == (3, 1)
    assert found["taxiway_refused_total", "overloaded"] == 4
    assert found["taxiway_ended_total", "expired"] == 6
    assert (found["taxiway_parked_total",], found["taxiway_rejected_total", "gpu"]) == (9, 8)
    assert found["taxiway_results_total", "gpu", "succeeded"] == 5
    assert [found["taxiway_tokens_total", "gpu", kind, "talk:1"] for kind in ("input", "cached", "output")] == [6, 4, 5]
    assert found["taxiway_usd_total", "gpu", "talk:1", "lab"] == 0.5
    assert found["taxiway_aborts_total", "gpu", "talk:1"] == 1
    assert found["taxiway_endpoints", "gpu", "half-open"] == 1
    assert ("taxiway_wanted_replicas", "gpu") not in samples(replicas=None)
    assert [found["taxiway_run_seconds_bucket", "gpu", most] for most in ("0.025", "0.05", "+Inf")] == [0, 1, 2]
    assert (found["taxiway_run_seconds_count", "gpu"], found["taxiway_run_seconds_sum", "gpu"]) == (2, 9000.03)
    assert ("taxiway_latency_seconds_sum", "gpu") in found


def test_the_metrics_page_and_the_dashboard_name_each_metric_and_its_labels_and_no_other() -> None:
    documented = re.findall(r"^\| `(taxiway_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    asked = " ".join(queries(json.loads((ROOT / "docker" / "grafana" / "taxiway.json").read_text())))
    grouped = {name.strip() for names in re.findall(r"by \(([^)]*)\)", asked) for name in names.split(",")}
    exposed = {f"{one.name}_total" if one.type == "counter" else one.name for one in families() if one.samples}

    assert {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"taxiway_\w+", asked)} == exposed
    assert {*documented} == exposed
    assert grouped <= {name for family in families() for sample in family.samples for name in sample.labels}


def queries(node: Any) -> Iterator[str]:
    """Every PromQL expression of a dashboard."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == "expr")
        yield from (query for below in node.values() for query in queries(below))
    elif isinstance(node, list):
        yield from (query for below in node for query in queries(below))


def a_worker(name: str, succeeded: int, *latencies: float) -> DeviceFacts:
    done = Done({"succeeded": succeeded}, {"run": tuple(figures(*latencies))})
    return a_device("cpu", worker=name, done={"cpu": done})


def test_rejected_messages_are_counted_also_by_a_worker_that_ends_no_job() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([])
    for rejected in (3, 5, 1):  # the last is another process under that name
        outcomes.update([msgspec.structs.replace(a_worker("a", 0), done={"cpu": Done(rejected=rejected)})])
    assert outcomes.rejected["cpu",] == 6


def test_latencies_add_up_over_workers_by_bucket() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([])
    outcomes.update([a_worker("a", 1, 0.001, 7200.0), a_worker("b", 1, 0.0005)])
    figures = outcomes.latency["cpu", "run"]
    assert (figures[0], figures[len(BOUNDS)], figures[-1]) == (2, 1, 7200.0015)
    assert sum(figures[:-1]) == 3


def test_use_and_dollars_add_up_over_workers() -> None:
    def done(rows: int, dollars: float) -> dict[str, Done]:
        return {"cpu": Done({"succeeded": rows}, used={"m:1": Use(rows=rows)}, dollars={"m:1": {"lab": dollars}})}

    outcomes = OutcomeCounters()
    outcomes.update([msgspec.structs.replace(a_worker("a", 0), done=done(2, 0.5))])
    outcomes.update([msgspec.structs.replace(a_worker(name, 0), done=done(3, 0.75)) for name in "ab"])
    assert outcomes.used == {("cpu", "m:1"): Use(rows=4)}
    assert outcomes.dollars == {("cpu", "m:1", "lab"): 1.0}


WELL = FleetView(
    stale=False, now=0.0, held=3, dead=0, classes={"gpu": a_class(lacks=0)}, devices=(a_device("gpu"),), moves=()
)
PLAN = PlanView(
    number=7, age=9.0, not_followed="", followers=1, routers=1, score=None, cells=(), tuner="vm", tuned=3.0, found=""
)
SCARCE = PlannedCell(model="chat:1", service="live", locality=None, prefers="gpu", in_time=0.12)
TROUBLES: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "stale": ({"stale": True}, "state store", "does not answer"),
    "disk": ({"refuses": True}, "state store", "cannot write to its disk"),
    "memory": ({"memory": 0.93}, "state store", "uses 93% of its memory limit"),
    "failing": ({"failing": {"router@vm": "killed by SIGKILL"}}, "process router@vm", "killed by SIGKILL"),
    "silent": ({"silent": {"cpu.batch.cpu-0@vm": 12.4}}, "worker cpu.batch.cpu-0@vm", "no heartbeat for 12 s"),
    "clock": ({"clocks": {"router@vm": -90}}, "clock of router@vm", "90 s behind"),
    "fault": ({"devices": (a_device("hosted", worker="w@vm", fault="503"),)}, "w@vm", "out of service: 503"),
    "pause": (
        {"devices": (a_device("hosted", worker="w@vm", endpoint=EndpointFacts(state="closed", pause=58.2)),)},
        "w@vm",
        "asked to be sent nothing for 58 s",
    ),
    "lacks": (
        {"classes": {"gpu": a_class(devices=2, replicas=7, lacks=5)}},
        "class gpu",
        "2 of 7 devices: the test says so",
    ),
    "missed": ({"ended": 14, "missed": 5}, "deadlines", "5 of the last 14 jobs missed theirs"),
    "refused": ({"refused": 6}, "requests", "6 of the last 6 were refused at once: no device would have"),
    "deviceless": ({"refused": 6, "deviceless": 6}, "requests", "6 of the last 6 were refused at once: no live device"),
    "invalid": (
        {"queues_wrong": {"a": "hardware: none", "b": "hardware: none"}},
        "queues.yaml",
        "by a, b: hardware: none",
    ),
    "restart": ({"restart": ("router@vm", "w@vm")}, "queues.yaml", "restart needed of router@vm, w@vm"),
    "disabled": ({"disabled": {"ocr": "no graph"}}, "model ocr", "is disabled: no graph"),
    "outdated": ({"outdated": {"ocr:1": "no graph"}}, "model ocr:1", "last valid version: no graph"),
    "unavailable": (
        {"devices": (a_device("gpu", worker="w@vm", unavailable={"chat:1/engine": "lists no model 'chat'"}),)},
        "chat:1/engine",
        "unavailable on w@vm: lists no model 'chat'",
    ),
    "plan": ({"plan": msgspec.structs.replace(PLAN, not_followed="plan 7 is stale")}, "plan", "plan 7 is stale"),
    "scarce": (
        {"plan": msgspec.structs.replace(PLAN, cells=(SCARCE, msgspec.structs.replace(SCARCE, in_time=0.95)))},
        "live chat:1",
        "12% in time by the plan, on gpu",
    ),
    "tuner": ({"plan": msgspec.structs.replace(PLAN, tuner="")}, "tuner", "no tuner at work"),
    "dead": ({"dead": 2}, "dead letters", "were given up: 2"),
    "webhooks": ({"webhooks_dead": 1}, "webhooks", "were given up: 1"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_one_problem_that_says_what_to_do(trouble: str) -> None:
    changes, subject, text = TROUBLES[trouble]
    (found,) = problems(msgspec.structs.replace(WELL, **changes))
    assert found.subject == subject
    assert text in found.text
    assert found.remedy


def test_only_the_last_minutes_jobs_count_as_missed_or_refused_lately() -> None:
    lately = RecentOutcomes()
    done: dict[tuple[str, ...], int] = {("cpu", "succeeded"): 10, ("cpu", "expired"): 5}
    lately.observe([done], (3, 1), 0.0)
    assert (lately.ended, lately.missed, lately.refused, lately.deviceless) == (0, 0, 0, 0)
    lately.observe([{("cpu", "succeeded"): 12, ("cpu", "expired"): 6}, {("expired",): 1}], (5, 2), 1.0)
    assert (lately.ended, lately.missed, lately.refused, lately.deviceless) == (4, 2, 2, 1)
    lately.observe([{("cpu", "succeeded"): 13, ("cpu", "expired"): 6}, {("expired",): 1}], (6, 2), LATELY + 1.0)
    assert (lately.ended, lately.missed, lately.refused, lately.deviceless) == (1, 0, 1, 0)


def ended_in(*shares: float) -> DeviceFacts:
    """A worker that ended jobs which took these shares of "at most"."""
    return a_device("cpu", done={"cpu": Done(latency={"bound": tuple(figures(*shares))})})


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_jobs_within_their_bound_held_and_the_median_is_in_its_bucket(shares: list[float]) -> None:
    middle, median = sorted(shares)[(len(shares) - 1) // 2], median_of(figures(*shares))
    assert held_of(figures(*shares)) == (sum(share <= 1 for share in shares), len(shares))
    assert median_of(figures(middle)) <= 3 * median + 1e-9  # the bucket from 60 to 300
    assert median <= 10 * middle


def test_a_class_is_calibrated_by_what_all_its_live_workers_counted() -> None:
    assert calibration("cpu", [ended_in(0.4, 0.4, 2.0), ended_in(0.4)]) == Calibration(4, 0.75, 0.4167)
    assert calibration("cpu", [ended_in(), a_device("cpu")]) is None
    assert calibration("other", [ended_in(0.4)]) is None


@pytest.mark.cases("bounds, found")
def test_the_doctor_finds_bounds_that_fail_or_say_nothing(bounds: dict[str, float] | None, found: list[bool]) -> None:
    assert [one.found for one in calibrations({"cpu": {"bounds": bounds}})] == found
