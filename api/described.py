"""The OpenAPI document, and what endpoints say in it of their bodies and answers; no logic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from litestar import MediaType, Router, delete, post
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, Operation, SecurityScheme

from api.gate import needs
from api.openai_errors import ErrorContent
from api.terms import HEADERS
from taxiway import errors
from taxiway.errors import TaxiwayError

EVENTS = "text/event-stream"
"""The media type of server-sent events."""

KEYED = (401, 403, 429, 500)
ASKED = (400, 404, 409, 413, 415, 422, 503)
RUN = (409, 410, 504)


class Problem(msgspec.Struct, frozen=True):
    """Any error: its message, its code (docs/errors.md) and related values."""

    error: str
    code: str
    details: dict[str, Any]


class ServerSentEvent(msgspec.Struct, frozen=True):
    """A server-sent event: `data` is JSON; empty `event` and `id` are left out."""

    data: str
    event: str = ""
    id: str = ""


TERMS: Mapping[str, str] = {header: its.meaning for header, its in HEADERS.items()}
"""What the headers mean that give service terms."""


def of_model(path: str) -> list[str]:
    """The paths of an endpoint below a model, and below a version of it."""
    return [f"/v2/models/{{model:str}}{path}", f"/v2/models/{{model:str}}/versions/{{version:str}}{path}"]


posts, deletes = partial(post, status_code=200), partial(delete, status_code=200)
"""Decorators of endpoints."""


def takes(body: type[Any], headers: Mapping[str, str] = TERMS, *, events: bool = False) -> type[Operation]:
    """Describes an endpoint that decodes its body itself, directly from the bytes; `events` as `Evented`."""

    class Described(Evented if events else Operation):  # type: ignore[misc]  # mypy knows no base that depends
        def to_schema(self) -> dict[str, Any]:
            described = super().to_schema()
            read = [
                {"name": name, "in": "header", "required": False, "description": what, "schema": {"type": "string"}}
                for name, what in headers.items()
            ]
            (schema,), components = msgspec.json.schema_components([body], ref_template="{name}")
            content = {MediaType.JSON.value: {"schema": _inlined(schema, components)}}
            parameters = [*described.get("parameters", []), *read]
            return {**described, "parameters": parameters, "requestBody": {"required": True, "content": content}}

    return Described


class Evented(Operation):
    """Describes an endpoint that answers by server-sent events if it is asked to."""

    def to_schema(self) -> dict[str, Any]:
        """The operation, with both forms of its answer."""
        described = super().to_schema()
        answered = described["responses"]
        content = {**answered["200"]["content"], EVENTS: {"schema": {"type": "string"}}}
        return {**described, "responses": {**answered, "200": {**answered["200"], "content": content}}}


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


def openai_answers(kind: Any, *statuses: int, media: str = MediaType.JSON) -> dict[int, ResponseSpec]:
    """The answers of one of OpenAI's endpoints, for callers with a key."""
    return answers(kind, *KEYED, *statuses, media=media, problem=ErrorContent)


FIELDS = dict[str, Any]
"""The form of answers that have no type of their own."""

NONE: list[dict[str, list[str]]] = [{}]
"""The security of an endpoint that needs no key."""
