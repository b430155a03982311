"""OpenAI's calls at their paths."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Response, get
from litestar.types import ASGIApp

from api.answers import json_whole
from api.described import ASKED, RUN, openai_answers, posts, takes
from api.gate import AnyRequest, json_answer, needs, take_terms
from api.openai.answers import (
    AnyCall,
    ChatCompletion,
    ChatWriter,
    ChunkWriter,
    Completion,
    CompletionWriter,
    EmbeddingList,
    written,
)
from api.openai.calls import Begun, Calls, Read, headers_of_result
from api.openai.requests import (
    Call,
    ChatCall,
    CompletionCall,
    EmbeddingsCall,
    ParsedCall,
    chat_fields,
    completion_fields,
    embedding_fields,
    embedding_of,
    read_call,
    set_service,
    tier_of,
)
from api.services import router_of
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from taxiway.contract.request import Request as TaxiwayRequest
from taxiway.contract.request import parse_request
from taxiway.errors import UnknownModelError, quoted, wrong_field
from taxiway.running import beside

Spoken = TypeVar("Spoken", ChatCall, CompletionCall)
Fields = Callable[[ParsedCall[Call], Model], dict[str, Any]]
"""Converts a call to the fields of a request for a model."""

_USED = ("chat", "generation")
_STARTED = int(time.time())


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A name of a model that these calls can use. `taxiway` is the version it stands for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["taxiway"] = "taxiway"
    taxiway: dict[str, str]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that these calls can use."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


def listed(catalogue: Catalogue) -> ModelList:
    """The models that these calls can use, once each and by second names."""
    names = [(name, model) for name, model in catalogue.bare_names() if is_used(model)]
    return ModelList(data=[listed_model(name, model) for name, model in names])


def listed_model(name: str, model: Model) -> ListedModel:
    """A model under one of its names."""
    described = {"model": model.id, "pipeline": model.pipeline, "summary": model.summary}
    return ListedModel(id=name, created=_created(model), taxiway=described)


def _created(model: Model) -> int:
    """When the model was described; one that an endpoint announced counts from the router's start."""
    with contextlib.suppress(OSError):
        return int((Path(model.folder) / Path(model.file).name).stat().st_mtime)
    return _STARTED


def is_used(model: Model) -> bool:
    """Whether one of these calls can use a model."""
    return model.pipeline in _USED or embedding_of(model) is not None


@get("/v1/models", opt=needs(), responses=openai_answers(ModelList))
async def models(request: AnyRequest) -> Response[bytes]:
    """The models that these calls can use now. They also answer by version (`chat:1`) and alias (`chat@stable`)."""
    return json_answer(listed(router_of(request).rules.catalogue))


@get("/v1/models/{model:path}", opt=needs(), responses=openai_answers(ListedModel, 404, 503))
async def model(request: AnyRequest, model: str) -> Response[bytes]:
    """One of them. A name may have slashes."""
    model = model.removeprefix("/")
    found = router_of(request).rules.catalogue.resolve(model)
    if not is_used(found):
        raise UnknownModelError(f"model {quoted(model)} cannot be used by these calls", model=model)
    return json_answer(listed_model(model, found))


@posts(
    "/v1/chat/completions",
    opt=needs("submit"),
    operation_class=takes(ChatCall, events=True),
    responses=openai_answers(ChatCompletion, *ASKED, *RUN),
)
async def chat_completions(request: AnyRequest) -> ASGIApp:
    """Answer a chat: at once, or with `stream` as server-sent events."""
    return await _answer(request, ChatCall, chat_fields, ChatWriter)


@posts(
    "/v1/completions",
    opt=needs("submit"),
    operation_class=takes(CompletionCall, events=True),
    responses=openai_answers(Completion, *ASKED, *RUN),
)
async def completions(request: AnyRequest) -> ASGIApp:
    """Continue one or more prompts: at once, or with `stream` as server-sent events."""
    return await _answer(request, CompletionCall, completion_fields, CompletionWriter)


@posts(
    "/v1/embeddings",
    opt=needs("submit"),
    operation_class=takes(EmbeddingsCall),
    responses=openai_answers(EmbeddingList, *ASKED, *RUN),
)
async def embed(request: AnyRequest) -> ASGIApp:
    """The embeddings of one or more texts, which are one job."""
    parsed, read = await _read(request, EmbeddingsCall, embedding_fields)
    return await _whole(request, parsed.call, read)


async def read_body(request: AnyRequest, kind: type[Call]) -> ParsedCall[Call]:
    """The call in a request's body."""
    body, rules = await request.body(), router_of(request).rules
    return await beside(len(body), read_call, body, kind, rules.topology.limits)


async def read_request(
    request: AnyRequest,
    parsed: ParsedCall[Call],
    fields: Fields[Call],
    tier: str | None,
    *,
    size: int = 0,
    label: str | None = None,
) -> Read:
    """The call as a request with its terms; its size is its body's, and `size` bytes more.

    Raises:
        InvalidRequestError: it is invalid; or it has another locality than `label`, which what it continues has.
    """
    rules, size = router_of(request).rules, size + len(await request.body())
    found = rules.catalogue.resolve(parsed.call.model)
    terms = dict(parsed.terms)
    take_terms(request.scope, terms)
    if label is not None and terms.setdefault("locality", label) != label:
        raise wrong_field("locality", f"{label!r}, which the response has that this one continues", terms["locality"])
    set_service(terms, parsed.call.service_tier, tier, rules.topology)
    terms["stream"] = getattr(parsed.call, "stream", None) or None
    converted = await beside(size, lambda: _request(terms, fields(parsed, found)))
    return Read(converted, found, size, tier_of(terms["service"], rules.topology))


def _request(terms: Mapping[str, Any], fields: Mapping[str, Any]) -> TaxiwayRequest:
    """The request of these terms and fields. A stream has each row's parts if there are several."""
    several = any(isinstance(rows, list) and len(rows) > 1 for rows in fields["inputs"].values())
    stream = "rows" if terms["stream"] and several else terms["stream"]
    return parse_request({**terms, **fields, "stream": stream})


async def _read(request: AnyRequest, kind: type[Call], fields: Fields[Call]) -> tuple[ParsedCall[Call], Read]:
    parsed = await read_body(request, kind)
    return parsed, await read_request(request, parsed, fields, parsed.call.service_tier)


async def _answer(
    request: AnyRequest, kind: type[Spoken], fields: Fields[Spoken], writer: type[ChunkWriter]
) -> ASGIApp:
    parsed, read = await _read(request, kind, fields)
    if not parsed.call.stream:
        return await _whole(request, parsed.call, read)
    options = parsed.call.stream_options
    usage = options is not None and bool(options.include_usage)

    async def begin(job: str) -> Begun:
        choices = parsed.call.n or 1
        return Begun(writer(read.head(job), read.model.id, choices=choices, usage=usage))

    return await Calls(request).stream(read, begin)


async def _whole(request: AnyRequest, call: AnyCall, read: Read) -> ASGIApp:
    job, result = await Calls(request).run(read)
    content = await beside(read.size, written, call, read.model, read.head(job), result)
    return json_whole(content, headers_of_result(job, result))
