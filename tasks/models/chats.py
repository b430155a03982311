"""An OpenAI chat request as far as taxiway reads it: its messages, their length, and the answer's bound. Pure.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from taxiway.contract.limits import COUNT
from taxiway.errors import UNREADABLE, wrong_field

LIMITS = ("max_completion_tokens", "max_tokens")
"""Fields that bound an answer's tokens, of which the first that is given counts."""

_UNREAD = ("metadata", "user", "safety_identifier", "prompt_cache_key", "service_tier")  # they ask nothing of the model
_LEFT_OUT = ("model", "stream", "stream_options", *_UNREAD)  # taxiway says itself what the first three are
_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'
_WORD_OF_IMAGE = 1000  # characters that an image counts for, about: engines make 256 to 1,024 tokens of one

TOKENS_OF_MESSAGE = 64
"""Tokens that a template adds to a message, or to a chat, at most: SmolLM2's adds 31 with its system prompt."""

TOKENS_OF_IMAGE = 4096
"""Most tokens that an engine makes of an image: up to 1,445 at OpenAI, a configured number with Qwen2.5-VL."""

ROLES: Mapping[str, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages that every variant understands, and what a template calls them."""

NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
}
"""Values of fields that ask for nothing. `None` asks for nothing in every field."""

_FIELDS = ("messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", *_LEFT_OUT)

_OPENAI = (
    "frequency_penalty logit_bias logprobs parallel_tool_calls presence_penalty reasoning_effort response_format "
    "tool_choice tools top_logprobs top_p verbosity"
)
_ENGINES = (
    "add_generation_prompt bad_words continue_final_message dry_allowed_length dry_base dry_multiplier "
    "dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range ebnf enable_thinking grammar "
    "guided_choice guided_grammar guided_json guided_regex ignore_eos include_reasoning include_stop_str_in_output "
    "json_schema length_penalty min_p min_tokens mirostat mirostat_eta mirostat_tau regex repeat_last_n repeat_penalty "
    "repetition_penalty samplers separate_reasoning skip_special_tokens stop_token_ids structured_outputs thinking "
    "top_k top_n_sigma typical_p xtc_probability xtc_threshold"
)
ORDINARY = frozenset([*_OPENAI.split(), *_ENGINES.split(), "images", "audio", "files"])
"""What endpoints honour unless they say otherwise: features that shape the answer to this chat, and nothing else.

Any other may steer the engine: load an adapter, a template or code, name a host to fetch from, choose a cache's entry,
or overtake others. Sources: the references of OpenAI's, vLLM's, SGLang's and llama.cpp's chat completions.
"""

_TOOL = "function"
_TEXT = ("text", "refusal")

_MARKS = re.compile(r'"(?!(?:role|content|name|text|type)")[a-z_]+"\s*:')
"""A field in JSON text that is not one of a plain message's."""

_NAME = re.compile(r"^[a-z_]{1,40}$")
_MOST_NAMES = 32  # names: they are in the name of a holding queue

_PARTS: Mapping[str, tuple[str, str]] = {
    "image_url": ("images", "url"),
    "input_audio": ("audio", "data"),
    "file": ("files", "file_data"),
}
"""The feature that a part of a message asks for, and where the part has its content."""


def honoured(name: str, value: Any) -> bool:
    """Whether every variant honours a field of a chat request, because it is common or asks for nothing."""
    return name in _FIELDS or value is None or value in NO_EFFECT.get(name, ())


def asks(value: Any, field: str = "") -> tuple[str, ...]:
    """What the chats in an input's value ask for beyond a plain chat: names of fields, `images` and the like, in order.

    `addresses` are images and files that are somewhere else. Nothing for a value in a form that a router does not read,
    such as a reference; who runs it reads it.

    Raises:
        InvalidRequestError: one has a number out of range; names it, in the input `field`.
    """
    chats = [*_chats(value)]
    for chat in chats:
        _check_numbers(chat, field)
    found = {name for chat in chats for name in _asks(chat)}
    named = sorted(name if _NAME.match(name) else OTHERS for name in found)
    return tuple(dict.fromkeys(named if len(named) <= _MOST_NAMES else [*named[:_MOST_NAMES], OTHERS]))


OTHERS = "other fields"
"""What a chat asks for by more names, or others, than can be named here: no variant honours it."""


def _chats(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if "messages" in value:
            yield value
        elif isinstance(value.get("data"), list):  # a tensor
            yield from _chats(value["data"])
    elif isinstance(value, list):
        for one in value:
            yield from _chats(one)
    elif isinstance(value, str) and _MARKS.search(value):
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            decoded = msgspec.json.decode(value)
            if isinstance(decoded, dict) and "messages" in decoded:
                yield decoded


def _asks(chat: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name, value in chat.items() if not honoured(name, value))
    messages = chat["messages"]
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        if message.get("role") == "tool" or message.get("tool_calls") is not None:
            yield "tools"
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            yield from _asks_of_part(part)
    tools = chat.get("tools")
    kinds = [tool.get("type", _TOOL) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    yield from (OTHERS for kind in kinds if kind != _TOOL)


def _asks_of_part(part: Any) -> Iterator[str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT:
        return
    if not isinstance(kind, str) or kind not in _PARTS:
        yield kind if isinstance(kind, str) else OTHERS
        return
    feature, place = _PARTS[kind]
    yield feature
    whole = part.get(kind)
    content = whole.get(place) if isinstance(whole, dict) else whole
    elsewhere = isinstance(content, str) and kind != "input_audio" and not content.startswith("data:")
    if content is None or elsewhere or (isinstance(whole, dict) and "file_id" in whole):
        yield "addresses"


def read_chat(value: Any, field: str) -> dict[str, Any]:
    """The chat request in an input's value: a mapping, or its JSON text. Fields that taxiway sets are left out.

    Raises:
        InvalidRequestError: it is none; names what was expected.
    """
    if isinstance(value, str | bytes):
        try:
            value = msgspec.json.decode(value)
        except UNREADABLE as error:
            raise wrong_field(field, f"a chat request in JSON, such as {_EXAMPLE}", value) from error
    if not isinstance(value, dict):
        raise wrong_field(field, "a chat request: an object with messages", value)
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise wrong_field(f"{field}.messages", "a list of objects with a role", messages)
    if value.get("n") not in (None, 1):
        raise wrong_field(f"{field}.n", "1, as a job has one answer", value["n"])
    _check_numbers(value, field)
    return {name: below for name, below in value.items() if name not in _LEFT_OUT}


def _check_numbers(chat: Mapping[str, Any], field: str) -> None:
    """Refuse limits that are none, and integers that some engine could not read."""
    for name in LIMITS:
        if (limit := chat.get(name)) is not None and (type(limit) is not int or not 1 <= limit <= COUNT):
            raise wrong_field(f"{field}.{name}", f"an integer from 1 to {COUNT}", limit)
    for name, value in chat.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise wrong_field(f"{field}.{name}", "an integer of 64 bits", value)


def answer_limit(chat: Any) -> int | None:
    """The most tokens that a chat request allows for its answer; None where it does not say it."""
    if isinstance(chat, dict):
        for name in LIMITS:
            if type(chat.get(name)) is int and chat[name] > 0:
                return min(int(chat[name]), COUNT)
    return None


def beginning(prompt: Any, most: int) -> bytes:
    """About the first `most` bytes of what an engine reads of a chat or prompt; longer conversations begin with them.

    Nothing for a value in another form.
    """
    if isinstance(prompt, str):
        return prompt[:most].encode(errors="replace")
    messages = prompt.get("messages") if isinstance(prompt, dict) else None
    if not isinstance(messages, list):
        return b""
    found = bytearray()
    for part in ([prompt["tools"]] if prompt.get("tools") else []) + messages:
        content = part.get("content") if isinstance(part, dict) else None
        found += _text_of(part if not isinstance(content, str) else {**part, "content": content[:most]})
        if len(found) >= most:
            break
    return bytes(found[:most])


def _text_of(part: Any) -> bytes:
    try:
        return msgspec.json.encode(part)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):  # who runs it refuses it
        return b""


def characters(chat: Any) -> int | None:
    """About how many characters the messages have; None where the value is not a mapping with messages."""
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list):
        return None
    return sum(_length(message.get("content")) for message in messages if isinstance(message, dict))


def most_tokens(chat: Any) -> int | None:
    """The most tokens that an engine may make of a chat request; None where the value is not a mapping with messages.

    A token is at least a byte of text. What a template adds, and an image, count for the most that is usual.
    """
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list):
        return None
    around = {name: value for name, value in chat.items() if name != "messages"}
    return TOKENS_OF_MESSAGE + len(_text_of(around)) + sum(map(_most_of, messages))


def _most_of(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else ()
    images = [part for part in parts if isinstance(part, dict) and part.get("type") == "image_url"]
    if images:
        message = {**message, "content": [part for part in parts if part not in images]}
    return TOKENS_OF_MESSAGE + len(_text_of(message)) + len(images) * TOKENS_OF_IMAGE


def _length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return sum(len(text) if isinstance(text, str) else _WORD_OF_IMAGE for text in texts)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
