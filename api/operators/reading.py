"""Reads the fleet for operators: one `FleetView` from the router's parts and the state store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from api.operators.problems import problems
from api.operators.view import ClassView, FleetTimeline, FleetView, shown, silent_for, view_class, view_plan
from api.routing.router import HttpRouter
from api.routing.stores import OperatorStore
from broker.port import QueueHead
from broker.valkey.mover import ValkeyQueueMover
from router.decide.snapshot import FleetSnapshot
from router.upkeep.timeline import EVERY, SAMPLES, FleetSample
from tasks.models.folder import APART

_decode = msgspec.json.Decoder(FleetSample).decode


async def read_fleet(router: HttpRouter) -> FleetView:
    """The fleet now, with its queues and held jobs, and what needs attention.

    Raises:
        BrokerUnavailableError: the state store does not answer.
    """
    topology, catalogue = router.rules.topology, router.rules.catalogue
    now, fleet = router.store.clock.now(), router.fleet.working.fleet
    silent = {} if fleet.stale else silent_for(fleet.devices, router.fleet.heartbeats, now)
    fleet = replace(fleet, devices=tuple(device for device in fleet.devices if device.worker not in silent))
    held, dead = await router.operators.held_and_dead()
    classes, moves = await _classes(router, fleet, now), tuple(await router.queue_mover.moves())
    reports = dict(sorted((await router.operators.catalogues()).items()))
    tuner, latest = await router.operators.tuner()
    waiting, given_up = await router.registry.figures()
    view = FleetView(
        stale=fleet.stale,
        now=now,
        held=held,
        dead=dead,
        classes=classes,
        devices=tuple(map(shown, fleet.devices)),
        moves=moves,
        refuses=router.fleet.working.depths.refuses,
        draining=fleet.draining,
        silent=silent,
        webhooks_waiting=waiting,
        webhooks_dead=given_up,
        tokens=sum(use.input + use.output for use in router.outcomes.used.values()),
        disabled=catalogue.disabled,
        outdated=catalogue.outdated,
        restart=tuple(name for name, report in reports.items() if report.queues_changed),
        queues_wrong={name: report.queues_wrong for name, report in reports.items() if report.queues_wrong},
        clocks={name: report.clock for name, report in reports.items() if abs(report.clock) >= APART},
        plan=view_plan(
            router.fleet.followed, router.fleet.snapshot, now, reports.values(), tuner, latest, topology.plan.period
        ),
        ended=router.lately.ended,
        missed=router.lately.missed,
        refused=router.lately.refused,
        failing=await router.operators.failing(),
    )
    return msgspec.structs.replace(view, problems=problems(view))


async def _classes(router: HttpRouter, fleet: FleetSnapshot, now: float) -> dict[str, ClassView]:
    """The classes by name, with what waits for each."""
    mover, hardware, targets = router.queue_mover, router.rules.topology.hardware, router.scaler.targets
    heads = {name: await mover.head(name) for name in sorted(hardware)}
    since = await _accepted(mover, [job for head in heads.values() for job in head.first])
    return {
        name: view_class(name, hardware[name], fleet, head, targets.get(name), _oldest(head, since, now))
        for name, head in heads.items()
    }


async def read_timeline(operators: OperatorStore, now: float) -> FleetTimeline:
    """The samples of the last 15 minutes before `now`, oldest first; without those that another release wrote.

    Raises:
        BrokerUnavailableError: the state store does not answer.
    """
    samples = []
    for raw in reversed(await operators.samples()):
        with suppress(msgspec.MsgspecError):
            samples.append(_decode(raw))
    since = now - SAMPLES * EVERY
    return FleetTimeline(now=now, samples=tuple(sample for sample in samples if sample.at >= since))


async def _accepted(queue_mover: ValkeyQueueMover, jobs: Sequence[str]) -> Mapping[str, float]:
    """The acceptance time of each of these jobs that has a record."""
    records = await queue_mover.records(jobs, ("accepted",)) if jobs else []
    return {job: float(its["accepted"]) for job, its in zip(jobs, records, strict=True) if "accepted" in its}


def _oldest(head: QueueHead, accepted: Mapping[str, float], now: float) -> float:
    """Seconds since the oldest of the jobs served next was accepted; 0 if none is known to wait."""
    return max([0.0, *(now - accepted[job] for job in head.first if job in accepted)])
