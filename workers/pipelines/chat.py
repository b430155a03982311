"""An OpenAI chat request in, and out the assistant's message, from a model in this process.

A field that a model in this process cannot honour is refused; an endpoint's variant of the same model may do so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tasks.models.chats import NO_EFFECT, ROLES, answer_limit, honoured, read_chat
from tasks.models.model import Model, Variant
from taxiway.errors import InvalidRequestError, RequestTooLargeError, wrong_field
from workers.pipelines.chat_template import ChatTemplate, open_template
from workers.pipelines.generation import MAX_STOPS, SteppingPipeline
from workers.port import Item, Placed, Row

HONOURED = ("logprobs", "top_logprobs")
"""Features of a chat that models in this process support; their variants name them in `honours`."""

_MOST_LOGPROBS = 20


class ChatPipeline(SteppingPipeline):
    """Reads chat requests, and lets a running batch answer them.

    Args:
        model: its first input is the request; its last bucket is the most tokens of chat and answer together.
    """

    def __init__(self, model: Model, template: ChatTemplate) -> None:
        super().__init__(template.ends, template.text)
        self._field = f"inputs.{model.inputs[0].name}"
        self._input = model.inputs[0].name
        self._limit = model.buckets[-1]
        self._template = template

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The chat's tokens; the size is theirs and those that the answer may have.

        Raises:
            InvalidRequestError: it is no chat request, or has a field that this model cannot honour.
            RequestTooLargeError: chat and answer do not fit in the context.
        """
        chat = read_chat(row.get(self._input), self._field)
        self._check_fields(chat)
        wanted = {
            "max_tokens": answer_limit(chat) or int(parameters["max_tokens"]),
            "temperature": self._checked(chat, "temperature", "a number from 0 to 2", _is_temperature) or 0,
            "seed": self._checked(chat, "seed", "an integer >= 0", lambda seed: type(seed) is int and seed >= 0),
            "stop": self._stops(chat),
            "logprobs": self._logprobs(chat),
        }
        ids = self._template.tokens([self._message(index, one) for index, one in enumerate(chat["messages"])])
        size = len(ids) + wanted["max_tokens"]
        if size > self._limit:
            expected = f"at most {self._limit} tokens of chat and max_tokens together"
            raise RequestTooLargeError(
                f"{self._field}: expected {expected}, got {size}", field=self._field, limit=self._limit
            )
        return Item({"tokens": np.array(ids, np.int64)}, size, wanted)

    def _check_fields(self, chat: Mapping[str, Any]) -> None:
        """Refuse fields that ask for what this model cannot do."""
        for name, value in chat.items():
            if name in HONOURED or honoured(name, value):
                continue
            choices = NO_EFFECT.get(name)
            expected = f"nothing{f' or {choices[0]}' if choices else ''}, as this variant does not honour the field"
            raise self._wrong(name, expected, value, unsupported=True)

    def _checked(self, chat: Mapping[str, Any], name: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = chat.get(name)
        if value is not None and not fits(value):
            raise self._wrong(name, expected, value)
        return value

    def _logprobs(self, chat: Mapping[str, Any]) -> int | None:
        """How many likely tokens to report at each position besides the chosen one; None for no probabilities."""
        most = self._checked(chat, "top_logprobs", f"an integer from 0 to {_MOST_LOGPROBS}", _is_most)
        told = self._checked(chat, "logprobs", "true or false", lambda value: type(value) is bool)
        return most or 0 if told else None

    def _stops(self, chat: Mapping[str, Any]) -> list[str]:
        stops = chat.get("stop")
        listed = [] if stops is None else [stops] if isinstance(stops, str) else stops
        if not isinstance(listed, list) or len(listed) > MAX_STOPS or not all(map(_is_stop, listed)):
            raise self._wrong("stop", f"at most {MAX_STOPS} texts, none of them empty", stops)
        return listed

    def _message(self, index: int, message: Mapping[str, Any]) -> dict[str, str]:
        """A message of text."""
        name = f"messages[{index}]"
        if message["role"] not in ROLES:
            raise self._wrong(f"{name}.role", f"one of {list(ROLES)}", message["role"])
        for field, value in message.items():
            if field not in ("role", "content", "name") and value is not None:
                raise self._wrong(f"{name}.{field}", "nothing, as this variant does not honour the field", value)
        content = message.get("content")
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise self._wrong(f"{name}.content", "text, or parts of text", part)
        return {"role": ROLES[message["role"]], "content": "".join(part["text"] for part in parts)}

    def _wrong(self, name: str, expected: str, value: object, **details: Any) -> InvalidRequestError:
        return wrong_field(f"{self._field}.{name}", expected, value, **details)


def _is_temperature(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2


def _is_most(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_LOGPROBS


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> ChatPipeline:
    """The pipeline for one variant, from the files in the roles `tokenizer` and `chat`."""
    return ChatPipeline(model, open_template(placed))
