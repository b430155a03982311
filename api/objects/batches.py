"""A batch: its states, the lines that it reads, the calls that they make, and the lines that it writes. Pure.

A batch is one value, replaced as a whole. A router works on it while it is the `owner`, until `lease`. Lines are run in
their order, some at a time; once a run of them has ended, their answers are written as one *part*, and only then the
batch names that part and counts its lines. So a router that takes over repeats the lines of no named part, and each
line is in exactly one of them. Jobs have keys made of the batch and the line's `custom_id`: a repeated line is its job.

A line may make OpenAI's calls, and infer requests for a model. Batches, and the lines of those at work, begin in turn,
by tenant.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec

from api.errors import error_answer
from api.inference.protocol import answer_of, read_infer, request_of
from api.openai.answers import AnswerHead, written
from api.openai.requests import (
    ChatCall,
    CompletionCall,
    EmbeddingsCall,
    Metadata,
    chat_fields,
    completion_fields,
    embedding_fields,
    read_call,
    unsupported,
)
from api.storage.objects import ExpiresAfter
from router.service.admission import Rules
from taxiway.contract.batches import Line, LineError, LineFault, LineResponse, OutputLine, Status
from taxiway.contract.job import Result
from taxiway.contract.request import TERMS
from taxiway.errors import UNREADABLE, InvalidRequestError, RequestTooLargeError, TaxiwayError, unreadable, wrong_field

MOST_LINES = 100_000
"""Lines of a batch."""

MOST_ERRORS = 100
"""Errors of its lines that a batch lists."""

PART = 500
"""Lines after which a part is written."""

PART_BYTES = 4 * 2**20
"""Bytes of answers after which a part is written."""


_WINDOW = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_WINDOW = 7 * 86400


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    tenant: str
    endpoint: str
    """The call that each line makes: `/v1/embeddings`, `/v2/models/sentiment/infer` …"""
    input_file_id: str
    completion_window: str
    # Unix seconds
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    webhook: str | None = None
    """The webhook endpoint that its request named."""
    terms: dict[str, Any] = {}
    """The other service terms, which each line has."""
    status: Status = "validating"
    errors: list[LineError] = []
    """Of the input file, if it is not valid."""
    lines: int = 0
    """Of the input file."""
    done: int = 0
    """Lines in the parts of its output."""
    completed: int = 0
    failed: int = 0
    expired: int = 0
    # Files of its parts: answers, and lines that failed
    outputs: list[str] = []
    faults: list[str] = []
    output_file_id: str = ""
    error_file_id: str = ""
    # Unix seconds, 0 if not reached
    in_progress_at: int = 0
    finalizing_at: int = 0
    cancelling_at: int = 0
    ended_at: int = 0
    owner: str = ""
    """The router that works on it, until `lease` by the store's clock."""
    lease: float = 0.0
    output_expires_after: ExpiresAfter | None = None

    @property
    def parts(self) -> list[str]:
        """The files of its output so far, in the order of its lines; none once it has ended."""
        return sorted([*self.outputs, *self.faults])

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to be cancelled."""
        return self.cancelling_at > 0


REFUSED_TERMS = {
    "deadline": "none, as completion_window is a batch's deadline",
    "idempotency_key": "none, as a batch has no key; list the batches to find one made before",
}
"""Terms that a batch does not have, and what is expected instead."""


class BatchCall(msgspec.Struct, frozen=True):
    """The body of a request for a batch."""

    input_file_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


decode_batch = msgspec.json.Decoder(Batch).decode


class EndedLine(msgspec.Struct, frozen=True):
    """How a line ended: the line that is written, and whether it is an answer, or came too late."""

    written: bytes
    completed: bool
    expired: bool = False


_decode_line = msgspec.json.Decoder(Line).decode
_encode = msgspec.json.Encoder().encode


def window_of(text: str) -> int:
    """The seconds of a completion window such as `24h`.

    Raises:
        InvalidRequestError: it is none.
    """
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_WINDOW:
        raise wrong_field("completion_window", "a time such as 24h, 30m or 7d, at most 7d", text)
    return seconds


def read_line(text: bytes, endpoint: str) -> Line:
    """The line of a batch.

    Raises:
        InvalidRequestError: it is none, or for another call than the batch's.
    """
    try:
        line = _decode_line(text)
    except UNREADABLE as error:
        raise unreadable(error) from error
    if line.method != "POST" or line.url != endpoint:
        got = f"{line.method} {line.url}"
        raise wrong_field("url", f"POST {endpoint}", got)
    if not 0 < len(line.custom_id) <= 512:
        raise InvalidRequestError("custom_id: expected 1 to 512 characters", field="custom_id")
    return line


def digest_of(custom_id: str) -> bytes:
    """A short form of a `custom_id` that no other has."""
    return hashlib.sha256(custom_id.encode()).digest()


def key_of(batch: str, custom_id: str, attempt: int) -> str:
    """The idempotency key of a line's job; another `attempt` is another job, as the first one's result is gone."""
    return f"{batch}.{digest_of(custom_id).hex()}.{attempt}"


def answered(custom_id: str, job: str, status: int, body: bytes) -> bytes:
    """The line that is written for an answer, or an error."""
    response = LineResponse(status, job, msgspec.Raw(body))
    return _encode(OutputLine(f"batch_req_{job}", custom_id, response, None)) + b"\n"


def too_late(custom_id: str) -> bytes:
    """The line that is written where a job was not answered in the batch's window."""
    error = LineFault("batch_expired", "the batch's completion window passed before this line was answered")
    return _encode(OutputLine(None, custom_id, None, error)) + b"\n"


async def lines_of(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, without their ends, each with its number from 1.

    A byte order mark, with which editors on Windows begin a file, is left off.

    Raises:
        RequestTooLargeError: a line has more than `most` bytes, or there are more than `MOST_LINES`, empty ones
            included.
    """
    number = 0
    rest: list[bytes] = []  # pieces of a line that has not ended
    async for piece in pieces:
        begin = 0
        while (end := piece.find(b"\n", begin)) >= 0:
            number += 1
            if number > MOST_LINES:
                raise _too_many()
            line, begin = b"".join((*rest, piece[begin:end])), end + 1
            rest.clear()
            if text := _checked(line, number, most):
                yield number, text
        rest.append(piece[begin:])
        if sum(map(len, rest)) > most:
            raise _too_long(most)
    if text := _checked(b"".join(rest), number + 1, most):
        if number >= MOST_LINES:
            raise _too_many()
        yield number + 1, text


def _checked(line: bytes, number: int, most: int) -> bytes:
    """A line's text; empty if there is none."""
    text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    if len(line) > most:
        raise _too_long(most)
    return b"" if text.isspace() else text


def _too_many() -> RequestTooLargeError:
    return RequestTooLargeError(f"expected 1 to {MOST_LINES} lines, empty ones included, got more", limit="lines")


def _too_long(most: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"payload: expected at most {most} bytes a line", limit="payload")


TURN_SECONDS = 30.0
"""Seconds after which a batch gives way to that of a tenant that has as few."""


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that this router works on, or may work on."""

    name: str
    tenant: str
    working: bool
    since: float  # when it began to, or to wait; seconds
    loses: bool = False  # whether it would have to begin again what it does now


def next_batches(batches: Sequence[OpenBatch], now: float, most: int) -> list[str]:
    """The names of up to `most` batches to work on; `batches` are all, oldest first.

    Each tenant has one before another has two. Of tenants with as many, those go on that had less than a turn, and then
    come those that waited longest. A tenant's own batches do not take turns: the oldest ends first.
    """
    places = Counter[str]()
    ranked = list[tuple[int, int, float, int, str]]()
    for one in sorted(batches, key=lambda one: (not one.working, one.since if one.working else 0.0)):
        tired = one.working and not one.loses and now - one.since >= TURN_SECONDS
        ranked.append((places[one.tenant], 2 if tired else int(not one.working), one.since, len(ranked), one.name))
        places[one.tenant] += 1
    return [name for *_, name in sorted(ranked)[:most]]


class LineWindow:
    """Bytes of the lines that run at a router, and of answers that are not written yet, by tenant.

    Tenants share `most` of them; a tenant that holds none may begin one line, however long.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = Counter[str]()
        self.tenants = 1  # that have batches which are worked on

    def fits(self, tenant: str, size: int) -> bool:
        """Whether a line of `size` bytes may begin."""
        held = self._held[tenant]
        return held <= 0 or held + size <= self._most // max(self.tenants, 1)

    def add(self, tenant: str, size: int) -> None:
        """Count `size` more bytes, or fewer if it is negative."""
        self._held[tenant] += size
        if not self._held[tenant]:
            del self._held[tenant]


_OPENAI: Mapping[str, tuple[type[Any], Callable[..., dict[str, Any]]]] = {
    "/v1/chat/completions": (ChatCall, chat_fields),
    "/v1/completions": (CompletionCall, completion_fields),
    "/v1/embeddings": (EmbeddingsCall, embedding_fields),
}
_INFER = re.compile(r"/v2/models/([^/]+)/infer")


@dataclass(frozen=True, slots=True)
class LineCall:
    """What a line asks for: the request's fields without service terms, and the JSON of its answer."""

    fields: Mapping[str, Any]
    answer: Callable[[AnswerHead, Result], bytes]


def check_endpoint(endpoint: str, rules: Rules) -> None:
    """Refuse a batch of other calls.

    Raises:
        InvalidRequestError: lines cannot make that call.
        UnknownModelError, ModelUnavailableError: it is for a model that is not served.
    """
    if (infer := _INFER.fullmatch(endpoint)) is not None:
        rules.catalogue.resolve(unquote(infer[1]))
    elif endpoint not in _OPENAI:
        raise wrong_field("endpoint", f"one of {[*sorted(_OPENAI), '/v2/models/MODEL/infer']}", endpoint)


def read_line_call(endpoint: str, body: bytes, rules: Rules) -> LineCall:
    """The call in a line's body.

    Raises:
        TaxiwayError: it is invalid, names a service term, or is for a model that is not served.
    """
    infer = _INFER.fullmatch(endpoint)
    return _openai_call(endpoint, body, rules) if infer is None else _infer_call(unquote(infer[1]), body, rules)


def failure(error: TaxiwayError, endpoint: str) -> bytes:
    """The JSON of an answer that is an error."""
    return b"".join(error_answer(error, endpoint).pieces)


def _openai_call(endpoint: str, body: bytes, rules: Rules) -> LineCall:
    kind, fields = _OPENAI[endpoint]
    parsed = read_call(body, kind, rules.topology.limits)
    if getattr(parsed.call, "stream", None):
        raise unsupported("stream", "nothing, as lines of a batch are not streamed", True)
    _check_terms(parsed.terms)
    model = rules.catalogue.resolve(parsed.call.model)
    return LineCall(fields(parsed, model), partial(written, parsed.call, model))


def _infer_call(reference: str, body: bytes, rules: Rules) -> LineCall:
    model = rules.catalogue.resolve(reference)
    infer = read_infer(body, most=rules.topology.limits.elements)
    _check_terms({name: value for name, value in infer.parameters.items() if name in TERMS})
    request = request_of(reference, infer, rules.topology.limits.elements)

    def answer(head: AnswerHead, result: Result) -> bytes:
        return answer_of(model, head.job, result, lambda _: False, infer.id).body

    names = ("model", "inputs", "parameters", "outputs")
    return LineCall({name: getattr(request, name) for name in names}, answer)


def _check_terms(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        raise wrong_field(name, "no service term in a line, as all lines have their batch's", value)
