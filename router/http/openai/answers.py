"""Answers in OpenAI's form: results as completions and embeddings, and streams of their parts. Pure.

Each answer has a field `taxiway` more than OpenAI's, with the run report; the SDK keeps it (`model_extra`). Where the
model or its engine does not count its tokens, `usage` is null.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from router.http.openai.errors import content
from router.http.openai.requests import ChatCall, CompletionCall, EmbeddingsCall, embedding_of
from router.http.progress import Part, column, messages_of
from router.http.protocol import array_output
from router.service.admission import Admitted
from tasks.models.model import Model
from tasks.models.sizes import CHARACTERS_PER_TOKEN
from taxiway.contract.job import Result, RunReport
from taxiway.errors import TaxiwayError


class Usage(msgspec.Struct, frozen=True):
    """Tokens read, generated, and both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Report(RunReport, frozen=True, kw_only=True):
    """The run report of a job."""

    job: str


class Choice(msgspec.Struct, frozen=True):
    """One answer to a chat."""

    index: int
    message: dict[str, Any]
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a chat. `system_fingerprint` is the variant that ran it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
    service_tier: str
    system_fingerprint: str
    taxiway: Report


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


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The completions of texts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None
    system_fingerprint: str
    service_tier: str
    taxiway: Report


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    """Tokens read, estimated from the length of the texts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    """The embedding of the text at `index`: numbers, or base64 of little-endian float32."""

    index: int
    embedding: Any
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The embeddings of texts, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    service_tier: str
    taxiway: Report


class Head(NamedTuple):
    """The facts that every answer begins with: its job, the tier that serves it, and its Unix time."""

    job: str
    tier: str
    created: int


AnyCall = ChatCall | CompletionCall | EmbeddingsCall

_encode = msgspec.json.Encoder().encode
_SAFE = dict.fromkeys((*range(32), 127), "?")
_LONGEST = 256  # characters of a header


def written(call: AnyCall, model: Model, head: Head, result: Result) -> bytes:
    """The whole answer to a call, as JSON."""
    if isinstance(call, ChatCall):
        return _encode(chat_completion(head, result))
    if isinstance(call, CompletionCall):
        return _encode(completion(head, result, call.n or 1))
    texts = [call.input] if isinstance(call.input, str) else call.input
    packed = call.encoding_format == "base64"
    return _encode(embeddings(head, result, model=model, texts=texts, packed=packed, dimensions=call.dimensions))


def chat_completion(head: Head, result: Result) -> ChatCompletion:
    """The answer to a chat of one or more choices."""
    columns = [column(result, name) for name in ("message", "finish-reason")]
    choices = [
        Choice(index, plain(message), finish, message.get("logprobs"))
        for index, (message, finish) in enumerate(zip(*columns, strict=True))
    ]
    return ChatCompletion(
        id=f"chatcmpl-{head.job}",
        created=head.created,
        model=result.model,
        choices=choices,
        usage=usage_of(result),
        service_tier=head.tier,
        system_fingerprint=result.report.variant,
        taxiway=report_of(head.job, result),
    )


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its logprobs."""
    return {name: value for name, value in message.items() if name != "logprobs"}


def completion(head: Head, result: Result, choices: int = 1) -> Completion:
    """The completions of one or more texts, with `choices` of each."""
    rows = zip(messages_of(result), column(result, "finish-reason"), strict=True)
    return Completion(
        id=f"cmpl-{head.job}",
        created=head.created,
        model=result.model,
        choices=[
            TextChoice(index, message["content"], finish, text_logprobs((message["logprobs"] or {}).get("content")))
            for index, (message, finish) in enumerate(rows)
        ],
        usage=usage_of(result, choices),
        service_tier=head.tier,
        system_fingerprint=result.report.variant,
        taxiway=report_of(head.job, result),
    )


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
    head: Head, result: Result, *, model: Model, texts: Sequence[str], packed: bool, dimensions: int | None
) -> Embeddings:
    """The embeddings of texts; `packed` as base64. Fewer `dimensions` are the first ones, scaled to unit length."""
    spec = embedding_of(model)
    assert spec is not None
    rows = array_output(spec, result.outputs[spec.name])
    if dimensions is not None and dimensions < rows.shape[1]:
        rows = _shortened(rows, dimensions)
    tokens = sum(len(text) // CHARACTERS_PER_TOKEN + 1 for text in texts)
    return Embeddings(
        data=[Embedding(index, _packed(row) if packed else row.tolist()) for index, row in enumerate(rows)],
        model=result.model,
        usage=EmbeddingsUsage(tokens, tokens),
        service_tier=head.tier,
        taxiway=report_of(head.job, result),
    )


def usage_of(result: Result, choices: int = 0) -> Usage | None:
    """Tokens of all rows, a prompt's once for its `choices`, which are all rows if 0; None if they are not counted."""
    counts = column(result, "usage") if "usage" in result.outputs else [None]
    known = [one for one in counts if isinstance(one, Mapping)]
    if len(known) < len(counts):
        return None
    prompt = sum(int(one.get("prompt_tokens", 0)) for one in known[:: choices or len(known)])
    generated = sum(int(one.get("completion_tokens", 0)) for one in known)
    return Usage(prompt, generated, prompt + generated)


def report_of(job: str, result: Result) -> Report:
    """The run report with its job."""
    return Report(job=job, **msgspec.structs.asdict(result.report))


def headers_of_result(job: str, result: Result) -> dict[str, str]:
    """The headers of a whole answer."""
    report = result.report
    headers = _headers(job, report.hardware_class, report.variant, report.reason)
    return {**headers, "x-taxiway-device": report.device, "x-taxiway-cost": f"{report.cost:.9f}"}


def headers_of_placement(admitted: Admitted) -> dict[str, str]:
    """The headers of a stream, which begins before its job has run: where the job was placed first."""
    placement, job = admitted.placement, admitted.ticket.job
    if placement.held:
        return {"x-request-id": job}
    candidate = placement.candidate
    return _headers(job, candidate.hardware_class, candidate.variant_name, placement.reason)


def _headers(job: str, hardware_class: str, variant: str, reason: str) -> dict[str, str]:
    named = {"class": hardware_class, "variant": variant, "reason": reason}
    headers = {f"x-taxiway-{name}": _printable(text) for name, text in named.items()}
    return {"x-request-id": job, **headers}


def _printable(text: str) -> str:
    return text[:_LONGEST].encode("ascii", "replace").decode().translate(_SAFE)


def _packed(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def _shortened(rows: np.ndarray, dimensions: int) -> np.ndarray:
    first = rows[:, :dimensions]
    lengths = np.linalg.norm(first.astype(np.float64), axis=1, keepdims=True)
    return first / np.where(lengths > 0, lengths, 1)


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
    """An event of a stream. The last one of the choices has the run report."""

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
        """The events before all others; may be empty."""

    def part(self, part: Part) -> bytes:
        """The event of a part of a message."""

    def ending(self, result: Result) -> bytes:
        """The events after the last part."""

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """The end of a stream whose job failed."""


class ChunkWriter(ABC):
    """Writes chunks, then with `usage` a chunk with the tokens used, and `[DONE]`."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[Literal["chat.completion.chunk", "text_completion"]]

    def __init__(self, head: Head, model: str, *, choices: int, usage: bool) -> None:
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
        """See `Writer`: nothing."""
        return b""

    def part(self, part: Part) -> bytes:
        """See `Writer`. The SDKs expect choices to begin in their order."""
        before = b"".join(map(self._empty, range(part.row))) if part.row not in self._begun else b""
        return before + self._chunk(self._choice(part))

    def ending(self, result: Result) -> bytes:
        """See `Writer`: the finish reasons, and the run report."""
        reasons = [str(reason) for reason in column(result, "finish-reason")]
        events = [
            self._empty(row) + self._chunk(self._last(row, reason), taxiway=report)
            for row, reason in enumerate(reasons)
            for report in [report_of(self._job, result) if row == len(reasons) - 1 else None]
        ]
        usage = usage_of(result, self._choices)
        return b"".join(events) + (self._chunk(usage=usage) if self._usage else b"") + DONE

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """See `Writer`."""
        return b"data: " + content(error, path) + b"\n\n"

    def _chunk(self, *choices: ChunkChoice, **more: Any) -> bytes:
        return b"data: " + _encode(Chunk(**self._named, choices=[*choices], **more)) + b"\n\n"

    def _empty(self, row: int) -> bytes:
        """The first chunk of a row, if it was not sent yet; may be empty."""
        return b""

    @abstractmethod
    def _choice(self, part: Part) -> ChunkChoice:
        """A part of a message as part of a choice."""

    @abstractmethod
    def _last(self, row: int, reason: str) -> ChunkChoice:
        """The end of a choice."""


class ChatWriter(ChunkWriter):
    """Writes chunks of a chat."""

    PREFIX = "chatcmpl"
    KIND = "chat.completion.chunk"

    def _choice(self, part: Part) -> ChunkChoice:
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

    def _choice(self, part: Part) -> ChunkChoice:
        begin, entries = self._begun.get(part.row, 0), part.delta.get("logprobs") or ()
        self._begun[part.row] = begin + sum(len(one["token"]) for one in entries)
        return ChunkChoice(part.row, None, text=part.delta.get("content", ""), logprobs=text_logprobs(entries, begin))

    def _last(self, row: int, reason: str) -> ChunkChoice:
        return ChunkChoice(row, reason, text="")
