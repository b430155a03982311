"""What the OpenAPI document says of the endpoints' bodies and answers; it decides nothing."""

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
    """Any error: what is wrong, its code (docs/errors.md), and values that belong to it."""

    error: str
    code: str
    details: dict[str, Any]


class Place(msgspec.Struct, frozen=True):
    """Where a job that was accepted can be asked for."""

    id: str
    state: JobState
    location: str


class JobAnswer(JobRecord, frozen=True, kw_only=True):
    """A job's record, the jobs before it and the seconds until it may be done, as far as they are known; its error."""

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
    """A server-sent event: `data` is JSON; `event` and `id` are left out where they are empty."""

    data: str
    event: str = ""
    id: str = ""


class InferOperation(Operation):
    """Describes an infer request's body, which the endpoint itself decodes, straight from its bytes."""

    body: ClassVar[type[Any]] = InferRequest
    headers: ClassVar[Mapping[str, str]] = {
        HEADER: "How many bytes of the body are JSON; the tensors that it names follow, raw.",
        "Prefer": "With `respond-async` the answer is the job's place, at once; with `wait=s`, after so many seconds.",
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
    """The OpenAPI document's head."""
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
    """The codes of the errors that each status tells of."""
    codes: dict[int, list[str]] = defaultdict(list)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, TaxiwayError):
            codes[kind.status].append(kind.code)
    return codes


_CODES = _by_status()


def _answers(kind: Any, *statuses: int, media: str = MediaType.JSON, status: int = 200) -> dict[int, ResponseSpec]:
    """An endpoint's answers: a `kind` where all is well, and errors under `statuses`."""
    problems = {
        one: ResponseSpec(Problem, generate_examples=False, description=", ".join(_CODES[one])) for one in statuses
    }
    good = ResponseSpec(kind, generate_examples=False, description="What was asked for.", media_type=media)
    return {**problems, status: good}


NONE: list[dict[str, list[str]]] = [{}]
"""What an endpoint says that needs no key."""

_FIELDS = dict[str, Any]
_PLACED = _answers(Place, status=202)

TOLD = _answers(_FIELDS, *_KEYED)
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
