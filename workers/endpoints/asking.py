"""What a protocol makes of a row: an HTTP request, and a reader of its answer. No I/O."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from tasks.models.catalogue import Model, Variant
from tasks.models.discovered import Announced
from taxiway.contract.job import Tokens
from workers.endpoints.faults import EndpointError, FaultKind
from workers.pipelines import Item, Row

MAX_ANSWER = 256 * 2**20
"""Bytes of one answer; an endpoint that sends more is at fault."""


class Reader(ABC):
    """Reads one answer from its chunks, however these are cut. `done` says that it is complete before the body ends.

    `pieces` counts the parts of generated text so far, and `tokens` are those that the endpoint counted, once it tells.
    """

    done = False
    pieces = 0
    tokens: Tokens | None = None

    @abstractmethod
    def feed(self, chunk: bytes) -> str:
        """Read a chunk; the generated text that it adds.

        Raises:
            EndpointError: it is malformed, or the endpoint reports a failure.
        """

    @abstractmethod
    def answer(self) -> Row:
        """The outputs by name, once the body has ended.

        Raises:
            EndpointError: the answer is truncated or malformed.
        """


@dataclass(frozen=True, slots=True)
class Ask:
    """A POST to `path` below the endpoint's URL, and what reads its answer, given the answer's headers."""

    path: str
    body: bytes
    read: Callable[[Mapping[str, str]], Reader]
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


@dataclass(slots=True)
class Exchange:
    """One request and its answer as they go on.

    `prompt` is the tokens that the request is expected to have. `sent` is when it was sent and `first` when the first
    part of generated text came, on the monotonic clock; 0 before. `refused` says that the endpoint did not run it, and
    `aborted` that we closed its connection. `headers` are the answer's.
    """

    ask: Ask
    prompt: int
    sent: float = 0.0
    first: float = 0.0
    refused: bool = False
    aborted: bool = False
    reader: Reader | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

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


@dataclass(slots=True)
class AskItem(Item):
    """A row that was prepared for an endpoint."""

    ask: Ask | None = None


Discovery = Generator[tuple[str, str], bytes, dict[str, Announced]]
"""Yields the method and path of requests, gets their answers, and ends with models by what the server calls them.

Raises `EndpointError` where an answer is malformed.
"""


class EndpointProtocol(Protocol):
    """What a protocol's module has. `HEALTH` is the path that a probe gets."""

    HEALTH: str

    def prepare(self, model: Model, variant: Variant, name: str, row: Row, parameters: Mapping[str, Any]) -> AskItem:
        """The row for the model that the endpoint calls `name`.

        Raises:
            RequestError: the row or a parameter is wrong.
        """

    def discover(self) -> Discovery:
        """Asks for all models that the endpoint has."""

    def announced(self, body: bytes) -> Sequence[str] | None:
        """The models that the answer to a probe lists; None where it lists none.

        Raises:
            EndpointError: it is malformed.
        """


def open_protocol(name: str) -> EndpointProtocol:
    """The module of the protocol with this name."""
    return cast(EndpointProtocol, importlib.import_module(f"workers.endpoints.{name}"))


class WholeReader(Reader):
    """Reads an answer that is of use only as a whole, which `parse` turns into outputs."""

    def __init__(self, parse: Callable[[bytes], Row]) -> None:
        self._parse = parse
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> str:
        """Keep the chunk; it adds no text."""
        self._size += len(chunk)
        if self._size > MAX_ANSWER:
            raise malformed(f"more than {MAX_ANSWER} bytes")
        self._parts.append(chunk)
        return ""

    def answer(self) -> Row:
        """The outputs."""
        return self._parse(b"".join(self._parts))


def malformed(reason: str) -> EndpointError:
    """The endpoint's fault for an answer that cannot be read."""
    return EndpointError(FaultKind.BROKEN, f"the endpoint's answer is malformed: {reason}")
