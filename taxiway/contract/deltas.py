"""A chat's message as it grows: the parts in which an engine sends it. Pure.

A *delta* has new parts of a message by name: texts (`content`, `reasoning_content`, `refusal`), `tool_calls` in
OpenAI's form, each with its `index` and a piece of its arguments, and in `logprobs` a list of facts about tokens.

Source: https://platform.openai.com/docs/api-reference/chat/streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Delta = Mapping[str, Any]

TEXTS = ("reasoning_content", "content", "refusal")
"""The texts of a message, in the order in which models send them."""


class OtherMessageError(ValueError):
    """A message does not begin with what was sent of it."""


class SentMessage:
    """What was sent of a message so far."""

    def __init__(self) -> None:
        self.logprobs: list[Any] = []
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, dict[str, Any]] = {}  # without their functions
        self._functions: dict[int, dict[str, list[str]]] = {}  # in pieces: joining at each would take quadratic time

    def add(self, delta: Delta) -> None:
        """Take in the next part."""
        for name in TEXTS:
            if text := delta.get(name):
                self._texts.setdefault(name, []).append(text)
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        self.logprobs += delta.get("logprobs") or ()

    @property
    def is_plain(self) -> bool:
        """Whether it has no more than its content."""
        return not (self.logprobs or self._calls or self._texts.keys() - {"content"})

    def text(self, name: str) -> str:
        """A text of it."""
        return "".join(self._texts.get(name, ()))

    def call(self, index: int) -> dict[str, Any]:
        """The tool call of that index."""
        function = {name: "".join(pieces) for name, pieces in self._functions[index].items()}
        return {**self._calls[index], "function": function}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Its tool calls."""
        return [self.call(index) for index in sorted(self._calls)]

    def rest(self, whole: Mapping[str, Any]) -> Delta:
        """What the whole message has more; empty if all of it was sent.

        Raises:
            OtherMessageError: it does not begin with what was sent.
        """
        delta: dict[str, Any] = {}
        for name in TEXTS:
            if more := _after(self.text(name), whole.get(name) or ""):
                delta[name] = more
        if calls := [*self._rest_of_calls(whole.get("tool_calls") or ())]:
            delta["tool_calls"] = calls
        tokens = (whole.get("logprobs") or {}).get("content") or []
        if more_tokens := tokens[len(self.logprobs) :]:
            delta["logprobs"] = more_tokens
        return delta

    def _add_call(self, call: Mapping[str, Any]) -> None:
        index = call.get("index", 0)
        whole = self._calls.setdefault(index, {"id": "", "type": "function"})
        whole |= {name: call[name] for name in ("id", "type") if call.get(name)}
        function = self._functions.setdefault(index, {})
        for name, value in (call.get("function") or {}).items():
            if isinstance(value, str):
                function.setdefault(name, []).append(value)

    def _rest_of_calls(self, calls: Any) -> Iterator[dict[str, Any]]:
        if len(calls) <= max(self._calls, default=-1):
            raise OtherMessageError("it has fewer tool calls")
        for index, call in enumerate(calls):
            if index not in self._calls:
                yield {"index": index, **call}
            elif self._calls[index]["id"] != call.get("id"):
                raise OtherMessageError("its tool calls are others")
            elif more := _rest_of(self.call(index)["function"], call.get("function") or {}):
                yield {"index": index, "function": more}


def _rest_of(sent: Mapping[str, str], function: Mapping[str, str]) -> dict[str, str]:
    rest = {name: _after(sent.get(name, ""), text) for name, text in function.items()}
    return {name: more for name, more in rest.items() if more or name not in sent}


def _after(sent: str, text: str) -> str:
    if not text.startswith(sent):
        raise OtherMessageError("its text is another one")
    return text[len(sent) :]
