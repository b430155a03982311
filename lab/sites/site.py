"""One site: its queues.yaml as a simulated fleet, whose peers are classes with the offers that they made.

A peer's class is placed, priced, moved and learned as the product's: what waits for it waits here, at most `slots` jobs
are there, and its offers are stale after a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from api.peers.offers import changed, offers_of
from router.decide.candidates import CandidateTable
from router.decide.classify import Constraints, Needs, level_of
from router.decide.fairness import HeldKind
from router.decide.working_snapshot import WorkingSnapshot
from simulator.device import SimulatedDevice
from simulator.engine import ANSWERED, REFUSED, EventQueue, OutcomeColumns, Simulation
from simulator.fleet import SERVICES, DeviceClass, Fleet, Timing, WholeBatches
from simulator.policies.routing import SimulatedMover, SimulatedReader, SimulatedWaiting, model_of
from simulator.policies.taxiway import Taxiway
from simulator.pool import Action, Pool, World
from simulator.tuning.real_fleet import penalties
from simulator.workload import SimulatedJob, Workload, jobs
from tasks.document import Size
from tasks.heartbeat import DeviceFacts, EndpointFacts, PeerFacts, variant_key
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import make_book
from tasks.queues.endpoints import HOME
from tasks.topology import HardwareClass, Topology, load_topology
from taxiway.contract.keys import LEVELS, PATIENT
from taxiway.contract.peers import STALE, Offers, SiteOffer
from taxiway.contract.request import Terms
from workers.endpoints.protocol import BUSY_FOR, patient_slots

SITES = ("edge", "lab", "cloud")

PRIVATE = ".private"
"""Ends the tenant of requests that may not leave the site whose name it begins with."""

_MEMORY = Size(2**34)
_OWN, _THERE = "default", "taxiway"  # variants: on devices of the site, and at a peer

Kind = Literal["cpu", "cuda", "tpu", "mps", "endpoint"]


def _model(name: str, size: int, profiles: dict[Kind, Profile]) -> Model:
    own = Variant(runtime="echo", memory=Size(0), profiles=profiles)
    there = Variant(runtime="taxiway", profiles={"endpoint": Profile(0.05)})
    return msgspec.structs.replace(model_of(name), expected_size=size, variants={_OWN: own, _THERE: there})


CATALOGUE: Mapping[str, Model] = {
    "sentiment": _model("sentiment", 1, {"cpu": Profile(0.043, 0.0008), "cuda": Profile(0.0102, 0.00005)}),
    "image": _model("image", 60, {"cuda": Profile(0.0027, 0.0091)}),
}
"""The curves of `lab/trials/fleets/edge.yaml`. The size of an image request is its rows; they need a GPU."""


def topology_of(site: str) -> Topology:
    """The site's queues.yaml."""
    return load_topology(Path(__file__).parent / "fleets" / f"{site}.yaml")


def alone(topology: Topology) -> Topology:
    """The same without peers."""
    own = {name: one for name, one in topology.hardware.items() if not one.is_peer}
    return msgspec.structs.replace(topology, hardware=own)


def central(topologies: Sequence[Topology]) -> Topology:
    """One fleet with the devices of all sites; each still has the label of its site."""
    hardware = {name: one for each in topologies for name, one in alone(each).hardware.items()}
    return msgspec.structs.replace(topologies[0], site="central", hardware=hardware)


def fleet_of(topology: Topology) -> Fleet:
    """The topology as a simulated fleet. The times of peers are not known here."""
    return Fleet(
        classes={name: _device_class(one) for name, one in topology.hardware.items()},
        preemptible=tuple(topology.service[name].preemptible for name in SERVICES),
        rebalance=topology.rebalance,
        timings={
            name: tuple(_timing(model, one) for one in topology.hardware.values()) for name, model in CATALOGUE.items()
        },
        penalties=penalties(topology),
    )


def _device_class(hardware: HardwareClass) -> DeviceClass:
    count, least = (1, 1) if hardware.is_peer else (hardware.scaling.maximum or 1, hardware.scaling.minimum)
    return DeviceClass(
        count=count,
        minimum=least,
        initial=least,
        start=hardware.scaling.start,
        price=hardware.price,
        memory=_MEMORY,
        warm=tuple(CATALOGUE),
        max_batch=hardware.max_batch,
        max_wait=hardware.max_wait,
        max_run=hardware.max_run,
        horizon=hardware.horizon,
    )


def _timing(model: Model, hardware: HardwareClass) -> Timing | None:
    profile = next((one for kind, one in model.variants[_OWN].profiles.items() if kind == hardware.device), None)
    return None if profile is None else WholeBatches(profile.load, 0, profile.base, profile.slope, profile.floor)


@dataclass(frozen=True, slots=True)
class Line:
    """Between two sites: seconds that a message takes, and when it is cut. What meets a cut goes on after it."""

    delay: float
    cuts: tuple[tuple[float, float], ...] = ()

    def is_cut(self, now: float) -> bool:
        """Whether nothing is received."""
        return any(begin <= now < end for begin, end in self.cuts)

    def arrival(self, now: float) -> float:
        """When what is said now is received."""
        return next((end for begin, end in self.cuts if begin <= now < end), now) + self.delay


@dataclass(slots=True, eq=False)
class Received:
    """What a site knows of a peer: its latest offers, and when they came."""

    line: Line
    offers: Offers = field(default_factory=dict)
    at: float = -math.inf

    def fresh(self, now: float) -> Offers:
        """The offers, unless they are stale."""
        return self.offers if now - self.at < STALE else {}

    def offer(self, model: str, service: str, now: float) -> SiteOffer | None:
        """What is offered for a model and service, else for the peer's default service."""
        made = self.fresh(now).get(model, {})
        return made.get(service, made.get(""))


Send = Callable[["PeerPool", SimulatedJob, float], None]
"""Hands a job of a pool to its site, now."""


class PeerPool(Pool):
    """A peer as a class."""

    def __init__(self, index: int, name: str, workload: Workload, world: World, received: Received, send: Send) -> None:
        super().__init__(index, name, workload.fleet, workload.trace.models, world, yields=False, seed=0)
        self.received = received
        self._models, self._send = workload.trace.models, send
        self._sent: dict[SimulatedJob, tuple[float, float]] = {}  # when, and the seconds that were expected
        self._rest_until = 0.0

    def pause(self, now: float) -> float:
        """Seconds for which nothing is sent: the peer was busy."""
        return max(self._rest_until - now, 0.0)

    def tick(self, now: float) -> None:
        """As `Pool.tick`; a pause may be over."""
        super().tick(now)
        self.feed(now)

    def hear(self, offers: Offers, now: float) -> None:
        """The peer has made new offers."""
        self.received.offers, self.received.at = offers, now
        self.feed(now)

    def answered(self, job: SimulatedJob, state: int, now: float) -> None:
        """The peer has answered a job, dropped it, or refused it: then it waits here again."""
        sent, expected = self._sent.pop(job)
        self._leave(job)
        if state == REFUSED:
            self._push(job)
            self._rest_until = now + BUSY_FOR
        else:
            if state == ANSWERED:
                self.pace = (now - sent) / expected
            self._world.end(job, self, now, answered=state == ANSWERED)
        self.feed(now)

    def _give(self, job: SimulatedJob, now: float) -> bool:
        offer = self.received.offer(self._models[job.model], SERVICES[job.service], now)
        patient = sum(one.level >= PATIENT for one in self._sent)
        full = self.running >= self.slots or (job.level >= PATIENT and patient >= patient_slots(self.slots))
        if full or self.pause(now):
            return False
        if offer is None:
            self._rest_until = now + BUSY_FOR
            return False
        self._unqueue(job)
        self._enter(job, now)
        self._sent[job] = now, offer.seconds(job.size, 0) + 2 * self.received.line.delay
        self._send(self, job, now)
        return True


class SiteReader(SimulatedReader):
    """The site as its routers see it, by its own queues.yaml and profiles."""

    def __init__(self, topology: Topology, workload: Workload) -> None:
        super().__init__(workload)
        self.models = [CATALOGUE[name] for name in workload.trace.models]
        self._topology, self._book = topology, make_book(())

    def place_of(self, job: SimulatedJob) -> tuple[str, str] | None:
        """The class and variant of a job that waits for a peer, which may offer nothing now."""
        count = self._counts.get(job.index)
        return None if count is None or not self._topology.hardware[count.name].is_peer else (count.name, _THERE)

    def _devices_of(self, pool: Pool, now: float) -> list[DeviceFacts]:
        if isinstance(pool, PeerPool):
            return [self._peer(pool, now)]
        kind = self._topology.hardware[pool.name].device
        return [msgspec.structs.replace(one, kind=kind) for one in super()._devices_of(pool, now)]

    def _peer(self, pool: PeerPool, now: float) -> DeviceFacts:
        """What the worker of a peer's class reports."""
        received, keys = pool.received, [variant_key(model.id, _THERE) for model in self.models]
        tracks = [(key, self._tracks[pool.name, model.id]) for key, model in zip(keys, self.models, strict=True)]
        learned = {key: track for key, track in tracks if track.batches}
        offers = {key: received.fresh(now).get(model.name) for key, model in zip(keys, self.models, strict=True)}
        made = {key: dict(one) for key, one in offers.items() if one is not None}
        peer = PeerFacts(site=pool.name, round_trip=2 * received.line.delay, age=now - received.at, offers=made)
        return DeviceFacts(
            worker=pool.name,
            hardware_class=pool.name,
            device="endpoint",
            kind="endpoint",
            emulated=False,
            name=pool.name,
            memory_total=0,
            memory_free=0,
            runtimes=(_THERE,),
            warm=tuple(keys),
            unavailable={key: "the endpoint does not list it" for key in keys if key not in made},
            blocked=pool.pause(now),
            blocked_by=LEVELS,
            pace={key: track.pace for key, track in learned.items()},
            residual={key: track.residuals for key, track in learned.items()},
            endpoint=EndpointFacts(state="closed", peer=peer),
        )


class SiteMover(SimulatedMover):
    """Moves requests of different tenants apart from each other: they may not go to the same classes."""

    def _waiting(self, job: SimulatedJob, pool: Pool, now: float) -> SimulatedWaiting:
        one = super()._waiting(job, pool, now)
        return replace(one, kind=(one.kind, job.tenant))


class SitePolicy(Taxiway):
    """The router's decision with the product's own candidate tables: profiles and offers say what a job takes."""

    _reader: SiteReader

    def __init__(self, topology: Topology, workload: Workload) -> None:
        super().__init__(workload, SiteReader(topology, workload))
        self._mover = SiteMover(topology.rebalance, self._reader, self._table, self._needs)
        self._site, self._services = topology.site, topology.service

    def working(self, pools: Sequence[Pool], now: float) -> WorkingSnapshot:
        """What offers are made from."""
        return self._reader.working(pools, now)

    def _table(self, job: SimulatedJob, working: WorkingSnapshot) -> CandidateTable:
        return working.table(self._reader.models[job.model], self._bounds(job), self._reader.place_of(job))

    def _needs(self, job: SimulatedJob, now: float) -> Needs:
        return Needs(job.due - now, job.level, 1, float(job.size), constraints=self._bounds(job))

    def _kind(self, job: SimulatedJob) -> HeldKind:
        return HeldKind(job.tenant, self._reader.models[job.model].id, self._bounds(job))

    def _bounds(self, job: SimulatedJob) -> Constraints:
        """What is private stays here, in a fleet of several sites at its own; what came from a peer goes no further."""
        origin, _, private = job.tenant.partition(".")
        there, here = (origin, HOME) if private else (HOME, None)
        locality = here if origin == self._site else there
        service = SERVICES[job.service]
        return Constraints(service, locality, preemptible=self._services[service].preemptible)


class Sent(OutcomeColumns):
    """Passes on how each job of a site ends."""

    def __init__(self, ended: Callable[[int, int], None]) -> None:
        super().__init__(0)
        self._ended = ended

    def close(self, index: int, state: int, latency: float) -> None:
        """As `OutcomeColumns.close`."""
        self._ended(index, state)


class Site(Simulation):
    """One site's fleet, whose events happen in `world`; `ended` learns of every job that ends here, and how."""

    def __init__(
        self, topology: Topology, workload: Workload, world: EventQueue, ended: Callable[[int, int], None], *, seed: int
    ) -> None:
        self._shared = world
        super().__init__(workload, SitePolicy(topology, workload), seed=seed)
        self.topology, self.outcome = topology, Sent(ended)
        self._jobs = list(jobs(workload))
        self._told: dict[str, dict[str, SiteOffer]] = {}
        self._told_at = -math.inf

    def at(self, time: float, action: Action, device: SimulatedDevice | None, version: int) -> None:
        """As `World.at`, with the events of all sites."""
        self._shared.at(time, action, device, version)

    def begin(self, lines: Mapping[str, Line], send: Send) -> None:
        """Switch devices on, and take each peer at the end of a line as a class."""
        for index, pool in enumerate(self.pools):
            if self.topology.hardware[pool.name].is_peer:
                self.pools[index] = PeerPool(index, pool.name, self.workload, self, Received(lines[pool.name]), send)
        self._begin()

    def accept(self, index: int, left: float, now: float) -> None:
        """Place a request that is due in `left` seconds."""
        job = self._jobs[index]
        terms = self.topology.service[SERVICES[job.service]]
        level = level_of(left, terms.priority)
        work, crowding = (tuple(0.0 if one == math.inf else one for one in row) for row in (job.work, job.crowding))
        self._arrive(replace(job, arrival=now, deadline=left, level=level, work=work, crowding=crowding), now)

    def offers(self, now: float) -> Offers | None:
        """What this site offers; None while it need not be said again."""
        assert isinstance(self.policy, SitePolicy)
        working, terms = self.policy.working(self.pools, now), Terms(locality=HOME)
        made = {name: offers_of(model, terms, SERVICES, self.topology, working) for name, model in CATALOGUE.items()}
        made = {name: one for name, one in made.items() if one}
        if not changed(self._told, made) and now - self._told_at <= STALE / 3:
            return None
        self._told, self._told_at = made, now
        return made

    def peer(self, name: str) -> PeerPool | None:
        """The class that stands for a site; None if it is no peer."""
        return next((pool for pool in self.pools if isinstance(pool, PeerPool) and pool.name == name), None)

    def close(self, now: float) -> float:
        """Switch all devices off; returns US dollars. What is always on is paid for until the last arrival."""
        for device in (device for pool in self.pools for device in pool.devices if device.on_since is not None):
            device.switch_off(now)
        over = now - float(self.workload.trace.arrival[-1])
        always = sum(pool.device_class.minimum * pool.usd_per_second for pool in self.pools)
        return sum(pool.dollars(lambda device: device.powered) for pool in self.pools) - over * always
