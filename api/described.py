"""The OpenAPI document, and the pages for a browser: `/`, the fleet as it is now, and `/docs`, the document as a page.

The endpoints' bodies and answers are described here; no logic. The pages need nothing from another host: they fetch
what they show themselves, and ask for a key if the router has keys. They are therefore open, like the health endpoints,
and reveal nothing about the fleet.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from litestar import MediaType, Request, Response, Router, get
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, Operation, SecurityScheme

from api.access import UNAUTHENTICATED
from api.gate import caller_of, needs
from api.inference.protocol import InferAnswer, InferRequest
from api.inference.streaming import MEDIA_TYPE, GenerateRequest
from api.operators.view import FleetView
from api.terms import HEADERS
from taxiway import errors
from taxiway.contract.job import JobFailure, JobRecord, JobState
from taxiway.contract.listing import JobPage
from taxiway.contract.tensors import HEADER, OCTETS
from taxiway.errors import TaxiwayError

KEYED = (401, 403, 429, 500)
ASKED = (400, 404, 409, 413, 415, 422, 503)
RUN = (409, 410, 504)


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


TERMS: Mapping[str, str] = {header: its.meaning for header, its in HEADERS.items()}
"""What the headers mean that give service terms."""


class InferOperation(Operation):
    """Describes an infer request's body, which the endpoint decodes itself, directly from its bytes."""

    body: ClassVar[type[Any]] = InferRequest
    headers: ClassVar[Mapping[str, str]] = {
        HEADER: "Number of JSON bytes in the body; the raw tensors that it describes follow.",
        "Prefer": "With `respond-async` the job's location is returned at once; with `wait=s`, after s seconds.",
        **TERMS,
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


def or_events(described: dict[str, Any]) -> dict[str, Any]:
    """The schema of an operation that answers by server-sent events if it is asked to."""
    answered = described["responses"]
    content = {**answered["200"]["content"], MEDIA_TYPE: {"schema": {"type": "string"}}}
    return {**described, "responses": {**answered, "200": {**answered["200"], "content": content}}}


class GenerateOperation(InferOperation):
    """Describes the body of a request to generate text."""

    body = GenerateRequest
    headers = TERMS


def document(version: str) -> OpenAPIConfig:
    """The OpenAPI document's configuration."""
    key = SecurityScheme(type="http", scheme="bearer", description="A key: `taxiway keys new` makes one.")
    return OpenAPIConfig(
        title="taxiway",
        version=version,
        description="The Open Inference Protocol v2, OpenAI's API, and the jobs behind them.",
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


def answers(
    kind: Any, *statuses: int, media: str = MediaType.JSON, status: int = 200, problem: type[Any] = Problem
) -> dict[int, ResponseSpec]:
    """An endpoint's answers: `kind` on success, and errors of the form `problem` under `statuses`."""
    problems = {
        one: ResponseSpec(problem, generate_examples=False, description=", ".join(_CODES[one])) for one in statuses
    }
    good = ResponseSpec(kind, generate_examples=False, description="Success.", media_type=media)
    return {**problems, status: good}


NONE: list[dict[str, list[str]]] = [{}]
"""The security of an endpoint that needs no key."""

_FIELDS = dict[str, Any]
_PLACED = answers(Place, status=202)

INFO = answers(_FIELDS, *KEYED)
PAGE = answers(str, 403, 500, media=MediaType.HTML)
PAGE_OR_JSON = answers(_FIELDS, 403, 500)
HEALTH = answers(_FIELDS, 500)
READINESS = {**HEALTH, **answers(_FIELDS, status=503)}
FLEET = answers(FleetView, *KEYED, 503)
FLEET_STREAM = answers(Event, *KEYED, 503, media=MEDIA_TYPE)
FLEET_CHANGE = answers(_FIELDS, *KEYED, 503)
SCALING = answers(_FIELDS, *KEYED, 400, 404, 503)
METRICS = answers(str, *KEYED, 503, media=MediaType.TEXT)
INDEX = answers(list[_FIELDS], *KEYED, 400, 413, 415)
REPOSITORY = answers(_FIELDS, *KEYED, 400, 404, 413, 415, 503)
MODEL = answers(_FIELDS, *KEYED, 404, 503)
MODEL_READY = {**MODEL, **answers(_FIELDS, status=503)}
INFER = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **_PLACED}
PLACEMENT = answers(_FIELDS, *KEYED, *ASKED)
GENERATE = {**answers(Generated, *KEYED, *ASKED, *RUN), **_PLACED}
GENERATE_STREAM = answers(Event, *KEYED, *ASKED, *RUN, media=MEDIA_TYPE)
JOB = answers(JobAnswer, *KEYED, 400, 404, 503)
JOBS = answers(JobPage, *KEYED, 400, 503)
JOB_STREAM = answers(Event, *KEYED, 400, 404, 410, 503, media=MEDIA_TYPE)
JOB_PLACEMENT = answers(_FIELDS, *KEYED, 404, 503)
JOB_RESULT = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **answers(JobAnswer, status=202)}
DEAD = answers(_FIELDS, *KEYED, *ASKED, 504)
BLOB = answers(bytes, *KEYED, 404, 410, 503, media=OCTETS)
"""What each endpoint answers, by status."""


VERSION = "version"
"""Key of the version in the application's state."""

_LINKS = {"docs": "/docs", "openapi": "/schema/openapi.json", "api": "/v2", "models": "/v2/models"}
_LINKS |= {"health": "/v2/health/ready"}
_ABOUT = "Air traffic control for AI inference: each request runs on the cheapest device that meets its deadline."
_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _digest(text: str, begin: str, end: str) -> str:
    """The content security policy source for the one inline script or style between two tags."""
    inside = text.partition(begin)[2].partition(end)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


def _read_page(name: str) -> tuple[str, dict[str, str]]:
    """A page beside this module, and its headers: nothing but itself may run in it."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    script, style = _digest(text, "<script>", "</script>"), _digest(text, "<style>", "</style>")
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; form-action 'self'"
    return text, {**_SAFE, "content-security-policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'"}


_DOCS, _DOCS_HEADERS = _read_page("docs.html")
_PAGE, _PAGE_HEADERS = _read_page("page.html")


@get("/", opt=needs(), responses=PAGE_OR_JSON, security=NONE)
async def root(request: Request[Any, Any, Any]) -> Response[Any]:
    """The fleet as a page, if the client prefers HTML; else what this server is, with links, in JSON."""
    if MediaType.HTML.value in request.headers.get("accept", ""):
        return Response(_PAGE, media_type=MediaType.HTML, headers={**_PAGE_HEADERS, "vary": "accept"})
    content = {"name": "taxiway", "about": _ABOUT}
    # without a key no version is shown: it would help to look up known vulnerabilities
    if caller_of(request.scope) is not UNAUTHENTICATED:
        content["version"] = request.app.state[VERSION]
    return Response({**content, "links": _LINKS}, headers={"vary": "accept"})


@get("/docs", opt=needs(), responses=PAGE, security=NONE)
async def docs() -> Response[str]:
    """The OpenAPI document as a page."""
    return Response(_DOCS, media_type=MediaType.HTML, headers=_DOCS_HEADERS)


ENDPOINTS = (root, docs)
