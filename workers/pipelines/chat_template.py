"""A chat as the text that its model was trained on, by the model's own template."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from taxiway.errors import InvalidRequestError
from workers.port import ModelLoadError, Placed


class ChatTemplate:
    """A chat as a model was trained to read it, by the template of its makers.

    What a message spells never becomes a control token.

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

    def _encoded(self, text: str, mark: str, spelt: Iterator[str]) -> list[int]:
        """The tokens of a rendered chat: control tokens where the template has them, and text between these."""
        ids: list[int] = []
        at = 0
        for control in (*self._controls.finditer(text), None):
            first, *rest = text[at : control.start() if control is not None else len(text)].split(mark)
            part = first + "".join(next(spelt, "") + more for more in rest)
            if part:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
            if control is not None:
                ids.append(self._special[control[0]])
                at = control.end()
        return ids


def _refuse(reason: str) -> str:
    """What templates call for a chat that they do not take."""
    raise TemplateError(reason)


def open_template(placed: Placed) -> ChatTemplate:
    """The template of a variant, from the files in the roles `tokenizer` and `chat`."""
    chat = json.loads(placed.files["chat"].read_text(encoding="utf-8"))
    return ChatTemplate(Tokenizer.from_file(str(placed.files["tokenizer"])), chat)
