"""A plan in the state store: routers follow it within a second, ignore what is stale or broken, and explain which."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from router.decide.plan import STALE, Cell, ClassPlan, Density, LatestTuning, Plan
from tasks.settings import Settings
from taxiway.contract.keys import ARRIVALS, PLAN, TUNER, TUNING, job_key
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from tests.routing import HTTP, EchoDevice, RouterProcess, eventually, router_process
from tests.waiting import BUSY


@pytest.fixture
def router(settings: Settings) -> Iterator[RouterProcess]:
    """A router before a device of two classes: cpu.batch is cheaper than tpu.bulk."""
    devices = [EchoDevice(settings, hardware_class=name) for name in ("cpu.batch", "tpu.bulk")]
    with devices[0], devices[1], router_process(settings) as router:
        yield router


def a_plan(store: Any, *classes: str, age: float = 0.0) -> bytes:
    cell = Cell(model="echo:1", service="standard", classes=classes)
    used = {classes[0]: ClassPlan(rule=Density(), devices=1)}
    return msgspec.json.encode(Plan(number=1, made=store.time()[0] - age, cells=(cell,), classes=used))


def placed(store: Any) -> tuple[str, str, str]:
    """The class of a new job with its reason, and its id."""
    job = str(uuid.uuid4())
    store.lpush(ARRIVALS, infer_message(job, Request(model="echo", inputs="x"), reply="", origin="test"))
    fields = ("hardware_class", "reason")
    name, reason = eventually(lambda: all(found := store.hmget(job_key(job), fields)) and found)
    return name.decode(), reason.decode(), job


def followed(store: Any, beginning: str) -> tuple[str, str, str]:
    """The first new job whose reason begins so."""
    return eventually(lambda: (one := placed(store))[1].startswith(beginning) and one)


def test_a_stored_plan_decides_the_class_and_the_job_explains_so(store: Any, router: RouterProcess) -> None:
    assert placed(store)[0] == "cpu.batch"
    store.set(PLAN, a_plan(store, "tpu.bulk", "cpu.batch"))
    began = time.monotonic()
    name, _, job = followed(store, "planned: ")
    assert time.monotonic() - began < 3 + BUSY
    assert name == "tpu.bulk"

    explained = HTTP.get(f"{router.http}/v2/jobs/{job}/placement").json()

    rows = {row["hardware_class"]: row["why_not"] for row in explained["considered"]}
    assert rows["cpu.batch"] == "not planned: the plan prefers tpu.bulk"
    assert rows["tpu.bulk"] is None


def test_a_plan_that_is_stale_or_broken_is_not_followed_and_the_reason_says_so(
    store: Any, router: RouterProcess
) -> None:
    store.set(PLAN, a_plan(store, "tpu.bulk", age=STALE + 10))
    assert followed(store, "no plan: plan 1 is stale")[0] == "cpu.batch"
    store.set(PLAN, b"{")
    assert followed(store, "no plan: the stored plan cannot be read: ")[0] == "cpu.batch"
    store.delete(PLAN)
    assert followed(store, "cheapest")[0] == "cpu.batch"


def test_the_overview_has_the_plan_its_followers_and_the_tuners_findings(store: Any, router: RouterProcess) -> None:
    def plan() -> Any:
        return HTTP.get(f"{router.http}/v2/fleet").json()["plan"]

    assert plan() is None
    store.set(PLAN, a_plan(store, "tpu.bulk", "cpu.batch", age=30.0))
    stated = LatestTuning(tuner="here-1", at=store.time()[0] - 30, adopted=True, why="16% better", score=3.0)
    store.set(TUNING, msgspec.json.encode(stated))
    store.set(TUNER, "here-1#7")

    shown = eventually(lambda: (one := plan()) and one["followers"] and one)

    assert (shown["number"], shown["followers"], shown["routers"], shown["not_followed"]) == (1, 1, 1, "")
    assert 29 < shown["age"] < 60
    (cell,) = shown["cells"]
    assert (cell["model"], cell["service"], cell["locality"]) == ("echo:1", "standard", None)
    assert (cell["prefers"], cell["until_then"], cell["in_time"]) == ("tpu.bulk", None, 1.0)
    assert (shown["tuner"], shown["adopted"], shown["found"]) == ("here-1", True, "16% better")
    store.set(PLAN, a_plan(store, "tpu.bulk", age=STALE + 10))
    stale = eventually(lambda: (one := plan())["not_followed"] and not one["followers"] and one)
    assert stale["not_followed"] == "plan 1 is stale (older than 600 s)"
