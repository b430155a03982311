"""The tuner as a process on a real Valkey: from recorded arrivals to a plan that routers follow."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from broker.valkey import run
from broker.valkey.processes import lease_answer, lease_call, plan_call
from router.decide.plan import LatestTuning, Plan
from simulator.traces import TraceError
from simulator.tuning.command import WAIT, FleetTuner
from simulator.tuning.prior import parse_prior
from simulator.tuning.tuner import FIRST, PERIODS, REST, Trust
from tasks.history import JOB, LAG, SLICE, STATES, Arrivals, hour_of, pack, slice_of
from tasks.settings import TREE, Settings
from tasks.topology import load_topology
from taxiway.cli import USAGE
from taxiway.contract.keys import PLAN, STARTS, TUNER, TUNERS, TUNING, history_key
from tests.routing import EchoDevice, eventually

pytestmark = pytest.mark.slow

read_plan = msgspec.json.Decoder(Plan).decode

NAMES = {
    "model": ("echo:1", "paced:1"),
    "tenant": ("",),
    "service": ("standard", "bulk"),
    "locality": ("", "lab"),
    "hardware_class": ("",),
}


@pytest.fixture
def devices(settings: Settings) -> Iterator[None]:
    with EchoDevice(settings, hardware_class="cpu.batch"), EchoDevice(settings, hardware_class="tpu.bulk"):
        yield


def other_tuner(store: Any, seconds: float) -> str:
    """The token of another tuner that asks for the lease; empty if it does not get it."""
    return lease_answer(run(store, lease_call((TUNER, TUNERS), "other", seconds))).own


def record(store: Any, seconds: float = 300) -> None:
    """Two arrivals a second for so many seconds until now, a quarter of them private."""
    now = float(store.time()[0])
    for begin in range(slice_of(now - LAG - seconds), slice_of(now), SLICE):
        count = np.arange(2 * SLICE)
        jobs = np.zeros(len(count), JOB)
        jobs["arrival"] = begin + count / 2
        jobs["model"], jobs["service"] = count % 2, count // 2 % 2
        jobs["locality"] = count % 4 == 3
        jobs["deadline"] = np.where(jobs["service"] == 0, 5.0, 3600.0)
        jobs["rows"], jobs["size"], jobs["state"] = 1, 5, STATES.index("succeeded")
        jobs = jobs[jobs["arrival"] >= now - LAG - seconds]
        store.hset(history_key(hour_of(begin)), str(begin), pack(begin, Arrivals(NAMES, jobs)))


def tune(settings: Settings, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "simulator", "tune", "--once", "--json", *options]
    done = subprocess.run(command, cwd=TREE, env=environment(settings), capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    stated: dict[str, Any] = json.loads(done.stdout)
    return stated


def environment(settings: Settings) -> dict[str, str]:
    """A tuner gets no signing key."""
    known = {**os.environ, **settings.environment()}
    known.pop("TAXIWAY_SECRET")
    return known


def firsts(plan: Plan, locality: str | None) -> set[str]:
    return {cell.classes[0] for cell in plan.cells if cell.locality == locality}


def test_a_tuning_writes_a_plan_that_keeps_private_data_in_its_place(
    settings: Settings, store: Any, devices: None
) -> None:
    record(store)
    dry = tune(settings, "--dry-run")
    assert dry["adopted"]
    assert store.get(PLAN) is None
    assert store.get(TUNING) is None

    stated = tune(settings)

    plan = read_plan(store.get(PLAN))
    assert plan.number == stated["number"]
    assert plan.score == pytest.approx(stated["after"], abs=1e-3)
    assert {(cell.model, cell.service) for cell in plan.cells} >= {("echo:1", "standard"), ("paced:1", "bulk")}
    assert firsts(plan, "lab") == {"tpu.bulk"}
    assert firsts(plan, None) <= {"cpu.batch", "tpu.bulk"}
    assert stated["cells"]
    left = msgspec.json.decode(store.get(TUNING), type=LatestTuning)
    assert (left.adopted, left.why, left.score) == (True, stated["why"], stated["after"])
    again = tune(settings)
    assert (again["adopted"], again["number"], again["cells"]) == (False, stated["number"] + 1, [])


def test_before_anything_has_arrived_there_is_a_guess_without_devices_where_models_displace_one_another(
    settings: Settings, store: Any
) -> None:
    with EchoDevice(settings):
        assert not tune(settings)["adopted"]
    with EchoDevice(settings, memory=2**28):
        stated = tune(settings)
    assert stated["adopted"]
    assert stated["why"] == "too few arrivals are recorded: 0 in 0 s, so the plan is for what is expected"
    plan = read_plan(store.get(PLAN))
    topology = load_topology(settings.queues)
    assert {cell.service for cell in plan.cells if cell.model == "echo:1"} == set(topology.service)
    assert plan.guessed and not plan.classes
    record(store)
    assert tune(settings)["why"].endswith(" in 0 s"), "what came before the guess does not replace it"


def test_a_plan_for_a_mix_has_devices_until_requests_come(settings: Settings, store: Any, devices: None) -> None:
    stated = tune(settings, "--prior", "echo/bulk=3,paced=0.1")
    plan = read_plan(store.get(PLAN))
    assert {(cell.model, cell.service) for cell in plan.cells} == {("echo:1", "bulk"), ("paced:1", "standard")}
    assert all(planned.devices for planned in plan.classes.values())
    assert not tune(settings)["adopted"]
    record(store)
    assert tune(settings)["arrivals"] > stated["arrivals"] == 0


def test_a_prior_names_models_of_the_catalogue(settings: Settings, devices: None) -> None:
    command = [sys.executable, "-m", "simulator", "tune", "--once", "--prior", "ecko=1"]
    done = subprocess.run(command, cwd=TREE, env=environment(settings), capture_output=True, check=False, text=True)
    assert done.returncode == USAGE
    assert "--prior: expected models of the catalogue, got 'ecko'" in done.stderr


@pytest.mark.parametrize(("prior", "got"), [("echo", "'echo'"), ("echo=no", "'echo=no'"), ("echo=1,=2", "'=2'")])
def test_a_prior_that_is_none_is_refused(settings: Settings, prior: str, got: str) -> None:
    with pytest.raises(
        TraceError, match=re.escape(f"expected a CSV file, a day, or MODEL[/SERVICE]=RATE,…, got {got}")
    ):
        parse_prior(prior, settings.broker)


def test_a_first_plan_is_made_as_soon_as_the_history_is_long_enough(
    settings: Settings, store: Any, devices: None
) -> None:
    record(store, seconds=FIRST / 2)
    with closing(FleetTuner(settings, load_topology(settings.queues))) as tuner:
        stated, _ = tuner.tune(dry_run=False)
        span = float(stated.why.removesuffix(" s").rpartition(" ")[2])
        assert tuner.rest == pytest.approx(min(FIRST - span, REST), abs=1)
        record(store)
        assert tuner.tune(dry_run=False)[1] is not None
        assert tuner.rest == REST


def test_a_tuner_of_a_fleet_that_is_starting_looks_again_soon(settings: Settings) -> None:
    with closing(FleetTuner(settings, load_topology(settings.queues))) as tuner:
        assert tuner.tune(dry_run=False)[1] is None
        assert tuner.rest == WAIT


def test_a_plan_that_does_not_keep_what_it_promised_is_removed(settings: Settings, store: Any, devices: None) -> None:
    record(store)
    with closing(FleetTuner(settings, load_topology(settings.queues))) as tuner:
        assert tuner.due()
        assert tuner.tune(dry_run=False)[1] is not None
        assert not tuner.due()
        tuner._trust = Trust(float(store.time()[0]) - 600, spent=-1e6)
        tuner._trust.worse = PERIODS - 1
        stated, plan = tuner.tune(dry_run=False)
        assert plan is None
        assert "worse than predicted" in stated.why
        assert store.get(PLAN) == b""
        assert not tuner.due()


def test_a_plan_is_replaced_only_if_it_is_the_one_that_was_read(store: Any) -> None:
    assert run(store, plan_call(b"", b"first")) == 1
    assert run(store, plan_call(b"", b"second")) == 0
    assert run(store, plan_call(b"first", b"second")) == 1
    assert store.get(PLAN) == b"second"


def test_one_tuner_at_a_time_and_a_killed_one_changes_nothing(settings: Settings, store: Any, devices: None) -> None:
    record(store)
    before = msgspec.json.encode(Plan(number=7, made=float(store.time()[0]), cells=(), classes={}))
    store.set(PLAN, before)
    store.hset(STARTS, "cpu.batch", repr(float(store.time()[0])))
    other_tuner(store, 120.0)
    with tuner(settings) as process:
        assert b"tuner" in process.stdout.readline()
        assert store.get(TUNER).startswith(b"other#")
    assert process.returncode == 0
    other_tuner(store, 0.0)
    with tuner(settings, stop=signal.SIGKILL):
        eventually(lambda: store.exists(TUNER), within=60)
    held = store.get(PLAN)
    assert held == before or read_plan(held).number == 8


def test_a_tuner_waits_until_the_lease_of_one_that_was_killed_has_ended(settings: Settings, store: Any) -> None:
    other_tuner(store, 1.0)
    with closing(FleetTuner(settings, load_topology(settings.queues))) as tuner:
        assert not tuner.lead()
        eventually(tuner.lead)
        assert not other_tuner(store, 1.0)
    assert other_tuner(store, 1.0), "one that ends gives its lease up"


@contextmanager
def tuner(settings: Settings, stop: int = signal.SIGTERM) -> Iterator[Any]:
    """A tuner that runs until the end of the block, and is then sent a signal."""
    command = [sys.executable, "-m", "simulator", "tune"]
    with subprocess.Popen(command, cwd=TREE, env=environment(settings), stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.send_signal(stop)
            process.wait(60)
