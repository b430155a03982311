"""The fleet as a whole: its health, its devices, their number, and its metrics.

`read_fleet` makes one `FleetView` from the router's parts and the state store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.response import Stream

from api.described import EVENTS, FIELDS, KEYED, NONE, ServerSentEvent, answers, deletes, posts
from api.gate import AnyRequest, json_answer, needs
from api.inference.streaming import STREAM_HEADERS
from api.operators.metrics import CONTENT_TYPE, exposition
from api.operators.view import ClassView, FleetTimeline, FleetView, problems, shown, silent_for, view_class, view_plan
from api.routing.router import HttpRouter
from api.routing.stores import OperatorStore
from api.services import JsonResponse, router_of
from broker.port import QueueHead
from broker.valkey.mover import ValkeyQueueMover
from router.decide.snapshot import FleetSnapshot
from router.upkeep.timeline import EVERY, SAMPLES, FleetSample
from tasks.models.folder import APART
from taxiway.errors import BrokerUnavailableError, UnplaceableError, quoted
from taxiway.release import release

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
        memory=used if (used := router.fleet.working.depths.used) > topology.limits.memory else 0.0,
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
        deviceless=router.lately.deviceless,
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


_encode = msgspec.json.Encoder().encode

EXTENSIONS = ["binary_tensor_data"]
"""Triton's names for the extensions of the protocol that this API supports."""

_EACH = 1.0  # seconds between two events of the fleet's stream


@get("/v2", opt=needs(), responses=answers(FIELDS, *KEYED))
async def server_metadata() -> JsonResponse:
    """Name and version of the server."""
    return Response({"name": "taxiway", "version": release(), "extensions": EXTENSIONS})


@get("/v2/health/live", opt=needs(), responses=answers(FIELDS, 500), security=NONE)
async def live() -> JsonResponse:
    """The router runs."""
    return Response({"live": True})


@get("/v2/health/ready", opt=needs(), responses={**answers(FIELDS, 500), **answers(FIELDS, status=503)}, security=NONE)
async def ready(request: AnyRequest) -> JsonResponse:
    """Whether the router can read the fleet's state; 503 if it cannot, or is about to stop."""
    router = router_of(request)
    there = not router.leaving and not router.fleet.snapshot.stale
    return Response({"ready": there}, status_code=200 if there else 503)


@get("/v2/fleet", responses=answers(FleetView, *KEYED, 503))
async def fleet(request: AnyRequest) -> Response[bytes]:
    """Hardware classes with their queues and work, live devices, and the latest moves."""
    return json_answer(await read_fleet(router_of(request)))


@get("/v2/fleet/timeline", responses=answers(FleetTimeline, *KEYED, 503))
async def fleet_timeline(request: AnyRequest) -> Response[bytes]:
    """The last 15 minutes, oldest first: a sample of each class every 5 seconds, moves, and latencies by service."""
    router = router_of(request)
    return json_answer(await read_timeline(router.operators, router.store.clock.stored_now()))


@get("/v2/fleet/stream", responses=answers(ServerSentEvent, *KEYED, 503, media=EVENTS))
async def fleet_stream(request: AnyRequest) -> Stream:
    """The same each second, as server-sent events."""
    router = router_of(request)
    first = await read_fleet(router)

    async def events() -> AsyncIterator[bytes]:
        yield b"data: " + _encode(first) + b"\n\n"
        while not router.leaving:
            await asyncio.sleep(_EACH)
            with contextlib.suppress(BrokerUnavailableError):  # the page shows that its figures are old
                yield b"data: " + _encode(await read_fleet(router)) + b"\n\n"

    return Stream(events(), media_type=EVENTS, headers=STREAM_HEADERS)


@get("/v1/scaling/{hardware_class:str}", responses=answers(FIELDS, *KEYED, 400, 404, 503))
async def scaling(request: AnyRequest, hardware_class: str) -> JsonResponse:
    """How many devices a class should have, and why: for KEDA's metrics-api trigger, AverageValue with a target of 1.

    503 while the fleet's state cannot be read, so that nothing is scaled by unknown figures.
    """
    return _target(_scalable(request, hardware_class), hardware_class)


@posts("/v1/scaling/{hardware_class:str}/starts", responses=answers(FIELDS, *KEYED, 400, 404, 503))
async def scaling_starts(request: AnyRequest, hardware_class: str) -> JsonResponse:
    """Declare that you start devices of a class on demand; answers as `GET` without `/starts` does.

    For the next 90 seconds the class takes work even without a device. 503 while the fleet's state cannot be read.
    """
    router = _scalable(request, hardware_class)
    if not router.fleet.working.fleet.stale:
        await router.operators.note_start(hardware_class)
    return _target(router, hardware_class)


def _scalable(request: AnyRequest, hardware_class: str) -> HttpRouter:
    """The router, after a check that the class exists."""
    router = router_of(request)
    if hardware_class not in router.rules.topology.hardware:
        known = sorted(router.rules.topology.hardware)
        raise NotFoundException(f"expected one of {known}, got {quoted(hardware_class)}")
    return router


def _target(router: HttpRouter, hardware_class: str) -> JsonResponse:
    target = router.scaler.targets.get(hardware_class)
    if target is None or router.fleet.working.fleet.stale:
        raise BrokerUnavailableError("the fleet snapshot is stale: the number of devices is unknown", retry_after=1.0)
    endpoint = router.rules.topology.hardware[hardware_class].endpoint
    start = None if endpoint is None else endpoint.start
    more = {"deployment": start.deployment} if start is not None and start.deployment is not None else {}
    wanted = {"class": hardware_class, "replicas": target.replicas, "devices": target.devices, "reason": target.reason}
    return Response(wanted | more)


@get("/metrics", responses=answers(str, *KEYED, 503, media=MediaType.TEXT))
async def metrics(request: AnyRequest) -> Response[bytes]:
    """The fleet's metrics in Prometheus's text format."""
    router = router_of(request)
    content = exposition(await read_fleet(router), router.counted(), router.outcomes.latency)
    return Response(content, media_type=CONTENT_TYPE)


@posts("/v2/drain", responses=answers(FIELDS, *KEYED, 422, 503))
async def drain(request: AnyRequest) -> JsonResponse:
    """Hand work to other fleets: what waits and may leave moves to classes of peers, and what comes goes there."""
    router = router_of(request)
    hardware = router.rules.topology.hardware
    peers = sorted(name for name, one in hardware.items() if one.is_peer)
    if not peers:
        raise UnplaceableError(f"this fleet hands work to no other: none of its classes is one ({', '.join(hardware)})")
    await router.operators.drain()
    return Response({"draining": True, "peers": peers})


@deletes("/v2/drain", responses=answers(FIELDS, *KEYED, 422, 503))
async def resume(request: AnyRequest) -> Response[bytes]:
    """Serve again what this fleet can."""
    await router_of(request).operators.resume()
    return json_answer({"draining": False})
