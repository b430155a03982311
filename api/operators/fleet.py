"""The fleet as a whole: its health, its devices, their number, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.response import Stream

from api.described import EVENTS, FIELDS, KEYED, NONE, VERSION, ServerSentEvent, answers, deletes, posts
from api.gate import AnyRequest, json_answer, needs
from api.inference.streaming import STREAM_HEADERS
from api.operators.metrics import CONTENT_TYPE, exposition
from api.operators.reading import read_fleet, read_timeline
from api.operators.view import FleetTimeline, FleetView
from api.routing.router import HttpRouter
from api.services import JsonResponse, router_of
from taxiway.errors import BrokerUnavailableError, UnplaceableError, quoted

_encode = msgspec.json.Encoder().encode

EXTENSIONS = ["binary_tensor_data"]
"""Triton's names for the extensions of the protocol that this API supports."""

_EACH = 1.0  # seconds between two events of the fleet's stream


@get("/v2", opt=needs(), responses=answers(FIELDS, *KEYED))
async def server_metadata(request: AnyRequest) -> JsonResponse:
    """Name and version of the server."""
    return Response({"name": "taxiway", "version": request.app.state[VERSION], "extensions": EXTENSIONS})


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


ENDPOINTS = (
    *(server_metadata, live, ready, fleet, fleet_timeline, fleet_stream),
    *(scaling, scaling_starts, metrics, drain, resume),
)
