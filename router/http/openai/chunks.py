"""Streamed answers as OpenAI's server-sent events.

OpenAI's events have no way to take back text. After a restart or a gap nothing is sent until the result is there; then
follows the rest, if the result begins with what was sent. Else the stream ends with an error, never with two answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

import msgspec

from router.http.openai.answers import Head, Report, Usage, report_of, usage_of
from taxiway.contract.job import TEXT, Result, Told
from taxiway.errors import DeviceFaultError

DONE = b"data: [DONE]\n\n"
"""The last event."""

_encode = msgspec.json.Encoder().encode


class ChunkChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Part of a choice: of a chat the message's new part in `delta`, of a completion `text`."""

    index: int
    finish_reason: str | None
    delta: dict[str, Any] | None = None
    text: str | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of a stream. The last one of the choice has the run report."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChunkChoice]
    service_tier: str
    usage: Usage | None = None
    taxiway: Report | None = None


class Writer(Protocol):
    """Writes the chunks of one kind of answer."""

    def piece(self, text: str) -> bytes:
        """A piece of text."""

    def ending(self, result: Result) -> bytes:
        """What follows the last piece of text, with the reason why it ended."""

    def usage(self, result: Result) -> bytes:
        """The chunk with the usage."""


class ChatWriter:
    """Writes chunks of a chat."""

    def __init__(self, head: Head, model: str) -> None:
        self._job = head.job
        self._named: dict[str, Any] = {
            "id": f"chatcmpl-{head.job}",
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": model,
            "service_tier": head.tier,
        }
        self._begun = False

    def piece(self, text: str) -> bytes:
        """See `Writer`."""
        return self._chunk(None, {**self._role(), "content": text})

    def ending(self, result: Result) -> bytes:
        """See `Writer`. Tool calls are complete only now."""
        message, reason = _only(result, "message"), _only(result, "finish-reason")
        calls = message.get("tool_calls") or []
        more = {"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]} if calls else {}
        more |= {name: message[name] for name in ("reasoning_content", "refusal") if message.get(name)}
        before = self._chunk(None, {**self._role(), **more}) if more or not self._begun else b""
        return before + self._chunk(str(reason), {}, taxiway=report_of(self._job, result))

    def usage(self, result: Result) -> bytes:
        """See `Writer`."""
        return _event(Chunk(**self._named, choices=[], usage=usage_of(result)))

    def _role(self) -> dict[str, str]:
        """The role, in the first chunk."""
        role = {} if self._begun else {"role": "assistant"}
        self._begun = True
        return role

    def _chunk(self, reason: str | None, delta: dict[str, Any], **more: Any) -> bytes:
        return _event(Chunk(**self._named, choices=[ChunkChoice(0, reason, delta=delta)], **more))


class CompletionWriter:
    """Writes chunks of a completion."""

    def __init__(self, head: Head, model: str) -> None:
        self._job = head.job
        self._named: dict[str, Any] = {
            "id": f"cmpl-{head.job}",
            "object": "text_completion",
            "created": head.created,
            "model": model,
            "service_tier": head.tier,
        }

    def piece(self, text: str) -> bytes:
        """See `Writer`."""
        return _event(Chunk(**self._named, choices=[ChunkChoice(0, None, text=text)]))

    def ending(self, result: Result) -> bytes:
        """See `Writer`."""
        choice = ChunkChoice(0, str(_only(result, "finish-reason")), text="")
        return _event(Chunk(**self._named, choices=[choice], taxiway=report_of(self._job, result)))

    def usage(self, result: Result) -> bytes:
        """See `Writer`."""
        return _event(Chunk(**self._named, choices=[], usage=usage_of(result)))


async def chunks(told: Told, writer: Writer, *, usage: bool) -> AsyncGenerator[bytes, None]:
    """The events of an answer, with its `usage` before the last one if asked for. Raises the job's error."""
    async with contextlib.aclosing(said_once(told)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Result):
                yield writer.ending(piece) + (writer.usage(piece) if usage else b"") + DONE
            elif piece:
                yield writer.piece(piece)


async def said_once(told: Told) -> AsyncGenerator[str | Result, None]:
    """The text of an answer, each part once, and then the result. The last part may be empty.

    Raises:
        DeviceFaultError: part of the text was sent, and the answer that came after a restart begins differently.
        TaxiwayError: the error that the job ended with.
    """
    said, whole = "", True
    async with contextlib.aclosing(told) as events:
        async for event in events:
            if isinstance(event, Result):
                yield _rest(said, str(_only(event, TEXT) or ""))
                yield event
            elif not isinstance(event, str):
                whole = False
            elif whole:
                said += event
                yield event


def _rest(said: str, text: str) -> str:
    if not text.startswith(said):
        message = "the answer was restarted on another device, and is not the one that began here: ask again"
        raise DeviceFaultError(message, retry_after=1.0)
    return text[len(said) :]


def _only(result: Result, name: str) -> Any:
    """An output of the only row."""
    value = result.outputs[name]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _event(chunk: Chunk) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
