"""The endpoints: each reads its request, calls the router and writes the answer; `errors` formats errors."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, delete, get, post
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import Parameter, QueryParameter
from litestar.response import Stream

from broker.port import beside
from router.access import Bodies, Rates
from router.http import described, triton
from router.http.bodies import BodyLimits, Gzipped, Inflated
from router.http.described import GenerateOperation, InferOperation, document
from router.http.errors import protocol_error, taxiway_error, unforeseen_error
from router.http.gate import Gate, caller_of, claim, guard, json_answer, needs
from router.http.inference import Accepted, Front, Inference, Traced
from router.http.openai import endpoints as openai
from router.http.openai import object_endpoints as stored
from router.http.openai import webhook_endpoints as webhooks
from router.http.openai.responses import endpoints as responses
from router.http.openai.stored import StoredObjects
from router.http.paths import Divided, Named
from router.http.protocol import InferRequest, read_infer
from router.http.streaming import MEDIA_TYPE, GenerateRequest, Streaming, read_generate
from router.jobs import DeadLetters, Jobs
from router.keys_file import KeyFile
from router.metrics import CONTENT_TYPE, exposition
from router.models import model_list, model_metadata, unready
from router.service.arrivals import Router
from tasks.models.catalogue import reference_of
from taxiway.contract.job import JobStatus
from taxiway.contract.listing import USUAL, JobFilter, states_of
from taxiway.contract.tensors import HEADER, OCTETS, Framed
from taxiway.contract.values import gone
from taxiway.errors import BrokerUnavailableError, InvalidRequestError, ModelUnavailableError, TaxiwayError, quoted

_Any = Request[Any, Any, Any]
_Json = Response[dict[str, Any]]

EXTENSIONS = [
    *("binary_tensor_data", "classification", "generate", "model_configuration", "model_repository", "statistics"),
]
"""Triton's names for the extensions of the protocol that this door supports."""

MOST = 1000
"""Most dead letters in one list; the default is a tenth of it."""

_EACH = 1.0  # seconds between two events of the fleet's stream

_encode = msgspec.json.Encoder().encode
_DOOR = "door"


@dataclass(frozen=True, slots=True)
class Door:
    """What the endpoints need."""

    router: Router
    inference: Inference
    letters: DeadLetters


def make_app(router: Router, keys: KeyFile | None, store: StoredObjects) -> Divided:
    """The HTTP door of `router` for callers with one of `keys`; without keys, for every caller. `store` has files."""
    limits = router.rules.topology.limits
    limit = int(limits.payload)
    app = Litestar(
        route_handlers=_ENDPOINTS,
        guards=[guard],
        middleware=[Named],
        exception_handlers={
            TaxiwayError: taxiway_error,
            HTTPException: protocol_error,
            Exception: unforeseen_error,
        },
        openapi_config=document(_version()),
        request_max_body_size=limit,
        logging_config=None,
    )
    inference = Inference(router, Jobs(router))
    app.state[described.VERSION] = _version()
    app.state[_DOOR] = Door(router, inference, DeadLetters(router))
    app.state[triton.ROUTER] = router
    app.state[openai.DOOR] = openai.OpenAIDoor(router, inference)
    app.state[stored.STORE] = store
    app.state[webhooks.WEBHOOKS] = router.webhooks
    bodies, front = Bodies(router.rules.topology), Front(Traced(app), inference, limit)
    inflated = Inflated(front, BodyLimits(front, bodies, limit), limit, limits.inflation)
    return Divided(Gate(Gzipped(BodyLimits(inflated, bodies, limit)), keys, Rates(router.rules.topology)))


@get("/v2", opt=needs(), responses=described.INFO)
async def server_metadata() -> _Json:
    """Name and version of the server."""
    return Response({"name": "taxiway", "version": _version(), "extensions": EXTENSIONS})


@get("/v2/health/live", opt=needs(), responses=described.HEALTH, security=described.NONE)
async def live() -> _Json:
    """The router runs."""
    return Response({"live": True})


@get("/v2/health/ready", opt=needs(), responses=described.READINESS, security=described.NONE)
async def ready(request: _Any) -> _Json:
    """Whether the router can read the fleet's state; 503 if it cannot, or is about to stop."""
    router = _door(request).router
    there = not router.leaving and not router.fleet.snapshot.stale
    return Response({"ready": there}, status_code=200 if there else 503)


@get("/v2/fleet", responses=described.FLEET)
async def fleet(request: _Any) -> Response[bytes]:
    """Hardware classes with their queues and work, live devices, and the latest moves."""
    return json_answer(await _door(request).router.view())


@get("/v2/fleet/stream", responses=described.FLEET_STREAM)
async def fleet_stream(request: _Any) -> Stream:
    """The same each second, as server-sent events."""
    router = _door(request).router
    first = await router.view()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: " + _encode(first) + b"\n\n"
        while not router.leaving:
            await asyncio.sleep(_EACH)
            with contextlib.suppress(BrokerUnavailableError):  # the page shows that its figures are old
                yield b"data: " + _encode(await router.view()) + b"\n\n"

    return Stream(events(), media_type=MEDIA_TYPE, headers={"cache-control": "no-store"})


@get("/v1/scaling/{hardware_class:str}", responses=described.SCALING)
async def scaling(request: _Any, hardware_class: str) -> _Json:
    """How many devices a class should have, and why: for KEDA's metrics-api trigger, AverageValue with a target of 1.

    503 while the fleet's state cannot be read, so that nothing is scaled by unknown figures.
    """
    return _target(_scalable(request, hardware_class), hardware_class)


@post("/v1/scaling/{hardware_class:str}/starts", status_code=200, responses=described.SCALING)
async def scaling_starts(request: _Any, hardware_class: str) -> _Json:
    """Declare that you start devices of a class on demand; answers as `GET` without `/starts` does.

    For the next 90 seconds the class takes work even without a device. 503 while the fleet's state cannot be read.
    """
    router = _scalable(request, hardware_class)
    if not router.fleet.working.fleet.stale:
        await router.store.note_start(hardware_class)
    return _target(router, hardware_class)


def _scalable(request: _Any, hardware_class: str) -> Router:
    """The router, after a check that the class exists."""
    router = _door(request).router
    if hardware_class not in router.rules.topology.hardware:
        known = sorted(router.rules.topology.hardware)
        raise NotFoundException(f"expected one of {known}, got {quoted(hardware_class)}")
    return router


def _target(router: Router, hardware_class: str) -> _Json:
    target = router.scaler.targets().get(hardware_class)
    if target is None or router.fleet.working.fleet.stale:
        raise BrokerUnavailableError("the fleet snapshot is stale: the number of devices is unknown", retry_after=1.0)
    endpoint = router.rules.topology.hardware[hardware_class].endpoint
    start = None if endpoint is None else endpoint.start
    more = {"deployment": start.deployment} if start is not None and start.deployment is not None else {}
    wanted = {"class": hardware_class, "replicas": target.replicas, "devices": target.devices, "reason": target.reason}
    return Response(wanted | more)


@get("/metrics", responses=described.METRICS)
async def metrics(request: _Any) -> Response[bytes]:
    """The fleet's metrics in Prometheus's text format."""
    router = _door(request).router
    content = exposition(await router.view(), router.done())
    return Response(content, media_type=CONTENT_TYPE)


@post("/v2/reload", status_code=200, responses=described.FLEET_CHANGE)
async def reload(request: _Any) -> _Json:
    """Have every router and worker reload its models folder now: what each serves then, and what changed there."""
    return Response(await _door(request).router.folder.reload())


@get("/v2/models", opt=needs(), responses=described.INFO)
async def models(request: _Any) -> _Json:
    """Every model with its versions, aliases and variants, and why one is disabled."""
    router = _door(request).router
    rules = router.rules
    return Response({"models": model_list(rules.catalogue, router.fleet.working.fleet, rules.unloaded)})


@get(
    ["/v2/models/{model:str}", "/v2/models/{model:str}/versions/{version:str}"],
    opt=needs(),
    responses=described.MODEL,
)
async def metadata(request: _Any, model: str, version: str | None = None) -> _Json:
    """A model's inputs, outputs and parameters."""
    catalogue = _door(request).router.rules.catalogue
    return Response(model_metadata(catalogue, catalogue.resolve(reference_of(model, version))))


@get(
    ["/v2/models/{model:str}/ready", "/v2/models/{model:str}/versions/{version:str}/ready"],
    opt=needs(),
    responses=described.MODEL_READY,
)
async def model_ready(request: _Any, model: str, version: str | None = None) -> _Json:
    """Whether a live device has or can load the model; 503 with the reason if none can, or the model is disabled."""
    router = _door(request).router
    try:
        found = router.rules.catalogue.resolve(reference_of(model, version))
        reason = unready(found, router.rules.topology, router.fleet.snapshot, router.rules.unloaded)
    except ModelUnavailableError as error:
        reason = str(error.details["reason"])
    content = {"name": model, "ready": not reason}
    return Response(content | ({"reason": reason} if reason else {}), status_code=503 if reason else 200)


@post(
    ["/v2/models/{model:str}/infer", "/v2/models/{model:str}/versions/{version:str}/infer"],
    status_code=200,
    operation_class=InferOperation,
    opt=needs("submit"),
    responses=described.INFER,
)
async def infer(request: _Any, model: str, version: str | None = None) -> Response[bytes]:
    """Run the model: 200 with its outputs; 202 with the job's location, at once with `Prefer: respond-async`."""
    answer = await _door(request).inference.answer_to(
        reference_of(model, version),
        await request.body(),
        caller=caller_of(request.scope),
        header_length=request.headers.get(HEADER),
        prefer=request.headers.get("prefer", ""),
    )
    return Response(b"".join(answer.pieces), status_code=answer.status, headers=answer.headers)


@post(
    ["/v2/models/{model:str}/placement", "/v2/models/{model:str}/versions/{version:str}/placement"],
    status_code=200,
    operation_class=InferOperation,
    opt=needs("submit"),
    responses=described.PLACEMENT,
)
async def model_placement(request: _Any, model: str, version: str | None = None) -> _Json:
    """Where the present fleet would run an infer request, and why; nothing is accepted."""
    infer = await _read(request)
    preview = _door(request).inference.preview
    return Response(await preview(reference_of(model, version), infer, len(await request.body())))


@post(
    ["/v2/models/{model:str}/generate", "/v2/models/{model:str}/versions/{version:str}/generate"],
    status_code=200,
    operation_class=GenerateOperation,
    opt=needs("submit"),
    responses=described.GENERATE,
)
async def generate(request: _Any, model: str, version: str | None = None) -> Response[bytes]:
    """Generate text: 200 with the whole text, or 202 with the job's location."""
    answer = await _streaming(request).generate(reference_of(model, version), await _read_generate(request))
    if isinstance(answer, Accepted):
        return _accepted(answer.job)
    return json_answer(answer)


@post(
    ["/v2/models/{model:str}/generate_stream", "/v2/models/{model:str}/versions/{version:str}/generate_stream"],
    status_code=200,
    operation_class=GenerateOperation,
    opt=needs("submit"),
    responses=described.GENERATE_STREAM,
)
async def generate_stream(request: _Any, model: str, version: str | None = None) -> Stream:
    """Generate text and stream it as server-sent events; `Location` has the job's own stream."""
    streaming = _streaming(request)
    job = await streaming.submit(reference_of(model, version), await _read_generate(request))
    return _stream(await streaming.events(job, None), job)


@get("/v2/jobs/{job:str}/stream", opt=needs("read"), responses=described.JOB_STREAM)
async def job_stream(request: _Any, job: str) -> Stream:
    """A generated answer as it is produced, after the event that `Last-Event-ID` names."""
    return _stream(await _streaming(request).events(job, request.headers.get("last-event-id")), job)


@get("/v2/jobs/{job:str}", opt=needs("read"), responses=described.JOB)
async def job_status(request: _Any, job: str, wait: float = 0.0) -> Response[bytes]:
    """A job's state; with `wait`, as soon as it has ended or that many seconds have passed."""
    return _status(await _jobs(request).status(job, wait=_seconds(wait)), 200)


@get("/v2/jobs/{job:str}/result", opt=needs("read"), responses=described.JOB_RESULT)
async def job_result(request: _Any, job: str, wait: float = 0.0) -> Response[bytes]:
    """A job's answer: 200, or the job's own error; 202 until it has ended, 410 once the result has expired.

    With `Accept: application/octet-stream` the elements of numeric outputs follow the JSON.
    """
    found = await _jobs(request).result(job, wait=_seconds(wait))
    if isinstance(found, JobStatus):
        return _status(found, 202)
    binary = OCTETS in request.headers.get("accept", "")
    return _framed(await _door(request).inference.answer(job, found, lambda spec: binary and spec.datatype != "BYTES"))


@get("/v2/blobs/{ref:str}", opt=needs("read"), responses=described.BLOB)
async def blob(request: _Any, ref: str) -> Response[bytes]:
    """The raw bytes of a large value that a stored result refers to; 410 once the result has expired."""
    content = (await _door(request).router.store.blobs([ref]))[ref]
    if content is None:
        raise gone(ref)
    return Response(bytes(content), media_type=OCTETS)


@get("/v2/jobs/{job:str}/placement", opt=needs("read"), responses=described.JOB_PLACEMENT)
async def job_placement(request: _Any, job: str) -> _Json:
    """Why a job is where it is, and the recomputed candidate table."""
    return Response(await _jobs(request).placement(job))


@delete("/v2/jobs/{job:str}", status_code=200, opt=needs("submit"), responses=described.JOB)
async def job_cancel(request: _Any, job: str) -> Response[bytes]:
    """Cancel a job; one that has ended is left unchanged."""
    return _status(await _jobs(request).cancel(job), 200)


@get("/v2/dead", responses=described.DEAD)
async def dead_list(request: _Any, most: int = MOST // 10) -> Response[bytes]:
    """Dead letters, latest first, up to `most`."""
    if not 0 < most <= MOST:
        raise InvalidRequestError(f"most: expected 1 to {MOST}, got {most}", field="most")
    return json_answer({"letters": await _door(request).letters.list(most)})


@get("/v2/dead/{letter:str}", responses=described.DEAD)
async def dead_show(request: _Any, letter: str) -> Response[bytes]:
    """One dead letter with its message."""
    return json_answer(await _door(request).letters.show(letter))


@post("/v2/dead/{letter:str}/replay", status_code=200, responses=described.DEAD)
async def dead_replay(request: _Any, letter: str) -> Response[bytes]:
    """Run a dead letter's job again."""
    return json_answer({"id": letter, "job": await _door(request).letters.replay(letter)})


@delete("/v2/dead/{letter:str}", status_code=200, responses=described.DEAD)
async def dead_drop(request: _Any, letter: str) -> Response[bytes]:
    """Delete a dead letter."""
    await _door(request).letters.drop(letter)
    return json_answer({"id": letter, "dropped": True})


_States = Annotated[str, QueryParameter(name="state", description="Only jobs in these states, comma-separated.")]
_Model = Annotated[str, Parameter(description="Only jobs of this model: `name`, `name:version` or `name@alias`.")]
_Tenant = Annotated[str, Parameter(description="Only this tenant's jobs; with a key, only its own tenant is allowed.")]
_Limit = Annotated[int, Parameter(description="Jobs per page, at most 1,000.")]
_Cursor = Annotated[str, Parameter(description="The `next` of the previous page.")]


@get("/v2/jobs", opt=needs("read"), responses=described.JOBS)
async def jobs(
    request: _Any,
    states: _States = "",
    model: _Model = "",
    tenant: _Tenant = "",
    limit: _Limit = USUAL,
    cursor: _Cursor = "",
) -> Response[bytes]:
    """The fleet's jobs, latest first. While `next` is present more may follow, even after an empty page."""
    router = _door(request).router
    filters = {"tenant": tenant} if tenant else {}
    claim(caller_of(request.scope), filters)
    wanted = JobFilter(
        states=states_of(name for name in states.split(",") if name),
        model=router.rules.catalogue.resolve(model).id if "@" in model else model,
        tenant=filters.get("tenant", ""),
    )
    return json_answer(await router.store.list_jobs(wanted, limit=limit, cursor=cursor))


_ENDPOINTS = [
    server_metadata,
    live,
    ready,
    fleet,
    fleet_stream,
    scaling,
    scaling_starts,
    metrics,
    reload,
    models,
    metadata,
    model_ready,
    infer,
    model_placement,
    generate,
    generate_stream,
    job_stream,
    job_status,
    job_result,
    blob,
    job_placement,
    job_cancel,
    dead_list,
    dead_show,
    dead_replay,
    dead_drop,
    jobs,
    *described.ENDPOINTS,
    *triton.ENDPOINTS,
    *openai.ENDPOINTS,
    *stored.ENDPOINTS,
    *responses.ENDPOINTS,
    *webhooks.ENDPOINTS,
]


def _door(request: _Any) -> Door:
    door: Door = request.app.state[_DOOR]
    return door


def _jobs(request: _Any) -> Jobs:
    """The jobs that the caller may see."""
    return Jobs(_door(request).router, caller_of(request.scope).tenant)


def _streaming(request: _Any) -> Streaming:
    door = _door(request)
    return Streaming(door.router, _jobs(request), door.inference)


async def _read(request: _Any) -> InferRequest:
    body = await request.body()
    infer = await beside(len(body), read_infer, body, request.headers.get(HEADER), _most(request))
    claim(caller_of(request.scope), infer.parameters)
    return infer


async def _read_generate(request: _Any) -> GenerateRequest:
    content = await request.body()
    body = await beside(len(content), read_generate, content, _most(request))
    claim(caller_of(request.scope), body.parameters)
    return body


def _most(request: _Any) -> int:
    return _door(request).router.rules.topology.limits.elements


def _stream(events: AsyncIterator[bytes], job: str) -> Stream:
    headers = {"location": f"/v2/jobs/{job}/stream", "cache-control": "no-store"}
    return Stream(events, media_type=MEDIA_TYPE, headers=headers)


def _framed(answer: Framed) -> Response[bytes]:
    return Response(answer.body, headers=answer.headers)


def _seconds(wait: float) -> float:
    if not math.isfinite(wait) or wait < 0:
        raise InvalidRequestError(f"wait: expected seconds >= 0, got {wait}", field="wait")
    return wait


def _accepted(job: str) -> Response[bytes]:
    location = f"/v2/jobs/{job}"
    content = _encode({"id": job, "state": "queued", "location": location})
    return Response(content, status_code=202, media_type=MediaType.JSON, headers={"location": location})


def _status(status: JobStatus, code: int) -> Response[bytes]:
    progress = msgspec.structs.asdict(status)
    record = msgspec.structs.asdict(progress.pop("record"))
    content = _encode(record | progress)
    return Response(content, status_code=code, media_type=MediaType.JSON)


def _version() -> str:
    """The installed version; "0" if the fleet runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("taxiway")
    except importlib.metadata.PackageNotFoundError:
        return "0"
