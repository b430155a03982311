"""Bodies of OpenAI's calls and their service terms, converted to requests of ours. Pure.

A chat is passed to its model without the fields that this server reads itself, so a model on an endpoint may support
fields that are not named here. A field that no model here supports is refused by name. OpenAI's `service_tier` names a
service of queues.yaml; the other terms are in headers, or in fields of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec

from api.openai_errors import UNSUPPORTED
from api.terms import BODY_TERMS, terms_in
from router.service.admission import check_size
from tasks.models.chats import read_chat
from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
from tasks.queues.limits import Limits
from tasks.topology import Topology
from taxiway.contract.limits import COUNT, WHOLE_VALUES_DIVISOR, check_json
from taxiway.contract.request import MAX_NAME
from taxiway.errors import UNREADABLE, InvalidRequestError, unreadable, wrong_field

MOST_CHOICES = 128
"""Most choices of one call."""

ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Count = Annotated[int, msgspec.Meta(ge=1, le=COUNT)]
_Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Short = Annotated[str, msgspec.Meta(max_length=512)]
Metadata = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=MOST_CHOICES)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Likely = Annotated[int, msgspec.Meta(ge=0, le=20)]
_Texts = Annotated[list[Any], msgspec.Meta(min_length=1)]

_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
    "web_search_options": (),
}
"""Fields that no model here supports, with the values that have no effect."""


class StreamOptions(msgspec.Struct, frozen=True):
    """Whether a stream ends with a chunk that has the usage."""

    include_usage: bool | None = None


class OpenAICall(msgspec.Struct, frozen=True, kw_only=True):
    """What every call has. `NOTHING` are unsupported fields, with the values that have no effect."""

    NOTHING: ClassVar[Mapping[str, tuple[Any, ...]]] = _NOTHING

    model: ModelName
    service_tier: str | None = None
    user: Short | None = None


class SpokenCall(OpenAICall, frozen=True, kw_only=True):
    """What calls have that generate text."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: _Choices | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    seed: _Seed | None = None
    stop: str | list[str] | None = None


class ChatCall(SpokenCall, frozen=True, kw_only=True):
    """The body of a chat completion, as OpenAI describes it; further fields are passed to the model."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    top_p: Share | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Likely | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None


class CompletionCall(SpokenCall, frozen=True, kw_only=True):
    """The body of a completion, as OpenAI describes it; further fields are parameters of the model."""

    prompt: str | _Texts
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None


class EmbeddingsCall(OpenAICall, frozen=True, kw_only=True):
    """The body of a request for embeddings."""

    input: str | _Texts
    encoding_format: str | None = None
    dimensions: Count | None = None


Body = TypeVar("Body")
Call = TypeVar("Call", bound=OpenAICall)


@dataclass(frozen=True, slots=True)
class ParsedCall(Generic[Call]):
    """A call, with the fields of its body: service terms, and all others."""

    call: Call
    fields: dict[str, Any]
    terms: dict[str, Any]


_SERVER_FIELDS = ("model", "stream", "stream_options", "n", "service_tier")
"""Fields that this server reads itself."""

_DEFAULTS: Mapping[str, Any] = {"frequency_penalty": 0, "logit_bias": {}, "presence_penalty": 0, "top_p": 1}
"""Values that change no completion."""

_FORMATS = ("float", "base64")
_LOGPROBS = "logprobs"


def read_fields(body: bytes, kind: type[Body], most: int) -> tuple[dict[str, Any], Body]:
    """The fields of a JSON body, and what a `kind` has of them.

    Raises:
        InvalidRequestError: not JSON, or a field is missing or of another type; names it.
        RequestTooLargeError: it has more than `most` values.
    """
    check_json(body, most)
    try:
        fields = msgspec.json.decode(body)
        return fields, msgspec.convert(fields, kind)
    except UNREADABLE as error:
        raise unreadable(error) from error


def read_call(body: bytes, kind: type[Call], limits: Limits) -> ParsedCall[Call]:
    """The call in a body.

    Raises:
        InvalidRequestError: not JSON, or a field is missing, of another type or not supported; names it.
        RequestTooLargeError: it has more values than a fifth of the limit, because one call decodes them all; or its
            choices would together be larger than a payload.
    """
    fields, call = read_fields(body, kind, limits.elements // WHOLE_VALUES_DIVISOR)
    for name, values in kind.NOTHING.items():
        if (value := fields.get(name)) is not None and value not in values:
            raise unsupported(name, "nothing, as it is not supported here", value)
    check_size(len(body) * (getattr(call, "n", None) or 1), int(limits.payload))
    given = {name: value for name, value in fields.items() if value is not None and name not in BODY_TERMS}
    return ParsedCall(call, given, terms_in(fields))


def chat_fields(parsed: ParsedCall[ChatCall], model: Model) -> dict[str, Any]:
    """The request's fields for a chat: a row for each choice.

    Raises:
        InvalidRequestError: the model does not chat, or the messages are malformed.
    """
    chat = {name: value for name, value in parsed.fields.items() if name not in (*_SERVER_FIELDS, *ChatCall.NOTHING)}
    if parsed.call.top_logprobs and not parsed.call.logprobs:
        raise wrong_field("top_logprobs", "nothing without logprobs", parsed.call.top_logprobs)
    return chat_request(parsed.call.model, chat, model, parsed.call.n or 1)


def chat_request(name: str, chat: dict[str, Any], model: Model, choices: int = 1) -> dict[str, Any]:
    """The request's fields for a chat with the model of that name: a row for each choice.

    Raises:
        InvalidRequestError: the model does not chat, or the messages are malformed.
    """
    first = _first_input(model, model.pipeline == "chat", "that answers chats")
    _check_choices(choices, model)
    return {"model": name, "inputs": {first: _rows(read_chat(chat, f"inputs.{first}"), choices)}}


def completion_fields(parsed: ParsedCall[CompletionCall], model: Model) -> dict[str, Any]:
    """The request's fields for a completion: a row for each prompt and choice.

    Raises:
        InvalidRequestError: the model does not complete texts or gives no probabilities, or a prompt is not text.
    """
    first = _first_input(model, model.pipeline == "generation", "that continues prompts")
    ours = (*_SERVER_FIELDS, *CompletionCall.NOTHING, "prompt", "user")
    parameters = {name: value for name, value in parsed.fields.items() if name not in ours}
    parameters = {name: value for name, value in parameters.items() if _DEFAULTS.get(name) != value}
    if isinstance(parameters.get("stop"), str):
        parameters["stop"] = [parameters["stop"]]
    given = {"model": parsed.call.model, "parameters": parameters, "outputs": _outputs(parsed.call, model)}
    prompts, choices = texts_of(parsed.call.prompt, "prompt"), parsed.call.n or 1
    _check_choices(choices, model)
    if isinstance(prompts, str) and choices == 1:
        return {**given, "inputs": {first: prompts}}
    listed = [prompts] if isinstance(prompts, str) else prompts
    return {**given, "inputs": {first: [prompt for prompt in listed for _ in range(choices)]}}


def _outputs(call: CompletionCall, model: Model) -> list[str]:
    """The outputs that a completion needs; none for the usual ones."""
    if call.logprobs is None:
        return []
    if _LOGPROBS not in model.parameters or _LOGPROBS not in (spec.name for spec in model.outputs):
        raise unsupported(_LOGPROBS, f"nothing, as {model.id} does not give them", call.logprobs)
    return [*model.usual_outputs, _LOGPROBS]


def embedding_fields(parsed: ParsedCall[EmbeddingsCall], model: Model) -> dict[str, Any]:
    """The request's fields for embeddings: a row for each text.

    Raises:
        InvalidRequestError: the model gives no embeddings or not so many dimensions, or an input is not text.
    """
    call, output = parsed.call, embedding_of(model)
    first = _first_input(model, output is not None, "that gives embeddings")
    if call.encoding_format not in (None, *_FORMATS):
        raise wrong_field("encoding_format", f"one of {list(_FORMATS)}", call.encoding_format)
    assert output is not None
    if call.dimensions is not None and not call.dimensions <= output.shape[1]:
        most = f"1 to {output.shape[1]}" if output.shape[1] > 0 else f"nothing, as {model.id} does not state its width"
        raise unsupported("dimensions", most, call.dimensions)
    inputs = {first: texts_of(call.input, "input")}
    return {"model": call.model, "inputs": inputs, "outputs": [output.name]}


def embedding_of(model: Model) -> TensorSpec | None:
    """The output that is a text's embedding: a row of numbers for each text; None if there is none."""
    if model.pipeline != "text":
        return None
    found = (spec for spec in model.outputs if spec.datatype == "FP32" and len(spec.shape) == 2)
    return next(found, None)


def texts_of(value: str | list[Any], name: str) -> str | list[str]:
    """A text or list of texts.

    Raises:
        InvalidRequestError: it holds tokens, which no model here reads, or something else.
    """
    for index, text in enumerate(value if isinstance(value, list) else ()):
        if isinstance(text, int | list):
            raise unsupported(f"{name}[{index}]", "text, as tokens are not supported", text)
        if not isinstance(text, str):
            raise wrong_field(f"{name}[{index}]", "text", text)
    return value


def unsupported(name: str, expected: str, value: object) -> InvalidRequestError:
    """The error for a field that is not supported."""
    return wrong_field(name, expected, value, **{UNSUPPORTED: True})


def _rows(chat: dict[str, Any], choices: int) -> dict[str, Any] | list[dict[str, Any]]:
    """The chat, once per choice, each with its own seed if it has one."""
    if choices == 1:
        return chat
    seed = chat.get("seed")
    return [chat if seed is None else {**chat, "seed": seed + index} for index in range(choices)]


def _check_choices(choices: int, model: Model) -> None:
    if choices > model.max_rows:
        raise wrong_field("n", f"at most {model.max_rows} choices of {model.id} (max_rows)", choices)


def _first_input(model: Model, fits: bool, expected: str) -> str:
    if not fits:
        raise InvalidRequestError(f"model: expected one {expected}, got {model.id}", field="model")
    return model.inputs[0].name


_AUTO = "auto"


def service_of(tier: str | None, topology: Topology) -> str:
    """The service that a tier selects.

    Raises:
        InvalidRequestError: queues.yaml has no service for it.
    """
    tiers = {service.tier: name for name, service in topology.service.items() if service.tier is not None}
    if tier in (None, _AUTO):
        return tiers.get("default", topology.default_service)
    known = {"default": topology.default_service, **tiers}
    if tier not in known:
        raise unsupported("service_tier", f"one of {sorted([_AUTO, *known])}", tier)
    return known[tier]


def set_service(terms: dict[str, Any], asked: str | None, tier: str | None, topology: Topology) -> None:
    """Set the service that `tier` selects, unless the terms name one; `asked` is the call's own tier.

    Raises:
        InvalidRequestError: the call names both, or queues.yaml has no such service.
    """
    name = terms.setdefault("service", service_of(tier, topology))
    if asked not in (None, _AUTO) and name != service_of(asked, topology):
        raise wrong_field("service_tier", "nothing beside a service", asked)
    if name not in [*topology.service]:
        raise wrong_field("service", f"one of {sorted(topology.service)}", name)


def tier_for_later(tier: str | None, topology: Topology) -> str | None:
    """The tier of work that no caller waits for: `flex` unless it asks for another, if there is a service for that."""
    tiers = {service.tier for service in topology.service.values()}
    return "flex" if tier in (None, _AUTO) and "flex" in tiers else tier


def tier_of(service: str, topology: Topology) -> str:
    """The tier that serves a job of a service."""
    return topology.service[service].tier or "default"
