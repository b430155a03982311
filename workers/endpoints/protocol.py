"""A protocol of endpoints: a row's HTTP request, the reader of its answer, and whose fault a failure is. No I/O."""

from __future__ import annotations

import email.utils
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import msgspec

from tasks.models.discovered import Announced
from tasks.models.model import Model, Variant
from taxiway.contract.job import Tokens
from taxiway.contract.sealed import Sealed
from taxiway.contract.stream import CutGeneration, Delta
from taxiway.errors import UNREADABLE, InvalidRequestError, RequestTooLargeError, TaxiwayError, cut
from workers.port import Item, Row

Value = TypeVar("Value")

LONGEST_WAIT = 300.0
"""Most seconds for which a `Retry-After` is obeyed before the endpoint is asked again."""

BUSY_FOR = 1.0
"""Seconds until an endpoint is asked again that was busy and did not say for how long."""

PATIENT_SHARE = 0.5
"""Share of another fleet's slots that patient jobs may hold: they wait there, and urgent ones for a slot here.

Source: `lab.sites`, the same hours, seed 1: of live requests 95.5 % are in time with all slots, 98.4 with
seven eighths, and 99.7 with half."""

_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
"""The `code` of OpenAI, and the `type` of llama.cpp, for a prompt that does not fit."""

_CONTEXT = re.compile(r"(maximum|model's) (context|model) length")
"""What vLLM and SGLang say of such a prompt, without a mark of their own."""

_OWN_FAULT = re.compile(
    r"(Expected '|Missing (?!model)|[Uu]nsupported |Invalid |Failed to parse (messages|tools|grammar)|"
    r"JSON schema conversion failed|\[json\.exception)"
)
"""How llama.cpp refuses a chat's fields with the status 500. Source: its common/chat.cpp, and its JSON reader."""

_LOADING = re.compile(r"\bloading\b", re.IGNORECASE)
"""What llama.cpp ("Loading model") and TGI ("currently loading") say with the status 503 until they serve."""

_UNREADY = (400, 503)
"""What a probe gets until the server is ready: 503 of OpenAI's kind, 400 of Triton and MLServer."""

_TRACEBACK = "Traceback (most recent call last)"

_MESSAGE_LENGTH = 500  # characters of an engine's message

MAX_REFUSAL = 64 * 2**10
"""Bytes that are read of a refusal."""


class FaultKind(StrEnum):
    """What became of the request: it never ran, or not yet, as its model loads; found no capacity; or may have run.

    One that is refused found none for itself, where others may.
    """

    UNREACHED = "unreached"
    STARTING = "starting"
    BUSY = "busy"
    REFUSED = "refused"
    BROKEN = "broken"


class EndpointError(Exception):
    """An endpoint failed, not the request: the job may run elsewhere. `retry_after` is seconds, of one that is busy."""

    def __init__(self, kind: FaultKind, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.retry_after = retry_after


def refused(status: int, headers: Mapping[str, str], body: bytes, now: float) -> EndpointError | TaxiwayError:
    """What a status other than 200 means; `now` is Unix time.

    An endpoint that refuses the worker itself (its key, its path, the model's name) is wrongly configured, and the
    request never ran there.
    """
    said, marks = _message(body)
    text = f"{status}{': ' if said else ''}{said}"
    if status in (400, 422) and (any(mark in _TOO_LONG for mark in marks) or _CONTEXT.search(said)):
        return RequestTooLargeError(f"the endpoint refuses the request: {text}", field="inputs")
    if status == 413:
        return RequestTooLargeError(f"the endpoint refuses the request: {text}")
    if status in (400, 422) or (status == 500 and "server_error" in marks and _OWN_FAULT.match(said)):
        return InvalidRequestError(f"the endpoint refuses the request: {text}")
    if status == 429 or (status == 503 and "Retry-After" in headers):
        wait = retry_after(headers.get("Retry-After", ""), now)
        return EndpointError(FaultKind.BUSY, f"the endpoint is busy: {text}", wait)
    if status == 503 and _LOADING.search(said):
        return EndpointError(FaultKind.STARTING, f"the endpoint is starting: {text}")
    if status >= 500 or status == 408:
        return EndpointError(FaultKind.BROKEN, f"the endpoint failed: {text}")
    return EndpointError(FaultKind.UNREACHED, f"the endpoint does not accept the worker's requests: {text}")


def unready(status: int, headers: Mapping[str, str], body: bytes, now: float) -> EndpointError | TaxiwayError:
    """What a status other than 200 means as the answer to a probe."""
    if status not in _UNREADY:
        return refused(status, headers, body, now)
    said = _message(body)[0]
    return EndpointError(FaultKind.STARTING, f"the endpoint is starting: {status}{': ' if said else ''}{said}")


def patient_slots(slots: int) -> int:
    """How many of another fleet's slots patient jobs may hold; one at least."""
    return max(int(PATIENT_SHARE * slots), 1)


def retry_after(text: str, now: float) -> float:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3): a number or a date; `BUSY_FOR` if it is neither."""
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), LONGEST_WAIT)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return BUSY_FOR
    return min(max(at - now, 0.0), LONGEST_WAIT)


def _message(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """The error's text in the forms that engines have, and the marks that identify its kind."""
    try:
        said = msgspec.json.decode(body)
    except UNREADABLE:
        return _cause(body[:MAX_REFUSAL].decode(errors="replace")), ()
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return _cause(str(error)), ()
    text = error.get("message", error.get("detail", ""))
    return _cause(str(text)), (error.get("code"), error.get("type"))


def _cause(text: str) -> str:
    """The text; of a traceback, which callers do not need, the last line."""
    text = text.strip()
    return cut(text.rpartition("\n")[2] if _TRACEBACK in text else text, _MESSAGE_LENGTH)


MAX_ANSWER = 256 * 2**20
"""Bytes of one answer; an endpoint that sends more is at fault."""


class AnswerReader(ABC):
    """Reads one answer from its chunks, however these are cut. `done` says that it is complete before the body ends.

    `pieces` counts the parts of generated text so far, and `tokens` is what the endpoint counted, once reported: never
    more than the request may have. `excess` is what it counted beyond that. `text` is the generated text so far with
    what was kept of earlier runs, and `written` its length in tokens; `more` means that there is more than text.
    """

    done = False
    pieces = 0
    text = ""
    written = 0
    more = False
    tokens: Tokens | None = None
    excess = 0

    @abstractmethod
    def feed(self, chunk: bytes) -> Sequence[str | Delta]:
        """Read a chunk; the generated text that it adds, and the parts of a message beside that.

        Raises:
            EndpointError: it is malformed, or the endpoint reports a failure.
        """

    @abstractmethod
    def answer(self) -> Row:
        """The outputs by name, once the body has ended.

        Raises:
            EndpointError: the answer is truncated or malformed.
        """


Tell = Callable[[Sequence[str | Delta]], None]
"""Takes what a reader's `feed` gives."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A POST to `path` below the endpoint's URL, and what reads its answer, given the answer's headers."""

    path: str
    body: bytes
    read: Callable[[Mapping[str, str]], AnswerReader]
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def with_priority(self, level: int) -> EngineRequest:
        """The same with a level, for a body that is an object in JSON; of two fields of a name the last one counts."""
        return replace(self, body=b'%b,"priority":%d}' % (self.body[:-1], level))


@dataclass(frozen=True, slots=True)
class Behalf:
    """For which job a request is sent, which engines do not need to know, and other fleets do."""

    key: str
    """The job, its attempt and the row."""
    left: float | None
    """Seconds to its deadline; None without one."""
    body: bytes
    """The job's request, which has the rest of its terms."""
    streams: bool
    trace: str
    """Its trace context; empty for none."""
    sealed: Sealed | None = None
    """Its inputs as they came, if they were sealed: they are sealed again for the other fleet's workers."""


@dataclass(slots=True)
class Exchange:
    """One request and its answer in progress."""

    ask: EngineRequest
    prompt: int
    """Tokens that the request is expected to have."""
    behalf: Behalf | None = None
    """Of a request to another fleet alone."""
    size: int = 0
    """What its row reads, and may have written, in the model's unit."""
    # Seconds on the monotonic clock, 0 before
    sent: float = 0.0
    first: float = 0.0
    """When the first part of generated text came."""
    refused: bool = False
    """The endpoint did not run it."""
    aborted: bool = False
    """We closed its connection."""
    expected: float = 0.0
    """Seconds that another fleet offered; 0 of an engine, which offers nothing."""
    cost: float = 0.0
    """US dollars that another fleet bills for it."""
    reader: AnswerReader | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the answer."""

    @property
    def ran(self) -> bool:
        """Whether the endpoint ran it, as far as is known: one whose connection broke may have run."""
        return self.sent > 0 and not self.refused

    @property
    def tokens(self) -> Tokens:
        """Its tokens as the endpoint counts them; else those that were expected of the prompt, and the parts that came.

        An engine sends about one token in each part.
        """
        if not self.ran:
            return Tokens()
        if self.reader is None or self.reader.tokens is None:
            return Tokens(input=self.prompt, output=0 if self.reader is None else self.reader.pieces)
        return self.reader.tokens


Conversation = Generator[tuple[str, str, bytes], bytes, Value]
"""Yields the method, path and body of small requests, gets their answers, and ends with what comes of them.

Raises `EndpointError` where an answer is malformed.
"""

Continuing = Conversation[EngineRequest | Row]
"""Continues an answer that was cut, by requests at the server's root.

It ends with the request for the rest, or with the whole answer if nothing is left of it.
"""


class AskItem(Item, kw_only=True):
    """A row that was prepared for an endpoint.

    `plain` means that its answer is one plain text, and `go_on` continues one that was cut; it is None where the server
    cannot. `seed` is the request's own, if it has one.
    """

    ask: EngineRequest
    go_on: Callable[[CutGeneration], Continuing] | None = None
    plain: bool = False
    seed: int | None = None


Discovery = Conversation[dict[str, Announced]]
"""Ends with models by what the server calls them."""


class ServedModel(NamedTuple):
    """A model's variant at an endpoint, which calls it by a name and announces `extensions` of its protocol."""

    model: Model
    variant: Variant
    called: str
    extensions: Collection[str] = ()


class EndpointProtocol(Protocol):
    """What a protocol's module has.

    `HEALTH` is the path that a probe gets, `ABOUT` the one where a server announces its extensions.
    """

    HEALTH: str
    ABOUT: str

    def prepare(self, served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
        """The row in a form for the server.

        Raises:
            RequestError: the row or a parameter is wrong.
        """

    def discover(self) -> Discovery:
        """Asks for all models that the endpoint has."""

    def extensions(self, body: bytes) -> Collection[str]:
        """The extensions that a server announces.

        Raises:
            EndpointError: its answer is malformed.
        """

    def announced(self, body: bytes) -> Sequence[str] | None:
        """The models that the answer to a probe lists; None where it lists none.

        Raises:
            EndpointError: it is malformed.
        """


def open_protocol(name: str) -> EndpointProtocol:
    """The module of the protocol with this name."""
    return cast(EndpointProtocol, importlib.import_module(f"workers.endpoints.{name}"))


class WholeReader(AnswerReader):
    """Reads an answer that is of use only as a whole, which `parse` turns into outputs."""

    def __init__(self, parse: Callable[[bytes], Row], most: int = MAX_ANSWER) -> None:
        self._parse, self._most = parse, most
        self._body = bytearray()

    def feed(self, chunk: bytes) -> Sequence[str | Delta]:
        """Keep the chunk; it adds no text."""
        self._body += chunk
        if len(self._body) > self._most:
            raise malformed(f"more than {self._most} bytes")
        return ()

    def answer(self) -> Row:
        """The outputs."""
        return self._parse(bytes(self._body))


def malformed(reason: str) -> EndpointError:
    """The endpoint's fault for an answer that cannot be read."""
    return EndpointError(FaultKind.BROKEN, f"the endpoint's answer is malformed: {reason}")


def decoded(decode: Callable[[bytes | str], Value], raw: bytes | str) -> Value:
    """What a decoder reads.

    Raises:
        EndpointError: the answer is malformed.
    """
    try:
        return decode(raw)
    except UNREADABLE as error:
        raise malformed(str(error)) from error
