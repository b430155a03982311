"""Descriptions of the endpoints' bodies and answers for the OpenAPI document; no logic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from litestar import MediaType, Router
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, Operation, SecurityScheme

from router.http.gate import needs
from router.http.protocol import InferAnswer, InferRequest
from router.http.streaming import MEDIA_TYPE, GenerateRequest
from router.operations.view import FleetView
from taxiway import errors
from taxiway.contract.binary import HEADER, OCTETS
from taxiway.contract.job import JobFailure, JobRecord, JobState
from taxiway.contract.listing import JobPage
from taxiway.errors import TaxiwayError

_KEYED = (401, 403, 429, 500)
_ASKED = (400, 404, 409, 413, 415, 422, 503)
_RUN = (409, 410, 504)


class Problem(msgspec.Struct, frozen=True):
    """Any error: its message, its code (docs/errors.md) and related values."""

    error: str
    code: str
    details: dict[str, Any]


class Place(msgspec.Struct, frozen=True):
    """Where an accepted job can be queried."""

    id: str
    state: JobState
    location: str


class JobAnswer(JobRecord, frozen=True, kw_only=True):
    """A job's record; the number of jobs before it and the seconds until it may be done, if known; its error."""

    position: int | None
    eta: float | None
    error: JobFailure | None


class Generated(msgspec.Struct, frozen=True):
    """A generated text."""

    id: str
    model_name: str
    model_version: str
    text_output: str
    finish_reason: str | None


class Event(msgspec.Struct, frozen=True):
    """A server-sent event: `data` is JSON; empty `event` and `id` are left out."""

    data: str
    event: str = ""
    id: str = ""


class InferOperation(Operation):
    """Describes an infer request's body, which the endpoint decodes itself, directly from its bytes."""

    body: ClassVar[type[Any]] = InferRequest
    headers: ClassVar[Mapping[str, str]] = {
        HEADER: "Number of JSON bytes in the body; the raw tensors that it describes follow.",
        "Prefer": "With `respond-async` the job's location is returned at once; with `wait=s`, after s seconds.",
    }

    def to_schema(self) -> dict[str, Any]:
        """The operation with its body and headers."""
        described = super().to_schema()
        headers = [
            {"name": name, "in": "header", "required": False, "description": what, "schema": {"type": "string"}}
            for name, what in self.headers.items()
        ]
        content = {MediaType.JSON.value: {"schema": _schema_of(self.body)}}
        parameters = [*described.get("parameters", []), *headers]
        return {**described, "parameters": parameters, "requestBody": {"required": True, "content": content}}


class GenerateOperation(InferOperation):
    """Describes the body of a request to generate text."""

    body = GenerateRequest
    headers: ClassVar[Mapping[str, str]] = {}


def document(version: str) -> OpenAPIConfig:
    """The OpenAPI document's configuration."""
    key = SecurityScheme(type="http", scheme="bearer", description="A key: `taxiway keys new` makes one.")
    return OpenAPIConfig(
        title="taxiway",
        version=version,
        description="The Open Inference Protocol v2, and the jobs behind it.",
        openapi_router=Router("/schema", route_handlers=[], opt=needs(), include_in_schema=False),
        render_plugins=[JsonRenderPlugin()],
        use_handler_docstrings=True,
        components=Components(security_schemes={"key": key}),
        security=[{"key": []}],
    )


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


def _by_status() -> dict[int, list[str]]:
    """The error codes by status."""
    codes: dict[int, list[str]] = defaultdict(list)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, TaxiwayError):
            codes[kind.status].append(kind.code)
    return codes


_CODES = _by_status()


def _answers(kind: Any, *statuses: int, media: str = MediaType.JSON, status: int = 200) -> dict[int, ResponseSpec]:
    """An endpoint's answers: `kind` on success, and errors under `statuses`."""
    problems = {
        one: ResponseSpec(Problem, generate_examples=False, description=", ".join(_CODES[one])) for one in statuses
    }
    good = ResponseSpec(kind, generate_examples=False, description="Success.", media_type=media)
    return {**problems, status: good}


NONE: list[dict[str, list[str]]] = [{}]
"""The security of an endpoint that needs no key."""

_FIELDS = dict[str, Any]
_PLACED = _answers(Place, status=202)

INFO = _answers(_FIELDS, *_KEYED)
PAGE = _answers(str, 403, 500, media=MediaType.HTML)
PAGE_OR_JSON = _answers(_FIELDS, 403, 500)
HEALTH = _answers(_FIELDS, 500)
READINESS = {**HEALTH, **_answers(_FIELDS, status=503)}
FLEET = _answers(FleetView, *_KEYED, 503)
FLEET_CHANGE = _answers(_FIELDS, *_KEYED, 503)
SCALING = _answers(_FIELDS, *_KEYED, 400, 404, 503)
METRICS = _answers(str, *_KEYED, 503, media=MediaType.TEXT)
INDEX = _answers(list[_FIELDS], *_KEYED, 400, 413)
MODEL = _answers(_FIELDS, *_KEYED, 404, 503)
MODEL_READY = {**MODEL, **_answers(_FIELDS, status=503)}
INFER = {**_answers(InferAnswer, *_KEYED, *_ASKED, *_RUN), **_PLACED}
PLACEMENT = _answers(_FIELDS, *_KEYED, *_ASKED)
GENERATE = {**_answers(Generated, *_KEYED, *_ASKED, *_RUN), **_PLACED}
GENERATE_STREAM = _answers(Event, *_KEYED, *_ASKED, *_RUN, media=MEDIA_TYPE)
JOB = _answers(JobAnswer, *_KEYED, 400, 404, 503)
JOBS = _answers(JobPage, *_KEYED, 400, 503)
JOB_STREAM = _answers(Event, *_KEYED, 400, 404, 410, 503, media=MEDIA_TYPE)
JOB_PLACEMENT = _answers(_FIELDS, *_KEYED, 404, 503)
JOB_RESULT = {**_answers(InferAnswer, *_KEYED, *_ASKED, *_RUN), **_answers(JobAnswer, status=202)}
DEAD = _answers(_FIELDS, *_KEYED, *_ASKED, 504)
BLOB = _answers(bytes, *_KEYED, 404, 410, 503, media=OCTETS)
"""What each endpoint answers, by status."""
