"""Responses as values: the call, also as a chat, the response, its states and the items of its output. Pure.

A response is a job, `resp_` and the job's id. What a stored one keeps of its conversation are its own input, its output
and the ids of the responses before it.

Source: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec

from api.openai.answers import AnswerHead, AnswerReport, report_of, usage_of
from api.openai.requests import (
    Count,
    Likely,
    Metadata,
    OpenAICall,
    ParsedCall,
    Share,
    Short,
    StreamOptions,
    Temperature,
    chat_request,
    unsupported,
)
from api.openai_errors import code_of
from tasks.models.chats import ROLES
from tasks.models.model import Model
from tasks.telemetry import redacted
from taxiway.contract.job import JobState, Result
from taxiway.errors import (
    InvalidRequestError,
    JobCancelledError,
    OverloadedError,
    RateLimitedError,
    RequestError,
    TaxiwayError,
    quoted,
    wrong_field,
)

PREFIX = "resp_"
"""What a response's id has before its job's."""

MOST_TURNS = 1000
"""Most responses that one continues, with those before them."""

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ENDED = frozenset({"completed", "incomplete", "failed", "cancelled"})
"""States that a response never leaves."""

Item = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
"""What a call includes to get the probabilities of tokens."""

_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")  # the second is empty: what a model reasoned is not hidden here

_ECHOED = (
    *("instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key", "reasoning"),
    *("safety_identifier", "temperature", "top_logprobs", "top_p", "user"),
)
"""What a response has as its call has it."""


class ResponseCall(OpenAICall, frozen=True, kw_only=True):
    """The body of a request for a response, as OpenAI describes it."""

    NOTHING: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[Item], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    previous_response_id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Short | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: Short | None = None
    temperature: Temperature | None = None
    text: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_logprobs: Likely | None = None
    top_p: Share | None = None

    @property
    def stored(self) -> bool:
        """Whether the response is kept; it is unless the caller says otherwise."""
        return self.store is not False


class Cached(msgspec.Struct, frozen=True):
    """Tokens that the engine had read before, and that it kept for later."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class Reasoned(msgspec.Struct, frozen=True):
    """Tokens that the model reasoned with."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens read, generated, and both."""

    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: Reasoned
    total_tokens: int


class ResponseFailure(msgspec.Struct, frozen=True):
    """Why a response failed; `type` is the error's own code."""

    code: str
    message: str
    type: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response, as OpenAI describes it: its request, its progress and its output. Times are Unix seconds."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseFailure | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any] | None
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    taxiway: AnswerReport | None = None
    """Where it ran, and why."""

    @property
    def ended(self) -> bool:
        """Whether it has its final state."""
        return self.status in ENDED

    @property
    def job(self) -> str:
        """Its job's id."""
        return self.id.removeprefix(PREFIX)


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is kept: its own input, and the ids of the responses before it, oldest first.

    `webhook` is the endpoint that its request named, and `locality` the label that it or one before it has.
    """

    tenant: str
    input: list[Item]
    earlier: list[str]
    response: Response
    webhook: str | None = None
    locality: str | None = None


class Conversation(NamedTuple):
    """Responses that a call continues: their ids and items, oldest first, and the label that they have."""

    names: Sequence[str] = ()
    items: Sequence[Item] = ()
    locality: str | None = None


def begun(call: ResponseCall, model: Model, head: AnswerHead) -> Response:
    """The response to a call whose job was accepted."""
    return Response(
        id=PREFIX + head.job,
        created_at=head.created,
        status="queued" if call.background else "in_progress",
        background=bool(call.background),
        metadata=call.metadata or {},
        model=model.id,
        parallel_tool_calls=call.parallel_tool_calls is not False,
        service_tier=head.tier,
        store=call.stored,
        text=call.text or {"format": {"type": "text"}},
        tool_choice=call.tool_choice or "auto",
        tools=call.tools or [],
        **{name: getattr(call, name) for name in _ECHOED},
    )


def succeeded(response: Response, result: Result, now: int, output: Sequence[Item] | None = None) -> Response:
    """The response whose job has a result; `output` if its items were made before."""
    finish = _only(result, "finish-reason")
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(str(finish))
    status: Status = "completed" if reason is None else "incomplete"
    items = output_of(response.job, result) if output is None else output
    return msgspec.structs.replace(
        response,
        status=status,
        completed_at=now if reason is None else None,
        incomplete_details=None if reason is None else {"reason": reason},
        model=result.model,
        output=[{**item, "status": status} for item in items],
        usage=_usage(result),
        taxiway=report_of(response.job, result),
    )


def failed(response: Response, error: TaxiwayError) -> Response:
    """The response whose job ended with an error, or was cancelled."""
    if isinstance(error, JobCancelledError):
        return msgspec.structs.replace(response, status="cancelled")
    limited = isinstance(error, RateLimitedError | OverloadedError)
    code = "rate_limit_exceeded" if limited else "invalid_prompt" if isinstance(error, RequestError) else "server_error"
    failure = ResponseFailure(code, redacted(error.message), code_of(error))
    return msgspec.structs.replace(response, status="failed", error=failure)


def restarted(response: Response) -> Response:
    """The response at the time when its job was accepted."""
    return msgspec.structs.replace(
        response,
        status="queued" if response.background else "in_progress",
        completed_at=None,
        error=None,
        incomplete_details=None,
        output=[],
        usage=None,
        taxiway=None,
    )


def waiting(response: Response, state: JobState) -> Response:
    """The response whose job has not ended."""
    status: Status = "in_progress" if state == JobState.RUNNING else "queued"
    return msgspec.structs.replace(response, status=status)


def output_of(job: str, result: Result) -> list[Item]:
    """The items of an answer: what the model reasoned, its message, and its calls of functions."""
    message: Mapping[str, Any] = _only(result, "message")
    items = []
    if reasoned := message.get("reasoning_content"):
        items.append(reasoning_item(job, reasoned))
    calls = message.get("tool_calls") or []
    if message.get("content") or message.get("refusal") or not calls:
        items.append(message_item(job, parts_of(message)))
    items += [call_item(job, index, call) for index, call in enumerate(calls)]
    return items


def reasoning_item(job: str, text: str) -> Item:
    """What the model reasoned."""
    return {
        "id": f"rs_{job}",
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def call_item(job: str, index: int, call: Mapping[str, Any]) -> Item:
    """A tool call of a chat as an item."""
    function = call.get("function") or {}
    return {
        "id": f"fc_{job}_{index}",
        "type": "function_call",
        "call_id": call.get("id") or f"call_{job}_{index}",
        "name": function.get("name", ""),
        "arguments": function.get("arguments", ""),
    }


def message_item(job: str, content: list[Item]) -> Item:
    """What the model says, in parts."""
    return {"id": f"msg_{job}", "type": "message", "role": "assistant", "content": content}


def parts_of(message: Mapping[str, Any]) -> list[Item]:
    """What a chat's message says, in parts."""
    refusal = message.get("refusal")
    if refusal:
        return [{"type": "refusal", "refusal": refusal}]
    logprobs = (message.get("logprobs") or {}).get("content") or []
    text = str(message.get("content") or "")
    return [{"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}]


def _usage(result: Result) -> ResponseUsage | None:
    usage = usage_of(result)
    if usage is None:
        return None
    cached = usage.prompt_tokens_details.get("cached_tokens", 0)
    reasoned = usage.completion_tokens_details.get("reasoning_tokens", 0)
    return ResponseUsage(
        usage.prompt_tokens, Cached(cached), usage.completion_tokens, Reasoned(reasoned), usage.total_tokens
    )


def _only(result: Result, name: str) -> Any:
    value = result.outputs[name]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_response_call(call: ResponseCall) -> None:
    """Refuse what contradicts itself or is not supported.

    Raises:
        InvalidRequestError: names the parameter.
    """
    if call.background and not call.stored:
        raise wrong_field("store", "true, as a response in the background is stored", False)
    for index, name in enumerate(call.include or ()):
        if name not in _INCLUDED:
            raise unsupported(f"include[{index}]", f"one of {list(_INCLUDED)}", name)


def no_such_previous(name: str) -> InvalidRequestError:
    """The error for a response that cannot be continued, because it does not exist."""
    message = f"previous_response_id: no response {quoted(name)} is stored"
    return InvalidRequestError(message, field="previous_response_id")


_IDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def input_items(call: ResponseCall, job: str = "") -> list[Item]:
    """A call's input as items, each with an id."""
    text = call.input
    items: list[Item] = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return [_listed(item, f"{job}_{index}") for index, item in enumerate(items)]


def _listed(item: Item, name: str) -> Item:
    """An item as it is listed: with its type, id and parts."""
    kind, given = item.get("type") or "message", item.get("id")
    own = given if isinstance(given, str) and given else f"{_IDS.get(str(kind), 'item')}_{name}"
    listed = {"status": "completed", **item, "id": own, "type": kind}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": part, "text": item["content"]}]
    return listed


def response_fields(parsed: ParsedCall[ResponseCall], model: Model, before: Sequence[Item] = ()) -> dict[str, Any]:
    """The request's fields for a response after the items `before`: those of a chat.

    Raises:
        InvalidRequestError: the model does not chat, or the input is malformed or not supported.
    """
    call = parsed.call
    system = [{"role": "system", "content": call.instructions}] if call.instructions else []
    given = {
        "messages": [*system, *messages_of([*before, *input_items(call)], len(before))],
        "max_completion_tokens": call.max_output_tokens,
        "parallel_tool_calls": call.parallel_tool_calls,
        "reasoning_effort": (call.reasoning or {}).get("effort"),
        "response_format": _format(call.text or {}),
        "verbosity": (call.text or {}).get("verbosity"),
        "tool_choice": _choice(call.tool_choice),
        "tools": [_tool(index, tool) for index, tool in enumerate(call.tools or ())] or None,
        "temperature": call.temperature,
        "top_p": call.top_p,
    }
    if call.top_logprobs is not None or LOGPROBS in (call.include or ()):
        given |= {"logprobs": True, "top_logprobs": call.top_logprobs}
    known = {*ResponseCall.__struct_fields__, *ResponseCall.NOTHING}
    further = {name: value for name, value in parsed.fields.items() if name not in known}
    chat = {name: value for name, value in {**further, **given}.items() if value is not None}
    return chat_request(call.model, chat, model)


def messages_of(items: Sequence[Item], earlier: int = 0) -> list[dict[str, Any]]:
    """The messages of a chat that items stand for; the first `earlier` ones are not the caller's.

    What the model said and the functions that it called in one turn are one message.
    """
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        kind = item.get("type") or "message"
        read = _MESSAGE_OF.get(str(kind))
        name = f"input[{index - earlier}]"
        if read is None:
            raise unsupported(f"{name}.type", f"one of {sorted(_MESSAGE_OF)}", kind)
        message = read(item, name)
        if message is None:
            continue
        if messages and "tool_calls" in message and messages[-1]["role"] == "assistant":
            last = messages[-1]
            messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages


def _message(item: Item, name: str) -> dict[str, Any]:
    role = ROLES.get(str(item.get("role")))
    if role is None:
        raise wrong_field(f"{name}.role", f"one of {sorted(ROLES)}", item.get("role"))
    return {"role": role, "content": _content(item.get("content"), f"{name}.content")}


def _function_call(item: Item, name: str) -> dict[str, Any]:
    function = {key: _text(item, key, name) for key in ("name", "arguments")}
    call = {"id": _text(item, "call_id", name), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _function_output(item: Item, name: str) -> dict[str, Any]:
    content = _content(item.get("output"), f"{name}.output")
    return {"role": "tool", "tool_call_id": _text(item, "call_id", name), "content": content}


_MESSAGE_OF: Mapping[str, Callable[[Item, str], dict[str, Any] | None]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_output,
    "reasoning": lambda item, name: None,  # models do not see their reasoning of earlier turns
}


def _content(value: Any, name: str) -> str | list[dict[str, Any]]:
    """A message's content: text alone as text, as every variant reads that."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_field(name, "text, or a list of parts", value)
    parts = [_part(part, f"{name}[{index}]") for index, part in enumerate(value)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": _text(part, "text", name)}
    if kind == "refusal":
        return {"type": "text", "text": _text(part, "refusal", name)}
    if kind == "input_image" and part.get("image_url"):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {"type": "image_url", "image_url": {"url": _text(part, "image_url", name), **detail}}
    raise unsupported(f"{name}.type", "input_text, output_text, refusal, or input_image with image_url", kind or part)


def _text(value: Mapping[str, Any], key: str, name: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise wrong_field(f"{name}.{key}", "text", text)
    return text


def _tool(index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    name = f"tools[{index}]"
    if tool.get("type") != "function":
        raise unsupported(f"{name}.type", "function", tool.get("type"))
    function = {key: tool[key] for key in ("description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": {"name": _text(tool, "name", name), **function}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "function", choice.get("type"))
    return {"type": "function", "function": {"name": _text(choice, "name", "tool_choice")}}


def _format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    wanted = text.get("format") or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    if kind == "json_schema":
        return {"type": kind, "json_schema": {key: value for key, value in wanted.items() if key != "type"}}
    raise wrong_field("text.format", "one with the type text, json_object or json_schema", wanted)
