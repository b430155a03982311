"""Answers in OpenAI's form: results as completions and embeddings, whole and as streams of events. Pure.

Each answer has a field `taxiway` more than OpenAI's, with the run report; the SDK keeps it (`model_extra`). Where the
model or its engine does not count its tokens, `usage` is null.

OpenAI's events cannot take back what was sent, so each part of an answer is sent once. What a generation that was cut
repeats of it is not sent again. After another restart or a gap nothing of a row is sent until the result has arrived;
then the rest follows, if the result begins with what was sent. Otherwise the stream ends with an error, never with two
answers.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np

from api.inference.protocol import array_output
from api.openai.requests import ChatCall, CompletionCall, EmbeddingsCall, embedding_of
from api.openai_errors import content
from tasks.models.model import Model
from tasks.models.sizes import CHARACTERS_PER_TOKEN
from taxiway.contract.job import Result, RunReport
from taxiway.contract.stream import TEXT, Delta, OtherMessageError, Piece, SentMessage, StreamEntry
from taxiway.errors import DeviceFaultError, TaxiwayError

if TYPE_CHECKING:
    from api.openai.responses.events import ResponseWriter


class TokenUsage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens read, generated, and both; and parts of them as the engine counts these, such as `cached_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] = {}
    completion_tokens_details: dict[str, int] = {}


class AnswerReport(RunReport, frozen=True, kw_only=True):
    """The run report of a job."""

    job: str


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to a chat."""

    index: int
    message: dict[str, Any]
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class GeneratedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What answers with generated text have."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    usage: TokenUsage | None
    service_tier: str
    system_fingerprint: str
    """The variant that ran it."""
    taxiway: AnswerReport
    """Where it ran, and why."""


class ChatCompletion(GeneratedAnswer, frozen=True, kw_only=True):
    """The answer to a chat, as OpenAI describes it."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextLogprobs(msgspec.Struct, frozen=True):
    """The probabilities of a completion's tokens, and where each begins in its text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    """One completion of a text."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: TextLogprobs | None = None


class Completion(GeneratedAnswer, frozen=True, kw_only=True):
    """The completions of texts, as OpenAI describes them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    """Tokens read, estimated from the length of the texts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    """The embedding of the text at `index`: numbers, or base64 of little-endian float32."""

    index: int
    embedding: Any
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The embeddings of texts, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    service_tier: str
    taxiway: AnswerReport


class AnswerHead(NamedTuple):
    """The facts that every answer begins with: its job, the tier that serves it, and its Unix time."""

    job: str
    tier: str
    created: int


AnyCall = ChatCall | CompletionCall | EmbeddingsCall

_encode = msgspec.json.Encoder().encode


def written(call: AnyCall, model: Model, head: AnswerHead, result: Result) -> bytes:
    """The whole answer to a call, as JSON."""
    if isinstance(call, ChatCall):
        return _encode(chat_completion(head, result))
    if isinstance(call, CompletionCall):
        return _encode(completion(head, result, call.n or 1))
    texts = [call.input] if isinstance(call.input, str) else call.input
    packed = call.encoding_format == "base64"
    return _encode(embeddings(head, result, model=model, texts=texts, packed=packed, dimensions=call.dimensions))


def chat_completion(head: AnswerHead, result: Result) -> ChatCompletion:
    """The answer to a chat of one or more choices."""
    columns = [column(result, name) for name in ("message", "finish-reason")]
    choices = [
        ChatChoice(index, plain(message), finish, message.get("logprobs"))
        for index, (message, finish) in enumerate(zip(*columns, strict=True))
    ]
    return ChatCompletion(choices=choices, **_generated("chatcmpl", head, result))


def _generated(prefix: str, head: AnswerHead, result: Result, choices: int = 0) -> dict[str, Any]:
    """The fields of `GeneratedAnswer`; `choices` as in `usage_of`."""
    return {
        "id": f"{prefix}-{head.job}",
        "created": head.created,
        "model": result.model,
        "usage": usage_of(result, choices),
        "service_tier": head.tier,
        "system_fingerprint": result.report.variant,
        "taxiway": report_of(head.job, result),
    }


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its logprobs."""
    return {name: value for name, value in message.items() if name != "logprobs"}


def completion(head: AnswerHead, result: Result, choices: int = 1) -> Completion:
    """The completions of one or more texts, with `choices` of each."""
    rows = zip(messages_of(result), column(result, "finish-reason"), strict=True)
    answers = [
        TextChoice(index, message["content"], finish, text_logprobs((message["logprobs"] or {}).get("content")))
        for index, (message, finish) in enumerate(rows)
    ]
    return Completion(choices=answers, **_generated("cmpl", head, result, choices))


def text_logprobs(entries: Sequence[Mapping[str, Any]] | None, begin: int = 0) -> TextLogprobs | None:
    """A chat's logprobs in a completion's form; the first token begins at `begin` of the text."""
    if not entries:
        return None
    tokens = [one["token"] for one in entries]
    likely = [{one["token"]: one["logprob"] for one in (*(each.get("top_logprobs") or ()), each)} for each in entries]
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=[one["logprob"] for one in entries],
        top_logprobs=likely if any(each.get("top_logprobs") for each in entries) else None,
        text_offset=[*accumulate(map(len, tokens[:-1]), initial=begin)],
    )


def embeddings(
    head: AnswerHead, result: Result, *, model: Model, texts: Sequence[str], packed: bool, dimensions: int | None
) -> EmbeddingList:
    """The embeddings of texts; `packed` as base64. Fewer `dimensions` are the first ones, scaled to unit length."""
    spec = embedding_of(model)
    assert spec is not None
    rows = array_output(spec, result.outputs[spec.name])
    if dimensions is not None and dimensions < rows.shape[1]:
        rows = rows[:, :dimensions]
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        rows = rows / np.where(lengths > 0, lengths, 1)
    tokens = sum(len(text) // CHARACTERS_PER_TOKEN + 1 for text in texts)
    vectors = [base64.b64encode(row.astype("<f4")).decode("ascii") for row in rows] if packed else rows.tolist()
    return EmbeddingList(
        data=[Embedding(index, vector) for index, vector in enumerate(vectors)],
        model=result.model,
        usage=EmbeddingsUsage(tokens, tokens),
        service_tier=head.tier,
        taxiway=report_of(head.job, result),
    )


def usage_of(result: Result, choices: int = 0) -> TokenUsage | None:
    """Tokens of all rows, a prompt's once for its `choices`, which are all rows if 0; None if they are not counted."""
    counts = column(result, "usage") if "usage" in result.outputs else [None]
    known = [one for one in counts if isinstance(one, Mapping)]
    if len(known) < len(counts):
        return None
    read = known[:: choices or len(known)]
    prompt = sum(int(one.get("prompt_tokens", 0)) for one in read)
    generated = sum(int(one.get("completion_tokens", 0)) for one in known)
    parts = _details(read, "prompt_tokens_details", prompt), _details(known, "completion_tokens_details", generated)
    return TokenUsage(prompt, generated, prompt + generated, *parts)


def _details(counts: Sequence[Mapping[str, Any]], name: str, most: int) -> dict[str, int]:
    """The sum of each part of `most` tokens over all rows; an engine's figures are not trusted to be sensible."""
    sums: Counter[str] = Counter()
    for one in counts:
        sums.update({part: n for part, n in (one.get(name) or {}).items() if type(n) is int and n >= 0})
    return {part: min(n, most) for part, n in sums.items()}


def report_of(job: str, result: Result) -> AnswerReport:
    """The run report with its job."""
    return AnswerReport(job=job, **msgspec.structs.asdict(result.report))


class MessagePart(NamedTuple):
    """What is new in the message of a row."""

    row: int
    delta: Delta


class StreamProgress:
    """The progress of a reader through a job's stream (`taxiway.contract.job.Following`)."""

    def __init__(self) -> None:
        self.entry = "0-0"
        self._rows: dict[int, _Answer] = {}

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[MessagePart]:
        """The parts in the stream's next pieces."""
        for entry, piece in entries:
            self.entry = entry
            if not isinstance(piece, Piece):
                continue
            for delta in self._row(piece.row).take(piece):
                yield MessagePart(piece.row, delta)

    def end(self, result: Result) -> Iterator[MessagePart]:
        """The parts that the result adds.

        Raises:
            DeviceFaultError: part of an answer was sent, and the answer after a restart begins differently.
        """
        for row, message in enumerate(messages_of(result)):
            try:
                delta = self._row(row).sent.rest(message)
            except OtherMessageError as error:
                text = (
                    "the answer was restarted on another device and differs from what was sent: send the request again"
                )
                raise DeviceFaultError(text, retry_after=1.0) from error
            if delta:
                yield MessagePart(row, delta)

    def _row(self, row: int) -> _Answer:
        return self._rows.setdefault(row, _Answer())


class _Answer:
    """The answer to one row: what was `sent` of it, unless something was missed or superseded (not `whole`)."""

    def __init__(self) -> None:
        self.sent = SentMessage()
        self._whole = True
        self._attempt = 0
        self._at = 0
        self._beside = 0

    def take(self, piece: Piece) -> list[Delta]:
        """The deltas of the next piece; none once something was missed."""
        if not self._whole or piece.attempt < self._attempt:
            return []
        begun = bool(self._at or self._beside)
        goes_on = not begun or self._goes_on(piece)
        if goes_on:
            self._attempt = piece.attempt
        again = not (goes_on or piece.at or piece.sent)
        gap = piece.at > self._at or (piece.beside and piece.sent > self._beside)
        if again or gap or piece.attempt > self._attempt:
            self._whole = False
            return []
        text = piece.text[self._at - piece.at :]
        beside = piece.beside[self._beside - piece.sent :] if piece.beside else ()
        self._at, self._beside = self._at + len(text), self._beside + len(beside)
        deltas = _deltas(text, [*beside])
        for delta in deltas:
            self.sent.add(delta)
        return deltas

    def _goes_on(self, piece: Piece) -> bool:
        """Whether the piece repeats the text that was sent: a generation that was cut goes on after it."""
        return not (piece.at or piece.beside or self._beside) and piece.text.startswith(self.sent.text("content"))


def _deltas(text: str, beside: list[Delta]) -> list[Delta]:
    if text and beside:
        return [{"content": text, **beside[0]}, *beside[1:]]
    return [{"content": text}] if text else beside


def messages_of(result: Result) -> list[Mapping[str, Any]]:
    """The message of each row. A model that continues prompts has texts."""
    if "message" in result.outputs:
        return column(result, "message")
    texts = column(result, TEXT)
    logprobs = column(result, "logprobs") if "logprobs" in result.outputs else [None] * len(texts)
    return [{"content": text, "logprobs": tokens} for text, tokens in zip(texts, logprobs, strict=True)]


def column(result: Result, name: str) -> list[Any]:
    """An output's values, one per row."""
    value = result.outputs[name]
    return value if isinstance(value, list) else [value]


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
