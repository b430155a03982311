"""Where a real fleet runs what it gets, and what it says of that. Deadlines come from the fleet's own figures."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import taxiway
from local.fleet import LocalFleet
from taxiway.client.sync_client import Client
from taxiway.errors import DeadlineExceededError
from tests.routing import eventually

CPU, ACCELERATOR = "cpu.batch", "gpu.realtime"

ROOM = 10  # requests of a burst that the CPU class has time for


@pytest.fixture(scope="module")
def client(fleet: LocalFleet) -> Iterator[Client]:
    with taxiway.Client(fleet.http) as client:
        yield client


@pytest.fixture(autouse=True)
def calm(client: Client) -> None:
    """Nothing waits on the CPU class, nor on the accelerator class, when a test begins."""
    eventually(lambda: waits(client, CPU) == waits(client, ACCELERATOR) == 0, within=120)


def waits(client: Client, hardware_class: str) -> float:
    """Seconds that work of the last level would wait there."""
    answer = client.what_if("paced", "is anybody there?", service="bulk")
    return min(row["wait"] for row in answer["considered"] if row["hardware_class"] == hardware_class)


def soonest(answer: dict[str, Any], hardware_class: str, figure: str = "at_most") -> float:
    """The least of a figure over what was considered of a class."""
    return min(row[figure] for row in answer["considered"] if row["hardware_class"] == hardware_class)


def test_sentiment_at_low_load_runs_on_the_cpu(client: Client) -> None:
    job = client.submit("sentiment", "What a smooth and friendly flight, thank you!", deadline=30)
    report = job.result(timeout=60).report

    assert report.hardware_class == CPU
    assert report.reason.startswith("cheapest that meets 30 s")
    dearer = [row for row in job.placement()["considered"] if row["hardware_class"] != CPU]
    assert dearer
    assert all(row["cost"] > soonest(job.placement(), CPU, "cost") for row in dearer)


def test_a_burst_of_live_work_spills_from_the_cpu_and_returns(client: Client) -> None:
    rows = [f"row {n}" for n in range(1024)]  # 0.3 s: more than it takes to ask for another one

    def on_idle_devices() -> float:
        return ROOM * soonest(client.what_if("paced", rows, service="live", deadline=1), CPU)

    def ask(deadline: float) -> taxiway.Job:
        return client.submit("paced", rows, service="live", deadline=deadline)

    deadline = on_idle_devices()
    with ThreadPoolExecutor(2 * ROOM) as pool:
        burst = [ask(deadline), *pool.map(ask, [deadline] * (2 * ROOM - 1))]
    placed = [job.placement() for job in burst]
    for job in burst:
        with contextlib.suppress(DeadlineExceededError):
            job.result(timeout=60)
    eventually(lambda: waits(client, CPU) == 0, within=120)
    next_one = ask(on_idle_devices())  # the burst may have taught the fleet that its devices are slower

    assert placed[0]["hardware_class"] == CPU
    spilt = [one for one in placed if one["hardware_class"] != CPU and not one["moves"]]  # the rest was rebalanced
    assert spilt
    reasons = [one["reason"] for one in spilt]
    assert [why for why in reasons if f"{CPU}/paced is cheaper and " not in why] == []
    assert next_one.placement()["hardware_class"] == CPU
