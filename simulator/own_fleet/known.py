"""What is known of a fleet: a queues.yaml, the models folder, what devices have learned, and what arrived.

Devices are those of the running fleet, or of `taxiway status --json`: a class has as many as are there, or where an
autoscaler starts them as its `scaling` allows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from router.decide.facts import FleetFacts, figures, named, snapshot_from
from router.decide.snapshot import FleetSnapshot
from simulator.fleet import SERVICES
from simulator.own_fleet.history import arrivals_of_day, day_of
from simulator.traces import Column, is_spec, read_arrivals, synthetic_arrivals
from simulator.tuning.real_fleet import KnownFleet, Recorded, recorded, urgency
from tasks.document import DocumentError, read_document
from tasks.heartbeat import DeviceFacts
from tasks.history import PRIORITIES, Arrivals
from tasks.models.discovered import discovered_by, with_discovered
from tasks.models.folder import load_catalogue
from tasks.models.model import generates
from tasks.models.profiles import load_book
from tasks.topology import Service, Topology
from taxiway.cli import USAGE, CommandError
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import DEVICES, HEARTBEATS, PLAN, STARTS, WORK
from taxiway.errors import TaxiwayError


class StatusError(DocumentError):
    """A file is not what `taxiway status --json` prints."""


_NOT_RUN = (
    "`taxiway check` shows which models are served; a class without live devices runs nothing, unless an autoscaler "
    "starts them"
)


class _ClassStatus(msgspec.Struct):
    starts: bool = False


class _Status(msgspec.Struct):
    """The part of `taxiway status --json` that tells of devices."""

    classes: dict[str, _ClassStatus]
    devices: tuple[DeviceFacts, ...] = ()


def read_status(path: Path) -> FleetSnapshot:
    """The devices in a file with the output of `taxiway status --json`. Raises `StatusError`."""
    text = read_document(path, file=str(path), error=StatusError)
    try:
        status = msgspec.json.decode(text, type=_Status)
    except msgspec.MsgspecError as error:
        raise StatusError(str(path), "", "the output of `taxiway status --json`", str(error)) from error
    starts = tuple(sorted(name for name, one in status.classes.items() if one.starts))
    return FleetSnapshot(devices=status.devices, startable=starts)


def read_fleet(connections: ConnectionPool) -> tuple[float, bytes, FleetSnapshot]:
    """The state store's time, the stored plan, and the fleet's devices and work. Raises `BrokerUnavailableError`."""
    at, plan, devices, beats, work, starts = connections.calls(
        ("TIME",),
        ("GET", PLAN),
        ("HGETALL", DEVICES),
        ("ZRANGE", HEARTBEATS, 0, -1, "WITHSCORES"),
        ("HGETALL", WORK),
        ("HGETALL", STARTS),
    )
    now = int(at[0]) + int(at[1]) / 1e6
    facts = FleetFacts(
        now=now, devices=named(devices), heartbeats=figures(beats), work=figures(work), starts=figures(starts)
    )
    return now, bytes(plan or b""), snapshot_from(facts)


def running_fleet(url: str) -> FleetSnapshot:
    """The devices of the fleet whose state store has this address. Raises `BrokerUnavailableError`."""
    connections = ConnectionPool(url, server="state store")
    try:
        return read_fleet(connections)[2]
    finally:
        connections.close()


def known_fleet(topology: Topology, models: Path, seen: FleetSnapshot, startable: Collection[str] = ()) -> KnownFleet:
    """What a queues.yaml makes of the models and the devices that were seen.

    Devices of the classes `startable` may be started, besides those of classes that are scaled already.
    """
    devices = tuple(msgspec.structs.replace(one, serves=None, fault="", draining=False) for one in seen.devices)
    announced = discovered_by((one.runtimes[0], one.announced) for one in devices if one.announced)
    return KnownFleet(
        topology,
        with_discovered(load_catalogue(models), announced),
        load_book(models)[0],
        FleetSnapshot(devices=devices, startable=tuple(sorted({*seen.startable, *startable}))),
    )


def arrivals_from(source: str, model: str, url: str | None, data: Path | None) -> Arrivals:
    """What arrived: on a UTC day, in a CSV file, or as a synthetic trace says. The file may name no `model`.

    Raises:
        CommandError: a day has no arrivals, or there is no state store.
        TraceError: the file or the text is invalid.
    """
    if day := day_of(source):
        return arrivals_of_day(url, data, day)
    if is_spec(source):
        return synthetic_arrivals(source, model=model)
    return read_arrivals(Path(source), model=model)


def under(arrivals: Arrivals, old: Topology, new: Topology) -> Arrivals:
    """The arrivals as the new file's services would have them.

    A job that had the deadline or the priority of its service has those that the service has now. One without a service
    has the default one.
    """
    jobs = arrivals.jobs.copy()
    names = tuple(name or new.default_service for name in arrivals.names["service"])
    for number, name in enumerate(names):
        rows = np.flatnonzero(jobs["service"] == number)
        was, now = old.service.get(name, Service()), new.service.get(name)
        if now is None or not len(rows):
            continue
        jobs["deadline"][rows] = _changed(jobs["deadline"][rows], _number(was.deadline), _number(now.deadline))
        priorities = PRIORITIES.index(was.priority), PRIORITIES.index(now.priority)
        jobs["priority"][rows] = _changed(jobs["priority"][rows], *priorities)
    return replace(arrivals, names={**arrivals.names, "service": names}, jobs=jobs)


def _number(deadline: float | None) -> float:
    return np.nan if deadline is None else deadline


def _changed(values: Column, was: float, now: float) -> Column:
    """The values, those that are unset or what they were by default replaced by the default of now."""
    usual = np.isnan(values) | (values == -1) | np.isclose(values, was, rtol=1e-4)
    return np.where(usual, now, values)


def replayable(arrivals: Arrivals, known: KnownFleet) -> Recorded:
    """The arrivals as a workload of the fleet, which begins with a device of each class that can run any of them.

    Without `plan.enabled` it has no penalties, and so no plans.

    Raises:
        CommandError: the fleet can run none of them.
    """
    found = recorded(_without_answers(arrivals, known), known, 0.0)
    if found is None:
        names = sorted({arrivals.names["model"][number] for number in np.unique(arrivals.jobs["model"])})
        said = f"nothing can be replayed: no class runs a model of {', '.join(names)} for its service"
        raise CommandError(said, hint=_NOT_RUN, code=USAGE)
    fleet = found.workload.fleet
    used = [any(timings) for timings in zip(*fleet.timings.values(), strict=True)]
    classes = {
        name: msgspec.structs.replace(device, initial=max(device.initial, int(runs)))
        for (name, device), runs in zip(fleet.classes.items(), used, strict=True)
    }
    penalties = fleet.penalties if known.topology.plan.enabled else (0.0,) * len(SERVICES)
    fleet = replace(fleet, classes=classes, penalties=penalties)
    return replace(found, workload=replace(found.workload, fleet=fleet))


def _without_answers(arrivals: Arrivals, known: KnownFleet) -> Arrivals:
    """The arrivals; where a model does not generate, a synthetic trace has answers all the same."""
    generating = []
    for name in arrivals.names["model"]:
        with suppress(TaxiwayError):
            generating += [name] if generates(known.catalogue.resolve(name)) else []
    jobs = arrivals.jobs.copy()
    silent = ~np.isin(np.array(arrivals.names["model"])[jobs["model"]], generating)
    jobs["output"][silent] = jobs["expected"][silent] = 0
    return replace(arrivals, jobs=jobs)


def stands_for(topology: Topology) -> Sequence[tuple[str, list[str]]]:
    """The services of queues.yaml that each of the simulator's stands for, as far as there are any."""
    ranks = {name: SERVICES[urgency(topology, name)] for name in topology.service}
    return [(rank, mine) for rank in SERVICES if (mine := [name for name in ranks if ranks[name] == rank])]
