from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.classify import Constraints
from router.decide.cost import wait_of
from router.decide.facts import NONE_MISSED, STARTS_FOR, FleetFacts, MissedBeats, snapshot_from
from router.decide.snapshot import Backlog
from router.decide.working_snapshot import WorkingSnapshot
from tasks.heartbeat import GONE_AFTER
from tasks.models.folder import load_catalogue
from tasks.models.profiles import ProfileBook
from tasks.settings import TREE
from tasks.topology import load_topology
from tests.builders import a_device

NOW = 1000.0
CATALOGUE = load_catalogue(TREE / "models")
TOPOLOGY = load_topology(TREE / "queues.yaml")


def device(worker: str, **more: Any) -> bytes:
    return msgspec.json.encode(a_device(worker=worker, runtimes=("echo",), **more))


def facts(
    devices: dict[str, Any] | None = None,
    heartbeats: dict[str, float] | dict[str, Any] | None = None,
    work: dict[str, Any] | None = None,
) -> FleetFacts:
    return FleetFacts(NOW, devices or {}, heartbeats or {}, work or {})


def test_a_device_counts_as_long_as_its_heartbeat_is_young_and_can_be_read() -> None:
    heartbeats = {"young": NOW - GONE_AFTER, "old": NOW - GONE_AFTER - 0.1, "odd": NOW, "none": NOW}
    snapshot = snapshot_from(facts({"young": device("young"), "old": device("old"), "odd": b"{"}, heartbeats))
    assert [d.worker for d in snapshot.devices] == ["young"]


def read_until(now: float, missed: MissedBeats, since: float, refused: Callable[[float], bool]) -> MissedBeats:
    for at in np.arange(since, now + 0.1, 0.25):
        missed = missed.after(FleetFacts(at, {}, {}, {}, refuses=refused(at)))
    return missed


def test_a_device_is_not_gone_for_heartbeats_that_the_store_refused() -> None:
    began, ended = 1000.0, 1060.0
    beats = {"lived": began - 1, "was gone": began - GONE_AFTER - 1, "beats again": ended + 2}

    def live(now: float) -> list[Any]:
        missed = read_until(now, NONE_MISSED, began, lambda at: at <= ended)
        found = FleetFacts(now, {name: device(name) for name in beats}, beats, {})
        return [one.worker for one in snapshot_from(found, missed).devices]

    assert live(ended) == ["beats again", "lived"]
    assert live(ended + GONE_AFTER) == ["beats again", "lived"]
    assert live(ended + GONE_AFTER + 1) == ["beats again"]


def test_a_second_refusal_long_after_the_first_excuses_no_device_that_was_gone_before() -> None:
    missed = read_until(2000.0, NONE_MISSED, 1000.0, lambda at: at in {1000.0, 2000.0})
    assert not missed.lives(1000.0, now=2001.0)
    assert missed.lives(1999.0, now=2000.0 + GONE_AFTER)


def test_a_device_is_not_gone_for_heartbeats_that_no_server_took_in_a_failover() -> None:
    missed = NONE_MISSED.after(FleetFacts(1000.0, {}, {}, {})).after(FleetFacts(1060.0, {}, {}, {}))
    assert [missed.lives(beat, now=1061.0) for beat in (999.0, 994.0)] == [True, False]
    assert not missed.lives(999.0, now=1060.0 + GONE_AFTER + 1)


def test_a_device_that_drains_is_seen_and_serves_no_class() -> None:
    devices = {"stays": device("stays"), "leaves": device("leaves", draining=True)}
    snapshot = snapshot_from(facts(devices, dict.fromkeys(devices, NOW)))
    assert len(snapshot.devices) == 2
    assert [d.worker for d in snapshot.of_class("cpu.batch")] == ["stays"]
    assert [d.worker for d in snapshot.own("cpu.batch")] == ["stays"]


def test_work_is_counted_by_class_and_level_and_is_never_negative() -> None:
    snapshot = snapshot_from(facts(work={"cpu.batch|0": -1e-12, "cpu.batch|2": 3.0, "nonsense": 1.0, "x|9": 1.0}))
    assert snapshot.work == {"cpu.batch": (0.0, 0.0, 3.0, 0.0)}
    assert not snapshot.stale


def test_what_cannot_be_ended_is_work_ahead_of_all_other_while_its_device_is_there() -> None:
    devices = {"a": device("a", occupied=20.0), "b": device("b", occupied=5.0), "c": device("c")}
    devices |= {"leaves": device("leaves", occupied=20.0, draining=True), "over": device("over", occupied=1.0)}
    beats = {"a": NOW - 1.5, "b": NOW, "c": NOW, "leaves": NOW, "over": NOW - 2.0}
    snapshot = snapshot_from(facts(devices, beats, {"cpu.batch|2": 3.0}))
    assert snapshot.work == {"cpu.batch": (23.5, 0.0, 3.0, 0.0)}


def test_a_request_waits_for_what_occupies_the_devices_of_its_class_also_between_two_readings() -> None:
    fleet = snapshot_from(facts({"a": device("a", occupied=20.0), "b": device("b")}, {"a": NOW, "b": NOW}))
    model = CATALOGUE.resolve("echo")
    working = WorkingSnapshot(TOPOLOGY, ProfileBook(), fleet)

    def wait() -> float:
        table = working.table(model, Constraints())
        (index,) = [i for i, c in enumerate(table.candidates) if c.hardware_class == "cpu.batch"]
        return wait_of(table, working.ahead().sum(axis=1))[index]

    assert wait() == pytest.approx(20.0 / 2)
    working.advance(4.0)
    working.replace_work({"cpu.batch": (0.0, 2.0, 0.0, 0.0)}, {})
    assert wait() == pytest.approx((16.0 + 2.0) / 2)


def test_a_class_is_startable_for_a_while_after_an_autoscaler_declared_that_it_starts_devices() -> None:
    said = {"late": NOW - STARTS_FOR - 1.0, "now": NOW}
    assert snapshot_from(FleetFacts(NOW, {}, {}, {}, starts=said)).startable == ("now",)
    assert snapshot_from(FleetFacts(NOW, {}, {}, {}), starts={"gpu"}).startable == ("gpu",), "the router's own, always"


@given(work=st.lists(st.floats(0, 50), min_size=4, max_size=4), devices=st.integers(0, 8), seconds=st.floats(0, 10))
def test_devices_work_off_what_waits_by_level(work: list[float], devices: int, seconds: float) -> None:
    backlog = Backlog(("cpu",), {"cpu": tuple(work)})
    backlog.serve(np.array([devices * seconds]))
    left = backlog.levels("cpu")
    done = min(devices * seconds, sum(work))
    assert sum(left) == pytest.approx(sum(work) - done, abs=1e-6)
    untouched = [level for level in range(4) if left[level] == work[level] and work[level] > 0]
    for level in untouched:
        assert list(left[level:]) == work[level:]
