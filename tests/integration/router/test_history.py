"""The history on a real Valkey: recorded by the leader from the jobs' records, and read back with outcomes."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from click.testing import Result

import taxiway
from broker.valkey.jobs import Ending
from lab.rows import read_trace
from router.decide.basis import basis_text
from router.decide.classify import Needs
from router.upkeep.recorder import Recorder
from simulator.__main__ import main as simulator
from simulator.own_fleet.history import History
from simulator.own_fleet.history import main as history_command
from tasks.history import LAG, OBSERVED_AGES, SLICE, STATES, Arrivals, ServiceLatency, hour_of, slice_of
from tasks.models.profiles import bin_of, tokens_of
from tasks.queues.limits import Limits
from tasks.settings import TREE, Settings
from taxiway.cli import MISSING
from taxiway.contract.job import JobState
from taxiway.contract.keys import HISTORY, LEAD, RECORDED, history_key, job_key
from tests.command_line import CommandLine, program
from tests.routing import EchoDevice, eventually, router_process
from tests.scripting import Store, placed
from tests.stored import fields_of

LIMITS = Limits()
BASIS = basis_text(Needs(deadline=5.0, level=1, rows=2, size=12), "s.1", (), np.zeros((0, 4)))


class Fleet:
    """The state store, with a clock for the leader; each leader is a new one."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self.settings, self.store, self.history = settings, Store(client), History(settings.broker)
        self.noted: list[ServiceLatency] = []
        self.began = slice_of(time.time() - 120)
        self.now = self.began + 0.5
        self.lead()

    def lead(self, limits: Limits = LIMITS, ticks: int = 1) -> None:
        """Let a router that was just elected do its duty."""

        async def ticked() -> None:
            recorder = Recorder(self.settings.broker, store, limits, self.noted.extend)
            for _ in range(ticks):
                await recorder.tick()
            await recorder.close()

        store: Any = SimpleNamespace(clock=SimpleNamespace(stored_now=lambda: self.now))
        asyncio.run(ticked())

    def accept(self, *jobs: str, after: float, **fields: str) -> None:
        """Forward jobs, accepted so many seconds after the begin."""
        at = self.began + after
        due = {"accepted": repr(at), "deadline_at": repr(at + 3600), "basis": BASIS, "tenant": "acme"}
        record = placed("j", b"m", hardware_class="cpu.batch", **due | fields)
        assert all(self.store.forward(*(msgspec.structs.replace(record, job=job) for job in jobs)))

    def finish(self, job: str, state: JobState = JobState.SUCCEEDED, **fields: Any) -> None:
        assert self.store.finish(Ending(job, state, b"answer", **fields)) == [1]

    def read(self) -> Arrivals:
        """All that is recorded."""
        return self.history.read(self.began, self.began + 90)


@pytest.fixture
def fleet(settings: Settings) -> Iterator[Fleet]:
    with redis.Redis.from_url(settings.broker) as client:
        fleet = Fleet(settings, client)
        yield fleet
        fleet.history.close()


def states(arrivals: Arrivals) -> list[str]:
    return [STATES[state] for state in arrivals.jobs["state"]]


def test_jobs_are_recorded_with_what_became_of_them(fleet: Fleet) -> None:
    started = time.time() - 1
    fleet.accept("a", "b", "c", after=1.0)
    fleet.accept("d", after=2.5, deadline_at="0.0", lengths="echo:1|acme", model="generate:1")
    before = time.time()
    fleet.finish("a", started=repr(started), device="cpu:0")
    after = time.time()
    fleet.finish("b", JobState.EXPIRED)
    fleet.finish("d", generated=(40, 60))
    fleet.now = fleet.began + SLICE + 3

    fleet.lead()

    read = fleet.read()
    jobs = read.jobs
    assert jobs["arrival"].tolist() == pytest.approx([fleet.began + at for at in (1.0, 1.0, 1.0, 2.5)], abs=1e-6)
    assert states(read) == ["succeeded", "expired", "queued", "succeeded"]
    assert [read.names["model"][one] for one in jobs["model"]] == ["echo:1"] * 3 + ["generate:1"]
    assert {read.names["tenant"][one] for one in jobs["tenant"]} == {"acme"}
    assert {read.names["hardware_class"][one] for one in jobs["hardware_class"]} == {"cpu.batch"}
    assert (jobs["rows"].tolist(), jobs["size"].tolist()) == ([2] * 4, [12] * 4)
    assert jobs["output"].tolist() == [-1, -1, -1, round((tokens_of(bin_of(40)) + tokens_of(bin_of(60))) / 2)]
    assert jobs["deadline"].tolist()[:3] == [3600.0] * 3
    assert math.isnan(jobs["deadline"][3])
    assert before - started - 0.1 <= jobs["ran"][0] <= after - started + 0.1
    assert before - fleet.began - 1.1 <= jobs["seconds"][0] <= after - fleet.began - 0.9
    assert np.isnan(jobs["seconds"]).tolist() == [False, False, True, False]
    assert read.unseen == ((fleet.began + SLICE, fleet.began + 90),)


def test_a_job_that_ends_later_is_recorded_again_and_its_slice_is_left_alone_after_that(fleet: Fleet) -> None:
    fleet.accept("a", "b", after=1.0)
    fleet.finish("a")
    for age in (40.0, OBSERVED_AGES[0] + 1):
        fleet.now = fleet.began + age
        fleet.lead()
        assert states(fleet.read()) == ["succeeded", "queued"]
    fleet.finish("b", JobState.FAILED)
    fleet.now = fleet.began + OBSERVED_AGES[1] + 1

    fleet.lead()

    assert states(fleet.read()) == ["succeeded", "failed"]
    fleet.store.client.delete(job_key("a"), job_key("b"))
    fleet.now = fleet.began + OBSERVED_AGES[2] + 1
    fleet.lead()
    assert states(fleet.read()) == ["succeeded", "failed"]


def test_the_next_leader_goes_on_where_the_last_one_was_and_records_nothing_twice(fleet: Fleet) -> None:
    fleet.accept("a", after=1.0)
    fleet.now = fleet.began + 36
    fleet.lead()
    fleet.accept("b", after=31.0)
    fleet.accept("c", after=61.0)
    fleet.now = fleet.began + 96

    fleet.lead(ticks=2)

    assert fleet.read().jobs["arrival"] - fleet.began == pytest.approx([1.0, 31.0, 61.0], abs=1e-6)
    assert fleet.read().unseen == ()


def test_more_jobs_than_one_call_reads_are_all_recorded(fleet: Fleet) -> None:
    for n in range(7):
        fleet.accept(*(f"{n}.{m}" for m in range(100)), after=1.0 + n)
    for n in range(300):
        fleet.accept(f"one {n}", after=9.0 + n / 100)
    fleet.now = fleet.began + 36

    fleet.lead()

    assert len(fleet.read()) == 1000


def test_a_store_that_lost_everything_has_a_gap_and_a_history_from_then_on(fleet: Fleet) -> None:
    fleet.accept("a", after=1.0)
    fleet.now = fleet.began + 36
    fleet.lead()
    fleet.store.client.flushdb()
    fleet.now = fleet.began + 61
    fleet.lead()
    fleet.accept("b", after=62.0)
    fleet.now = fleet.began + 96

    fleet.lead()

    assert fleet.read().jobs["arrival"] - fleet.began == pytest.approx([62.0], abs=1e-6)
    assert fleet.read().unseen == ((fleet.began, fleet.began + 60),)


def test_the_history_stays_within_its_bytes_and_its_time(fleet: Fleet) -> None:
    fleet.began = slice_of(time.time() // 3600 * 3600 - 3 * 3600)  # not just before an hour ends
    fleet.now = float(fleet.began)
    fleet.store.client.delete(HISTORY)
    fleet.lead()
    for n in range(3):
        fleet.accept(*(f"{n}.{m}" for m in range(50)), after=n * 3600 + 1.0)
    limits = msgspec.structs.replace(LIMITS, history=700)
    fleet.now = fleet.began + 2 * 3600 + 36
    fleet.lead(limits, ticks=200)

    hours = [hour_of(fleet.began + n * 3600) for n in range(3)]
    kept = [fleet.store.client.hvals(history_key(hour)) for hour in hours]

    sizes = {name: int(size) for name, size in fields_of(fleet.store.client, HISTORY).items() if name != "until"}
    assert kept[0] == []
    assert sizes == {hour: sum(map(len, values)) for hour, values in zip(hours, kept, strict=True) if values}
    assert 0 < sum(sizes.values()) <= 700
    lasts = fleet.store.client.ttl(history_key(hours[2]))
    assert lasts == pytest.approx(LIMITS.keep_history, abs=3600)


@pytest.mark.slow
def test_two_routers_record_what_was_asked_though_the_leader_is_killed(settings: Settings) -> None:
    history = History(settings.broker)
    began = history.now()
    with (
        EchoDevice(settings) as device,
        router_process(settings) as first,
        router_process(settings) as second,
        redis.Redis.from_url(settings.broker, decode_responses=True) as store,
        taxiway.Client(settings.broker) as client,
    ):
        eventually(lambda: store.hexists(HISTORY, RECORDED))  # the leader has begun
        jobs = [client.submit("echo", ["x", "y"], service="standard", tenant="acme", deadline=120) for _ in range(20)]
        for job in jobs:
            job.result(60)
        with pytest.raises(taxiway.UnknownModelError):
            client.submit("nobody-has-it", "x").result(60)
        routers = (first, second)
        (leader,) = eventually(lambda: [one for one in routers if f"-{one.process.pid}-" in (store.get(LEAD) or "")])
        leader.process.kill()
        with device.pause():
            late = client.submit("echo", "late", service="bulk")
            eventually(lambda: len(history.read_recent(began)) >= 21, within=LAG + 90)
            read = history.read_recent(began)
            late.cancel()
    assert len(read) == 21
    assert states(read) == ["succeeded"] * 20 + ["queued"]
    assert {read.names["model"][model] for model in read.jobs["model"]} == {"echo:1"}
    echoes = read.jobs[read.jobs["rows"] == 2]
    assert {read.names["service"][one] for one in echoes["service"]} == {"standard"}
    assert echoes["deadline"].tolist() == [120.0] * 20
    assert (echoes["seconds"] < 60).all() and (echoes["ran"] >= 0).all()
    history.close()


def diff_config(settings: Settings, day: str, folder: Path) -> Any:
    """A recorded day under a queues.yaml in which a core costs twice as much, on the fleet that runs."""
    file = folder / "queues.yaml"
    file.write_text((TREE / "queues.yaml").read_text().replace("usd_per_hour: 0.05", "usd_per_hour: 0.10"))
    asked = (str(file), "--history", day, "--url", settings.broker, "--json")
    return json.loads(CommandLine(simulator).succeed("diff-config", *asked).stdout)


def test_a_day_is_summed_up_and_exported_as_a_trace_and_an_empty_one_is_an_error(fleet: Fleet, tmp_path: Path) -> None:
    fleet.accept("a", "b", after=1.0)
    fleet.finish("a", started=repr(time.time()), device="cpu:0")
    fleet.now = fleet.began + 36
    fleet.lead()
    day = hour_of(fleet.began).partition("T")[0]

    def history(*arguments: str) -> Result:
        return CommandLine(history_command)(*arguments, env={"TAXIWAY_BROKER": fleet.settings.broker, "COLUMNS": "160"})

    (tmp_path / "trace.csv").write_text(history("export", day).stdout)
    trace = read_trace(tmp_path / "trace.csv", model="unused")
    exported = [json.loads(line) for line in history("export", day, "--json").stdout.splitlines()]
    shown, stated = (history("--day", day, *option) for option in ((), ("--json",)))
    empty = program("simulator.own_fleet.history", "export", "2020-02-29", TAXIWAY_BROKER=fleet.settings.broker)
    with EchoDevice(fleet.settings, answering=False):
        replayed = diff_config(fleet.settings, day, tmp_path)

    assert (trace.models, trace.size.tolist(), trace.deadline.tolist()) == (("echo",), [24, 24], [3600.0] * 2)
    assert [(job["model"], job["state"], job["hardware_class"]) for job in exported] == [
        ("echo:1", "succeeded", "cpu.batch"),
        ("echo:1", "queued", "cpu.batch"),
    ]
    assert (exported[0]["ran"] >= 0, exported[1]["seconds"]) == (True, None)
    assert "echo:1" in shown.stdout and "warning: not recorded: " in shown.stderr
    (share,) = json.loads(stated.stdout)["shares"]
    assert (share["jobs"], share["answered"], share["open"], share["timely"]) == (2, 1, 1, 1.0)
    asked = {"model": "echo", "service": "standard", "requests": 2, "old": 1.0, "new": 1.0}
    assert replayed["attained"] == [asked]
    assert replayed["new"]["cost_usd"] == pytest.approx(2 * replayed["old"]["cost_usd"])
    assert replayed["old"]["usd_by_class"].keys() == {"gpu.realtime", "tpu.bulk", "cpu.batch", "cpu.llama"}
    assert replayed["old"]["cost_usd"] == replayed["old"]["usd_by_class"]["cpu.batch"]  # the only class with a device
    assert (empty.returncode, empty.stdout) == (MISSING, "")
    assert "error: no arrivals are recorded on 2020-02-29\nhint: " in empty.stderr
