"""Streams in OpenAI's form: the events of chats and completions. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import msgspec

from api.inference.progress import MessagePart, column
from api.openai.answers import AnswerHead, AnswerReport, TextLogprobs, TokenUsage, report_of, text_logprobs, usage_of
from api.openai_errors import content
from taxiway.contract.job import Result
from taxiway.errors import TaxiwayError

if TYPE_CHECKING:
    from api.openai.responses.events import ResponseWriter

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
"""The last event."""


class ChunkChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Part of a choice: of a chat the message's new part in `delta`, of a completion `text`."""

    index: int
    finish_reason: str | None
    delta: dict[str, Any] | None = None
    text: str | None = None
    logprobs: dict[str, Any] | TextLogprobs | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of a stream, as OpenAI describes it."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChunkChoice]
    service_tier: str
    usage: TokenUsage | None = None
    taxiway: AnswerReport | None = None
    """The run report, on the last one of the choices."""


Writer: TypeAlias = "ChunkWriter | ResponseWriter"
"""Writes one kind of answer as events."""


class ChunkWriter(ABC):
    """Writes chunks, then with `usage` a chunk with the tokens used, and `[DONE]`."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[Literal["chat.completion.chunk", "text_completion"]]

    def __init__(self, head: AnswerHead, model: str, *, choices: int, usage: bool) -> None:
        self._job, self._choices, self._usage = head.job, choices, usage
        self._begun: dict[int, int] = {}  # the characters of the tokens sent so far, by row
        self._named: dict[str, Any] = {
            "id": f"{self.PREFIX}-{head.job}",
            "object": self.KIND,
            "created": head.created,
            "model": model,
            "service_tier": head.tier,
        }

    def begin(self) -> bytes:
        """The events before all others: none."""
        return b""

    def part(self, part: MessagePart) -> bytes:
        """The event of a part of a message. The SDKs expect choices to begin in their order."""
        before = b"".join(map(self._empty, range(part.row))) if part.row not in self._begun else b""
        return before + self._chunk(self._choice(part))

    def ending(self, result: Result) -> bytes:
        """The events after the last part: the finish reasons, and the run report."""
        reasons = [str(reason) for reason in column(result, "finish-reason")]
        events = [
            self._empty(row) + self._chunk(self._last(row, reason), taxiway=report)
            for row, reason in enumerate(reasons)
            for report in [report_of(self._job, result) if row == len(reasons) - 1 else None]
        ]
        usage = usage_of(result, self._choices)
        return b"".join(events) + (self._chunk(usage=usage) if self._usage else b"") + DONE

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """The end of a stream whose job failed."""
        return b"data: " + content(error, path) + b"\n\n"

    def _chunk(self, *choices: ChunkChoice, **more: Any) -> bytes:
        return b"data: " + _encode(Chunk(**self._named, choices=[*choices], **more)) + b"\n\n"

    def _empty(self, row: int) -> bytes:
        """The first chunk of a row, if it was not sent yet; may be empty."""
        return b""

    @abstractmethod
    def _choice(self, part: MessagePart) -> ChunkChoice:
        """A part of a message as part of a choice."""

    @abstractmethod
    def _last(self, row: int, reason: str) -> ChunkChoice:
        """The end of a choice."""


class ChatWriter(ChunkWriter):
    """Writes chunks of a chat."""

    PREFIX = "chatcmpl"
    KIND = "chat.completion.chunk"

    def _choice(self, part: MessagePart) -> ChunkChoice:
        delta = {**self._role(part.row), **part.delta}
        logprobs = delta.pop("logprobs", None)
        return ChunkChoice(part.row, None, delta=delta, logprobs=None if logprobs is None else {"content": logprobs})

    def _last(self, row: int, reason: str) -> ChunkChoice:
        return ChunkChoice(row, reason, delta={})

    def _empty(self, row: int) -> bytes:
        role = self._role(row)
        return self._chunk(ChunkChoice(row, None, delta=role)) if role else b""

    def _role(self, row: int) -> dict[str, str]:
        """The role, in a choice's first chunk."""
        role = {"role": "assistant"} if row not in self._begun else {}
        self._begun.setdefault(row, 0)
        return role


class CompletionWriter(ChunkWriter):
    """Writes chunks of completions."""

    PREFIX = "cmpl"
    KIND = "text_completion"

    def _choice(self, part: MessagePart) -> ChunkChoice:
        begin, entries = self._begun.get(part.row, 0), part.delta.get("logprobs") or ()
        self._begun[part.row] = begin + sum(len(one["token"]) for one in entries)
        return ChunkChoice(part.row, None, text=part.delta.get("content", ""), logprobs=text_logprobs(entries, begin))

    def _last(self, row: int, reason: str) -> ChunkChoice:
        return ChunkChoice(row, reason, text="")
