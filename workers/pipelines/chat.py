"""An OpenAI chat request in, and out the assistant's message, from a model in this process.

The chat becomes tokens by the template that the model's makers gave it. What a message spells never becomes a control
token. A field that a model in this process cannot honour is refused; an endpoint's variant of the same model may do so.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tasks.models.catalogue import Model, Variant
from tasks.models.chats import NO_EFFECT, ROLES, answer_limit, honoured, read_chat
from taxiway.errors import InvalidRequestError, RequestTooLargeError, quoted
from workers.pipelines.generation import MAX_STOPS, SteppingPipeline
from workers.port import Item, ModelLoadError, Placed, Row


class ChatTemplate:
    """A chat as a model was trained to read it.

    Args:
        chat: what the recipe `gguf-chat` writes.

    Raises:
        ModelLoadError: the template is wrong, or the tokenizer lacks a token that it names.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(chat["template"])
        except TemplateError as error:
            raise ModelLoadError(f"the chat template is wrong: {error}") from error
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        special = {one.content: number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special}
        self._special = special
        self._controls = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._around = {"bos_token": chat["begin"], "eos_token": chat["end"]}
        missing = [text for text in chat["ends"] if text not in special]
        if missing:
            raise ModelLoadError(f"the tokenizer has no token {missing[0]!r}: it is another model's")
        self.ends = frozenset(special[text] for text in chat["ends"])

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The whole chat up to where the answer begins.

        Raises:
            InvalidRequestError: the template does not take such a chat.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"  # stands in a message for what would be a control token
        spelt: list[str] = []

        def hide(found: re.Match[str]) -> str:
            spelt.append(found[0])
            return mark

        hidden = [{**m, "content": self._controls.sub(hide, m["content"])} for m in messages]
        try:
            text = self._template.render(messages=hidden, add_generation_prompt=True, **self._around)
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses the messages: {error}") from error
        return self._encoded(text, mark, iter(spelt))

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say."""
        decoded: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded

    def _encoded(self, text: str, mark: str, spelt: Any) -> list[int]:
        """The tokens of a rendered chat: control tokens where the template has them, and text between these."""
        ids: list[int] = []
        at = 0
        for control in (*self._controls.finditer(text), None):
            part = text[at : control.start() if control is not None else len(text)]
            part = re.sub(re.escape(mark), lambda _: next(spelt, ""), part)
            if part:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
            if control is not None:
                ids.append(self._special[control[0]])
                at = control.end()
        return ids


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
            if honoured(name, value):
                continue
            choices = NO_EFFECT.get(name)
            expected = f"nothing{f' or {choices[0]}' if choices else ''}, as this variant does not honour the field"
            raise self._wrong(name, expected, value, unsupported=True)

    def _checked(self, chat: Mapping[str, Any], name: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = chat.get(name)
        if value is not None and not fits(value):
            raise self._wrong(name, expected, value)
        return value

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
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}

    def _wrong(self, name: str, expected: str, value: object, **details: Any) -> InvalidRequestError:
        field = f"{self._field}.{name}"
        return InvalidRequestError(f"{field}: expected {expected}, got {quoted(value)}", field=field, **details)


def _is_temperature(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _refuse(reason: str) -> str:
    """What templates call for a chat that they do not take."""
    raise TemplateError(reason)


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> ChatPipeline:
    """The pipeline for one variant, from the files in the roles `tokenizer` and `chat`."""
    chat = json.loads(Path(placed.files["chat"]).read_text(encoding="utf-8"))
    return ChatPipeline(model, ChatTemplate(Tokenizer.from_file(str(placed.files["tokenizer"])), chat))
