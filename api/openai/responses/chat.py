"""A call for a response as a chat: its input becomes messages, its tools and format become a chat's. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.openai.requests import ParsedCall, chat_request, unsupported
from api.openai.responses.response import LOGPROBS, Item, ResponseCall
from tasks.models.chats import ROLES
from tasks.models.model import Model
from taxiway.errors import wrong_field

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
