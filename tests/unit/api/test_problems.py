from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.operators.problems import problems
from api.operators.view import Calibration, FleetView, PlannedCell, PlanView, calibration
from api.routing.counters import LATELY, RecentOutcomes
from local.doctor import ClassReport, HeldBounds, calibrations
from tasks.heartbeat import DeviceFacts, Done, held_of, median_of
from tests.builders import a_device
from tests.unit.api.test_metrics import a_class, figures

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
    "failing": ({"failing": {"router@vm": "killed by SIGKILL"}}, "process router@vm", "killed by SIGKILL"),
    "silent": ({"silent": {"cpu.batch.cpu-0@vm": 12.4}}, "worker cpu.batch.cpu-0@vm", "no heartbeat for 12 s"),
    "clock": ({"clocks": {"router@vm": -90}}, "clock of router@vm", "90 s behind"),
    "fault": ({"devices": (a_device("hosted", worker="w@vm", fault="503"),)}, "w@vm", "out of service: 503"),
    "lacks": (
        {"classes": {"gpu": a_class(devices=2, replicas=7, lacks=5)}},
        "class gpu",
        "2 of 7 devices: the test says so",
    ),
    "missed": ({"ended": 14, "missed": 5}, "deadlines", "5 of the last 14 jobs missed theirs"),
    "refused": ({"refused": 6}, "requests", "6 of the last 6 were refused at once"),
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


@given(st.sets(st.sampled_from(sorted(TROUBLES.keys() - {"fault", "unavailable", "plan", "scarce"}))))
def test_no_trouble_hides_another_and_what_stops_the_fleet_comes_first(troubles: set[str]) -> None:
    view = WELL
    for trouble in troubles:
        view = msgspec.structs.replace(view, **TROUBLES[trouble][0])
    found = [one.subject for one in problems(view)]
    assert sorted(found) == sorted(TROUBLES[trouble][1] for trouble in troubles)
    assert "state store" not in found[len(troubles & {"stale", "disk"}) :]


def test_only_the_last_minutes_jobs_count_as_missed_or_refused_lately() -> None:
    lately = RecentOutcomes()
    done: dict[tuple[str, ...], int] = {("cpu", "succeeded"): 10, ("cpu", "expired"): 5}
    lately.observe([done], 3, 0.0)
    assert (lately.ended, lately.missed, lately.refused) == (0, 0, 0)
    lately.observe([{("cpu", "succeeded"): 12, ("cpu", "expired"): 6}, {("expired",): 1}], 5, 1.0)
    assert (lately.ended, lately.missed, lately.refused) == (4, 2, 2)
    lately.observe([{("cpu", "succeeded"): 13, ("cpu", "expired"): 6}, {("expired",): 1}], 6, LATELY + 1.0)
    assert (lately.ended, lately.missed, lately.refused) == (1, 0, 1)


def a_worker(*shares: float) -> DeviceFacts:
    """A worker that ended jobs which took these shares of "at most"."""
    return a_device("cpu", done={"cpu": Done(latency={"bound": tuple(figures(*shares))})})


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_jobs_within_their_bound_held_and_the_median_is_in_its_bucket(shares: list[float]) -> None:
    middle, median = sorted(shares)[(len(shares) - 1) // 2], median_of(figures(*shares))
    assert held_of(figures(*shares)) == (sum(share <= 1 for share in shares), len(shares))
    assert median_of(figures(middle)) <= 3 * median + 1e-9  # the bucket from 60 to 300
    assert median <= 10 * middle


def test_a_class_is_calibrated_by_what_all_its_live_workers_counted() -> None:
    assert calibration("cpu", [a_worker(0.4, 0.4, 2.0), a_worker(0.4)]) == Calibration(4, 0.75, 0.4167)
    assert calibration("cpu", [a_worker(), a_device("cpu")]) is None
    assert calibration("other", [a_worker(0.4)]) is None


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        (HeldBounds(100, 0.97, 0.5), [True]),
        (HeldBounds(100, 0.9, 0.5), [False]),
        (HeldBounds(100, 1.0, 0.2), [False]),
        (HeldBounds(19, 0.5, 0.5), []),
        (None, []),
    ],
)
def test_the_doctor_finds_bounds_that_fail_or_say_nothing(bounds: HeldBounds | None, found: list[bool]) -> None:
    assert [one.found for one in calibrations({"cpu": ClassReport(bounds)})] == found
