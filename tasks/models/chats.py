"""An OpenAI chat request as far as taxiway reads it: its messages, their length, and the answer's bound. Pure.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from taxiway.errors import InvalidRequestError, quoted

_LIMITS = ("max_completion_tokens", "max_tokens")
_IGNORED = ("model", "stream", "stream_options")  # taxiway says itself what these are
_WORD_OF_IMAGE = 1000  # characters that an image counts for, about: engines make 256 to 1,024 tokens of one


def read_chat(value: Any, field: str) -> dict[str, Any]:
    """The chat request in an input's value: a mapping, or its JSON text. Fields that taxiway sets are left out.

    Raises:
        InvalidRequestError: it is none; names what was expected.
    """
    if isinstance(value, str | bytes):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequestError(f"{field}: expected JSON, got {quoted(value)}", field=field) from error
    if not isinstance(value, dict):
        raise _wrong(field, "a chat request: an object with messages", value)
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise _wrong(f"{field}.messages", "a list of objects with a role", messages)
    if value.get("n") not in (None, 1):
        raise _wrong(f"{field}.n", "1, as a job has one answer", value["n"])
    for name in _LIMITS:
        if (limit := value.get(name)) is not None and (type(limit) is not int or limit < 1):
            raise _wrong(f"{field}.{name}", "an integer >= 1", limit)
    return {name: below for name, below in value.items() if name not in _IGNORED}


def answer_limit(chat: Any) -> int | None:
    """The most tokens that a chat request allows for its answer; None where it does not say it."""
    if isinstance(chat, dict):
        for name in _LIMITS:
            if type(chat.get(name)) is int and chat[name] > 0:
                return int(chat[name])
    return None


def characters(chat: Any) -> int | None:
    """About how many characters the messages have; None where the value is not a mapping with messages."""
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list):
        return None
    return sum(_length(message.get("content")) for message in messages if isinstance(message, dict))


def _length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    return sum(_part_length(part) for part in content if isinstance(part, dict))


def _part_length(part: Mapping[str, Any]) -> int:
    text = part.get("text")
    return len(text) if isinstance(text, str) else _WORD_OF_IMAGE


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _wrong(field: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: expected {expected}, got {quoted(value)}", field=field)
