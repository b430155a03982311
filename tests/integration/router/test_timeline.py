"""The timeline on a real Valkey: what the leader samples of the fleet, and what an operator reads of it."""

import asyncio
import itertools
from collections import Counter

import pytest
import redis

import taxiway
from api.operators.fleet import read_timeline
from api.routing.stores import OperatorStore
from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.timeline import EVERY, SAMPLES, FleetSample, MovedSample, Timeline
from tasks.history import ServiceLatency, slice_of
from tasks.models.catalogue import Catalogue
from tasks.settings import Settings
from tasks.topology import load_topology
from taxiway.contract.keys import HELD, TIMELINE, priority_list
from tests.routing import HTTP, EchoDevice, eventually, router_process

LATE = {"jobs": 3, "late": 1, "median": 0.2, "slowest": 0.9, "deadline": 0.5}


class Leader:
    """The duty of a router that leads, with what the others tell it."""

    def __init__(self, settings: Settings) -> None:
        self.rules = Rules(load_topology(settings.queues), Catalogue({}), settings.secret)
        self.store = RouterStore(settings.broker, self.rules.topology.limits)
        self.fleet = FleetReader(self.store, self.rules.topology, self.rules.book)
        self.moves: Counter[tuple[str, ...]] = Counter()
        self.timeline = Timeline(self.store, self.fleet, self.rules, self.moves)

    async def sample(self) -> None:
        """As many ticks as one sample takes."""
        await self.fleet.read()
        for _ in range(round(EVERY / self.timeline.pause)):
            await self.timeline.tick()


def sampled(settings: Settings, *, samples: int = 1) -> list[FleetSample]:
    """What is read after a leader took samples, with a move and a recorded slice before each."""

    async def run() -> list[FleetSample]:
        leader = Leader(settings)
        await leader.fleet.read()
        begin = slice_of(leader.store.clock.now()) - 60
        for n in range(samples):
            leader.moves["cpu.batch", "gpu.realtime", "rescue"] += 2 + n
            for at in (begin, begin - 86400):  # that of yesterday is not shown
                leader.timeline.note([ServiceLatency(begin=at, service="live", **LATE)])  # type: ignore[arg-type]
            await leader.sample()
        store = leader.store
        read = await read_timeline(OperatorStore(store.calls, store.clock), store.clock.stored_now())
        await leader.store.close()
        return [*read.samples]

    return asyncio.run(run())


def test_a_sample_has_queues_devices_and_what_happened_since_the_one_before(
    settings: Settings, store: redis.Redis
) -> None:
    store.lpush(priority_list("cpu.batch", 1), b"one")
    store.lpush(priority_list("cpu.batch", 3), b"two", b"three")
    store.hset(HELD, "taxiway:job:a", b"message")

    with EchoDevice(settings, answering=False):
        eventually(lambda: store.hlen("taxiway:devices"))
        first, second = sampled(settings, samples=2)

    assert first.at <= second.at
    assert (first.held, first.plan) == (1, 0)
    batch, realtime = first.classes["cpu.batch"], first.classes["gpu.realtime"]
    assert (batch.waiting, batch.devices) == (3, 1)
    assert batch.dollars == pytest.approx(load_topology(settings.queues).hardware["cpu.batch"].dollars_per_hour)
    assert (realtime.waiting, realtime.devices, realtime.dollars) == (0, 0, 0.0)
    assert first.moves == (MovedSample("cpu.batch", "gpu.realtime", "rescue", 2),)
    assert second.moves == (MovedSample("cpu.batch", "gpu.realtime", "rescue", 3),)
    assert [(one.service, one.late) for one in first.services] == [("live", 1)]


def test_fifteen_minutes_of_samples_are_kept_and_older_or_unreadable_ones_are_not_read(
    settings: Settings, store: redis.Redis
) -> None:
    old = b'{"at": 1.0, "held": 0, "plan": 0, "classes": {}}'
    store.rpush(TIMELINE, *[b"of another release", old] * SAMPLES)

    assert len(sampled(settings)) == 1
    assert store.llen(TIMELINE) == SAMPLES


def test_any_router_answers_with_what_the_leader_sampled(settings: Settings) -> None:
    def samples(url: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = HTTP.get(f"{url}/v2/fleet/timeline").json()["samples"]
        return found

    with EchoDevice(settings), router_process(settings) as one, router_process(settings) as other:
        with taxiway.Client(one.http) as client:
            client.submit("echo", "hello").result(timeout=60)
        eventually(lambda: len(samples(one.http)) >= 2)
        seen = samples(other.http)
        times = [float(str(sample["at"])) for sample in seen]
        assert all(later - earlier > EVERY / 2 for earlier, later in itertools.pairwise(times))
        one.process.kill()
        eventually(lambda: len(samples(other.http)) > len(seen))
        assert samples(other.http)[: len(seen)] == seen
