"""Streamed answers as OpenAI's server-sent events.

OpenAI's events have no way to take back text. After a restart or a gap nothing is sent until the result is there; then
follows the rest, if the result begins with what was sent. Else the stream ends with an error, never with two answers.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from router.http.openai.answers import Head, Report, Usage, report_of, usage_of
from router.http.openai.errors import content
from taxiway.contract.job import TEXT, Result, Told
from taxiway.errors import DeviceFaultError, TaxiwayError

DONE = b"data: [DONE]\n\n"
"""The last event."""

_encode = msgspec.json.Encoder().encode


class ChunkChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Part of a choice: of a chat the message's new part in `delta`, of a completion `text`."""

    index: int
    finish_reason: str | None
    delta: dict[str, Any] | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None


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
    """Writes one kind of answer as events."""

    def begin(self) -> bytes:
        """What comes before all else; may be empty."""

    def piece(self, text: str) -> bytes:
        """A piece of text."""

    def ending(self, result: Result) -> bytes:
        """What follows the last piece of text."""

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """The end of a stream whose job failed."""


class ChunkWriter(ABC):
    """Writes chunks, and `[DONE]`; with `usage`, a chunk that has it comes before."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[Literal["chat.completion.chunk", "text_completion"]]

    def __init__(self, head: Head, model: str, *, usage: bool) -> None:
        self._job, self._usage = head.job, usage
        self._named: dict[str, Any] = {
            "id": f"{self.PREFIX}-{head.job}",
            "object": self.KIND,
            "created": head.created,
            "model": model,
            "service_tier": head.tier,
        }

    def begin(self) -> bytes:
        """See `Writer`: nothing."""
        return b""

    def piece(self, text: str) -> bytes:
        """See `Writer`."""
        return self._chunk(ChunkChoice(0, None, **self._said(text)))

    def ending(self, result: Result) -> bytes:
        """See `Writer`: the reason why it ended, and the run report."""
        last = ChunkChoice(0, str(_only(result, "finish-reason")), **self._nothing())
        events = self._rest(result) + self._chunk(last, taxiway=report_of(self._job, result))
        return events + (self._chunk(usage=usage_of(result)) if self._usage else b"") + DONE

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """See `Writer`."""
        return b"data: " + content(error, path) + b"\n\n"

    def _chunk(self, *choices: ChunkChoice, **more: Any) -> bytes:
        return b"data: " + _encode(Chunk(**self._named, choices=[*choices], **more)) + b"\n\n"

    def _rest(self, result: Result) -> bytes:
        """What is known only at the end, besides the reason."""
        return b""

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]:
        """The part of a choice that a piece of text is."""

    @abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """The part of a choice that says nothing."""


class ChatWriter(ChunkWriter):
    """Writes chunks of a chat."""

    PREFIX = "chatcmpl"
    KIND = "chat.completion.chunk"
    _begun = False

    def _said(self, text: str) -> dict[str, Any]:
        return {"delta": {**self._role(), "content": text}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _rest(self, result: Result) -> bytes:
        """Tool calls and the probabilities of tokens are complete only now."""
        message = _only(result, "message")
        calls = message.get("tool_calls") or []
        more = {"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]} if calls else {}
        more |= {name: message[name] for name in ("reasoning_content", "refusal") if message.get(name)}
        logprobs = message.get("logprobs")
        if self._begun and not more and not logprobs:
            return b""
        return self._chunk(ChunkChoice(0, None, delta={**self._role(), **more}, logprobs=logprobs))

    def _role(self) -> dict[str, str]:
        """The role, in the first chunk."""
        role = {} if self._begun else {"role": "assistant"}
        self._begun = True
        return role


class CompletionWriter(ChunkWriter):
    """Writes chunks of a completion."""

    PREFIX = "cmpl"
    KIND = "text_completion"

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}


async def events_of(
    told: Told, writer: Writer, ended: Callable[[Result], Awaitable[None]]
) -> AsyncGenerator[bytes, None]:
    """The events of an answer; `ended` is awaited before those that end it. Raises the job's error."""
    if begin := writer.begin():
        yield begin
    async with contextlib.aclosing(said_once(told)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Result):
                await ended(piece)
                yield writer.ending(piece)
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
