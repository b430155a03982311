"""The endpoints: each reads its request, asks the router, and writes the answer; `errors` writes what went wrong."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, delete, get, post
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Operation

from router.http.errors import protocol_error, taxiway_error, unforeseen_error
from router.http.inference import Accepted, Inference
from router.http.metadata import fleet_metadata, is_ready, model_list, model_metadata
from router.http.protocol import InferAnswer, InferRequest, read_infer
from router.jobs import Jobs
from router.service import Router
from taxiway.errors import InvalidRequestError, TaxiwayError
from taxiway.job import JobStatus

_Any = Request[Any, Any, Any]
_Json = Response[dict[str, Any]]

_encode = msgspec.json.Encoder().encode
_DOOR = "door"


@dataclass(frozen=True, slots=True)
class Door:
    """What the endpoints need."""

    router: Router
    jobs: Jobs
    inference: Inference


class InferOperation(Operation):
    """Describes an infer request's body, which the endpoint itself decodes, straight from its bytes."""

    def to_schema(self) -> dict[str, Any]:
        """The operation with its body."""
        content = {MediaType.JSON.value: {"schema": _schema_of(InferRequest)}}
        return {**super().to_schema(), "requestBody": {"required": True, "content": content}}


def make_app(router: Router) -> Litestar:
    """The HTTP door of `router`."""
    jobs = Jobs(router)
    app = Litestar(
        route_handlers=_ENDPOINTS,
        exception_handlers={
            TaxiwayError: taxiway_error,
            HTTPException: protocol_error,
            Exception: unforeseen_error,
        },
        openapi_config=OpenAPIConfig(
            title="taxiway",
            version=_version(),
            description="The Open Inference Protocol v2, and the jobs behind it.",
            path="/schema",
            render_plugins=[JsonRenderPlugin()],
            use_handler_docstrings=True,
        ),
        request_max_body_size=int(router.rules.topology.limits.payload),
        logging_config=None,
    )
    app.state[_DOOR] = Door(router, jobs, Inference(router, jobs))
    return app


@get("/v2")
async def server_metadata() -> _Json:
    """Name and version of the server."""
    return Response({"name": "taxiway", "version": _version(), "extensions": []})


@get("/v2/health/live")
async def live() -> _Json:
    """The router runs."""
    return Response({"live": True})


@get("/v2/health/ready")
async def ready(request: _Any) -> _Json:
    """The router reads the fleet's state; 503 when it cannot."""
    fresh = not _door(request).router.fleet.snapshot.stale
    return Response({"ready": fresh}, status_code=200 if fresh else 503)


@get("/v2/fleet")
async def fleet(request: _Any) -> _Json:
    """Hardware classes, their work, and live devices."""
    router = _door(request).router
    return Response(fleet_metadata(router.rules.topology, router.fleet.snapshot))


@get("/v2/models")
async def models(request: _Any) -> _Json:
    """Every model with its versions, aliases and variants."""
    return Response({"models": model_list(_door(request).router.rules.catalogue)})


@get(["/v2/models/{model:str}", "/v2/models/{model:str}/versions/{version:str}"])
async def metadata(request: _Any, model: str, version: str | None = None) -> _Json:
    """A model's inputs, outputs and parameters."""
    catalogue = _door(request).router.rules.catalogue
    return Response(model_metadata(catalogue, catalogue.resolve(_reference(model, version))))


@get(["/v2/models/{model:str}/ready", "/v2/models/{model:str}/versions/{version:str}/ready"])
async def model_ready(request: _Any, model: str, version: str | None = None) -> _Json:
    """Whether a live device has the model or could load it; 503 when none does."""
    router = _door(request).router
    found = router.rules.catalogue.resolve(_reference(model, version))
    there = is_ready(found, router.rules.topology, router.fleet.snapshot)
    return Response({"name": found.name, "ready": there}, status_code=200 if there else 503)


@post(
    ["/v2/models/{model:str}/infer", "/v2/models/{model:str}/versions/{version:str}/infer"],
    status_code=200,
    operation_class=InferOperation,
    responses={200: ResponseSpec(InferAnswer, generate_examples=False, description="The outputs, and how it ran.")},
)
async def infer(request: _Any, model: str, version: str | None = None) -> Response[bytes]:
    """Run the model: 200 with its outputs; 202 with the job's place, at once with `Prefer: respond-async`."""
    inference = _door(request).inference
    body = read_infer(await request.body())
    reference = _reference(model, version)
    if "respond-async" in request.headers.get("prefer", ""):
        answer: bytes | Accepted = await inference.submit(reference, body)
    else:
        answer = await inference.infer(reference, body)
    if isinstance(answer, Accepted):
        return _accepted(answer.job)
    return Response(answer, media_type=MediaType.JSON)


@post(
    ["/v2/models/{model:str}/placement", "/v2/models/{model:str}/versions/{version:str}/placement"],
    status_code=200,
    operation_class=InferOperation,
)
async def model_placement(request: _Any, model: str, version: str | None = None) -> _Json:
    """Where the fleet as it is now would run an infer request, and why; nothing is accepted."""
    body = read_infer(await request.body())
    return Response(_door(request).inference.preview(_reference(model, version), body))


@get("/v2/jobs/{job:str}")
async def job_status(request: _Any, job: str, wait: float = 0.0) -> Response[bytes]:
    """Where a job is; with `wait`, as soon as it ended or those seconds have passed."""
    return _status(await _door(request).jobs.status(job, wait=_seconds(wait)), 200)


@get("/v2/jobs/{job:str}/result")
async def job_result(request: _Any, job: str, wait: float = 0.0) -> Response[bytes]:
    """A job's answer: 200, or the job's own error; 202 while it runs, 410 when the result's time is over."""
    door = _door(request)
    found = await door.jobs.result(job, wait=_seconds(wait))
    if isinstance(found, JobStatus):
        return _status(found, 202)
    return Response(door.inference.answer(job, found), media_type=MediaType.JSON)


@get("/v2/jobs/{job:str}/placement")
async def job_placement(request: _Any, job: str) -> _Json:
    """Why a job is where it is, and the table it was chosen from, worked out again."""
    return Response(await _door(request).jobs.placement(job))


@delete("/v2/jobs/{job:str}", status_code=200)
async def job_cancel(request: _Any, job: str) -> Response[bytes]:
    """Cancel a job; one that ended before keeps its end."""
    return _status(await _door(request).jobs.cancel(job), 200)


_ENDPOINTS = [
    server_metadata,
    live,
    ready,
    fleet,
    models,
    metadata,
    model_ready,
    infer,
    model_placement,
    job_status,
    job_result,
    job_placement,
    job_cancel,
]


def _door(request: _Any) -> Door:
    door: Door = request.app.state[_DOOR]
    return door


def _reference(model: str, version: str | None) -> str:
    return model if version is None else f"{model}:{version}"


def _seconds(wait: float) -> float:
    if not math.isfinite(wait) or wait < 0:
        raise InvalidRequestError(f"wait: expected seconds >= 0, got {wait}", field="wait")
    return wait


def _accepted(job: str) -> Response[bytes]:
    location = f"/v2/jobs/{job}"
    content = _encode({"id": job, "state": "queued", "location": location})
    return Response(content, status_code=202, media_type=MediaType.JSON, headers={"location": location})


def _status(status: JobStatus, code: int) -> Response[bytes]:
    content = _encode({**msgspec.structs.asdict(status.record), "position": status.position, "eta": status.eta})
    return Response(content, status_code=code, media_type=MediaType.JSON)


def _schema_of(kind: type[Any]) -> Any:
    """The JSON Schema of `kind`, without references."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")
    return _inlined(schema, components)


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(below, components) for below in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(components[schema["$ref"]], components)
    return {key: _inlined(below, components) for key, below in schema.items()}


def _version() -> str:
    """The installed version; "0" where the fleet runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("taxiway")
    except importlib.metadata.PackageNotFoundError:
        return "0"
