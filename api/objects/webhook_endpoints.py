"""Webhook endpoints, in the form of OpenAI's API, also with their tenant, deliveries and dead letters.

An operator registers them, for any tenant; a reader sees those of its own tenant. A secret is in the answer to
the call that made it, and in no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from litestar import Response, get
from litestar.params import Parameter

from api.described import deletes, openai_answers, posts, takes
from api.gate import AnyRequest, caller_of, json_answer, needs
from api.openai.requests import read_fields
from api.routing.webhooks import WebhookRegistry, hint_of
from api.services import router_of, tenant_of
from api.storage.objects import Deleted, Page, owner_of, page_of
from broker.valkey.webhooks import DeadEvent
from router.decide.webhooks import WebhookEndpoint, message_of
from tasks.topology import TenantName
from taxiway.contract.request import EventType
from taxiway.errors import InvalidRequestError

LISTED_ENDPOINTS = 1000
"""Most endpoints, or dead letters, in one list."""

_Limit = Annotated[int, Parameter(description="Objects per page.", ge=1, le=LISTED_ENDPOINTS)]
_After = Annotated[str, Parameter(description="The id of the last object of the previous page.")]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Types = Annotated[list[EventType | Literal["*"]], msgspec.Meta(min_length=1)]


class EndpointCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for an endpoint; the `tenant` is the caller's own if none is given."""

    name: _Name
    url: str
    event_types: _Types
    tenant: TenantName | None = None
    only_named: bool = False


class EndpointChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The body of a request that changes an endpoint."""

    name: _Name | None = None
    url: str | None = None
    event_types: _Types | None = None
    only_named: bool | None = None


class RotateCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a new secret: whether events are signed with the old one, too, for a time."""

    keep_old_secret_active_for_24_hours: bool = True


class TestCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a sample event."""

    event_type: EventType


class ReplayCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request to send dead letters again: ids of their events, all if none is given."""

    events: list[str] = []


class EndpointAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An endpoint. Times are Unix seconds."""

    object: Literal["webhook_endpoint"]
    id: str
    name: str
    url: str
    event_types: tuple[str, ...]
    created_at: int
    updated_at: int
    tenant: str
    only_named: bool
    waiting: int
    """Events to be sent."""
    dead: int
    """Events that were given up."""
    signing_secret_hint: str
    fault: str = ""
    """Why the first event that waits was not taken."""
    signing_secret: str = ""
    """Only in the answer of the call that made it."""


class TestAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint answered to a sample event."""

    webhook_endpoint_id: str
    event_type: str
    status_code: int
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    success: Literal[True] = True


class EventTypes(msgspec.Struct, frozen=True, kw_only=True):
    """The events that an endpoint can be notified of."""

    object: Literal["list"] = "list"
    data: tuple[str, ...] = get_args(EventType)


class DeadAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was given up: when and why, after how many attempts, and what would have been sent."""

    id: str
    type: str
    at: float
    attempts: int
    fault: str
    event: dict[str, Any]


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """How many dead letters are sent again."""

    replayed: int


_CALLED = (400, 404, 413, 415)
_READ = needs("read", "admin")
_PATH = "/v1/webhook_endpoints/{endpoint:str}"


@get("/v1/webhook_event_types", opt=_READ, responses=openai_answers(EventTypes, 503))
async def event_types() -> Response[bytes]:
    """The types of event that an endpoint can be notified of."""
    return json_answer(EventTypes())


@posts(
    "/v1/webhook_endpoints",
    responses=openai_answers(EndpointAnswer, *_CALLED, 503),
    operation_class=takes(EndpointCall, {}),
)
async def endpoint_create(request: AnyRequest) -> Response[bytes]:
    """Register an endpoint of a tenant. Its secret is shown this once."""
    call = await _read(request, EndpointCall)
    made = await _webhooks(request).add(
        tenant=call.tenant or owner_of(tenant_of(request)),
        name=call.name,
        url=call.url,
        event_types=_each(call.event_types),
        only_named=call.only_named,
    )
    return await _shown(request, made, secret=True)


@get("/v1/webhook_endpoints", opt=_READ, responses=openai_answers(Page, 400, 503))
async def endpoints(request: AnyRequest, limit: _Limit = 20, after: _After = "") -> Response[bytes]:
    """The endpoints of the caller's tenant, for an operator of all; the latest first."""
    webhooks = _webhooks(request)
    found = await webhooks.all(_seen_by(request))
    begin = next((place + 1 for place, one in enumerate(found) if one.id == after), 0)
    page = found[begin : begin + limit]
    answers = [_answer(one, *its) for one, its in zip(page, await webhooks.view(page), strict=True)]
    return json_answer(page_of(answers, len(found) > begin + limit))


@get(_PATH, opt=_READ, responses=openai_answers(EndpointAnswer, 404, 503))
async def endpoint(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """An endpoint, and how its deliveries go."""
    return await _shown(request, await _webhooks(request).get(endpoint, _seen_by(request)))


@posts(_PATH, responses=openai_answers(EndpointAnswer, *_CALLED, 503), operation_class=takes(EndpointChange, {}))
async def endpoint_change(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """Change an endpoint's name, address or events. What waits goes to the new address."""
    call = await _read(request, EndpointChange)
    fields = {name: value for name, value in msgspec.structs.asdict(call).items() if value is not None}
    if call.event_types is not None:
        fields["event_types"] = _each(call.event_types)
    return await _shown(request, await _webhooks(request).replace(endpoint, _seen_by(request), **fields))


@deletes(_PATH, responses=openai_answers(Deleted, 404, 503))
async def endpoint_delete(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """Remove an endpoint, with the events that wait for it."""
    removed = await _webhooks(request).remove(endpoint, _seen_by(request))
    return json_answer(Deleted(id=removed, object="webhook_endpoint.deleted"))


@posts(
    f"{_PATH}/rotate_secret",
    responses=openai_answers(EndpointAnswer, *_CALLED, 503),
    operation_class=takes(RotateCall, {}),
)
async def endpoint_rotate(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """Make a new secret, which is shown this once."""
    call = await _read(request, RotateCall)
    overlap = call.keep_old_secret_active_for_24_hours
    return await _shown(
        request, await _webhooks(request).rotate(endpoint, _seen_by(request), overlap=overlap), secret=True
    )


@posts(f"{_PATH}/test", responses=openai_answers(TestAnswer, *_CALLED, 503), operation_class=takes(TestCall, {}))
async def endpoint_test(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """Send a sample event at once, and say what the endpoint answered."""
    call, webhooks = await _read(request, TestCall), _webhooks(request)
    found = await webhooks.get(endpoint, _seen_by(request))
    status = await webhooks.test(found, call.event_type)
    return json_answer(TestAnswer(webhook_endpoint_id=found.id, event_type=call.event_type, status_code=status))


@get(f"{_PATH}/dead_letters", opt=_READ, responses=openai_answers(Page, 400, 404, 503))
async def endpoint_dead(request: AnyRequest, endpoint: str, limit: _Limit = 100) -> Response[bytes]:
    """The latest events that an endpoint did not take in time."""
    webhooks = _webhooks(request)
    found = await webhooks.dead((await webhooks.get(endpoint, _seen_by(request))).id, limit + 1)
    return json_answer(page_of([*map(_dead_answer, found[:limit])], len(found) > limit))


@posts(
    f"{_PATH}/dead_letters/replay",
    responses=openai_answers(Replayed, *_CALLED, 503),
    operation_class=takes(ReplayCall, {}),
)
async def endpoint_replay(request: AnyRequest, endpoint: str) -> Response[bytes]:
    """Send dead letters again, after the events that wait."""
    call, webhooks = await _read(request, ReplayCall), _webhooks(request)
    found = await webhooks.get(endpoint, _seen_by(request))
    names = [name.removeprefix("evt_") for name in call.events]
    return json_answer(Replayed(replayed=await webhooks.replay(found.id, names)))


async def _read(request: AnyRequest, kind: type[Any]) -> Any:
    """A body; an empty one has no fields."""
    try:
        return read_fields(await request.body() or b"{}", kind, 10_000)[1]
    except InvalidRequestError as wrong:
        hint = f"; expected * or some of {', '.join(get_args(EventType))}" if "event_types" in wrong.message else ""
        raise InvalidRequestError(f"{wrong.message}{hint}", **wrong.details) from wrong


def _each(types: Sequence[EventType | Literal["*"]]) -> tuple[EventType, ...]:
    """The types of event; `*` stands for all."""
    return get_args(EventType) if "*" in types else tuple(dict.fromkeys(types))  # type: ignore[arg-type]  # no * here


async def _shown(request: AnyRequest, found: WebhookEndpoint, *, secret: bool = False) -> Response[bytes]:
    (figures,) = await _webhooks(request).view([found])
    answer = _answer(found, *figures)
    if secret:
        answer = msgspec.structs.replace(answer, signing_secret=found.secrets[0].text)
    return json_answer(answer, {"cache-control": "no-store"})


def _answer(one: WebhookEndpoint, waiting: int, dead: int, fault: str) -> EndpointAnswer:
    known: dict[str, Any] = {name: value for name, value in msgspec.structs.asdict(one).items() if name != "secrets"}
    its: dict[str, Any] = {"waiting": waiting, "dead": dead, "fault": fault, "signing_secret_hint": hint_of(one)}
    return EndpointAnswer(object="webhook_endpoint", **its, **known)


def _dead_answer(one: DeadEvent) -> DeadAnswer:
    event = msgspec.json.decode(message_of(one.event).body)
    return DeadAnswer(
        id=event["id"], type=event["type"], at=one.at, attempts=one.attempts, fault=one.fault, event=event
    )


def _seen_by(request: AnyRequest) -> str | None:
    """Whose endpoints the caller sees: its tenant's; None: everyone's."""
    caller = caller_of(request.scope)
    return None if "admin" in caller.scopes else caller.tenant


def _webhooks(request: AnyRequest) -> WebhookRegistry:
    return router_of(request).registry
