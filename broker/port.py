"""What routers and workers see of any broker: `Transport` and `QueueMover`, implemented once per broker.

`Transport` carries messages between arrivals, routers and class queues. A message that was taken is answered by
`forward` or `settle` exactly once; if its router dies before that, it returns to the arrivals. `QueueMover` moves
waiting messages between class queues, for the leader (`broker.valkey.mover`), whose fencing token is checked at each
move. A move that is interrupted leaves a copy, which the claim before compute drops. Messages have one form here,
`wire.Envelope`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import msgspec

from tasks.models.signature import KeyUse
from taxiway.contract.wire import Envelope

TAKE_AT_MOST = 128
"""Messages per call: enough to share a round trip, few enough to decide in a few milliseconds."""

TAKE_BYTES = 8 * 2**20
"""Bytes of messages after which a call takes no more; the last message may exceed it. Reading and forwarding them
blocks a router's event loop for 4 ms per MiB."""

PEEK_BYTES = 4 * 2**20
"""Bytes of messages inspected per level of a queue; large messages are not moved."""


class Arrival(msgspec.Struct, frozen=True):
    """A message as it was taken. `raw` is its bytes at the broker; `envelope` is None if they cannot be decoded."""

    tag: str
    raw: bytes
    envelope: Envelope | None
    flaw: str = ""


class InFlight(msgspec.Struct, frozen=True):
    """Arrivals in serving order, and the state store's time at which they were taken."""

    now: float
    arrivals: Sequence[Arrival] = ()


class ForwardOutcome(IntEnum):
    """What became of a message to be forwarded, as forward.lua answers."""

    OVER = -2  # its tenant has `max_depth` jobs that have not ended
    CONFLICT = -1  # its idempotency key was first used for another request
    COPY = 0  # its job has a record, or the message is no longer this router's
    NEW = 1


class Lead(msgspec.Struct, frozen=True):
    """Leads a message to one worker of its class, if that worker can take it at once: the one that had the job `after`.

    The worker is one of `workers`, and has at most `most` fewer free slots than any other. `lease` is in seconds.
    """

    after: str
    workers: tuple[str, ...]
    most: int
    lease: float


class Outgoing(msgspec.Struct, frozen=True):
    """A placed message on its way to a class queue, with its job's record. `tag` is empty if it was never an arrival.

    A message to be held has no `queue`: its `fields` name the `holding` queue. `fields` are the job's record: its
    `cell` and `work`, `arrived` and `rows`; `lengths` if it generates, `spent` and `cost` if its tenant has a budget,
    `open` and `max_depth` if it has such a limit, and `blobs`, the keys of its large inputs, which stay with the record
    until the job ends. Consecutive jobs with the same `fields` object are forwarded as one group. `reply` is the
    client's name, `use` the job's use of an idempotency key. A transport may ignore the `lead`.
    """

    tag: str
    queue: str
    level: int
    envelope: Envelope
    job: str
    fields: Mapping[str, str] = {}
    reply: str = ""
    use: KeyUse | None = None
    lead: Lead | None = None

    @property
    def held(self) -> bool:
        """Whether it goes to holding."""
        return not self.queue


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A snapshot that placements were decided from, to be stored under its `name` for `keep` seconds."""

    name: str
    packed: bytes
    keep: int


class Holder(msgspec.Struct, frozen=True):
    """A worker that died while it held a job: since when it held it by the store's clock, and whether the job `ran`.

    A run that crashed the worker within a tenth of a second may not have been recorded.
    """

    worker: str
    since: float
    ran: bool


class DeadLetter(msgspec.Struct, frozen=True):
    """A message that was given up: why, when by the reporter's clock, and its bytes at the broker.

    `by` is the reporter, `job` the message's job if known, and `history` the workers that died while they held it.
    """

    reason: str
    at: float
    message: bytes
    by: str = ""
    job: str = ""
    history: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True)
class Peeked:
    """A waiting message: `handle` identifies it to its broker."""

    queue: str
    level: int
    handle: Any
    envelope: Envelope

    @property
    def job(self) -> str:
        """The job's id."""
        return str(self.envelope.headers.get("id", ""))


@dataclass(frozen=True, slots=True)
class Head:
    """What waits in a class's queue: the number of messages by level, or in total if the broker does not count levels.

    `first` are the jobs that are served next, one per level, as far as the broker shows them.
    """

    depths: tuple[int, ...]
    first: tuple[str, ...] = ()


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that moved together, at a time by the store's clock."""

    at: float
    source: str
    target: str
    kind: str
    jobs: int
    reason: str


@dataclass(frozen=True, slots=True)
class Inspected:
    """An inspected class queue: the number of messages that wait there, and the messages that were read."""

    depth: int
    messages: Sequence[Peeked] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One message's move: the target queue, the new envelope, and the new fields of its job's record.

    `cell` and `work` among the `fields` correct the work hash.
    """

    peeked: Peeked
    queue: str
    envelope: Envelope
    fields: Mapping[str, str] = field(default_factory=dict)


class Transport(Protocol):
    """A broker's arrivals and class queues. Every method raises `BrokerUnavailableError` while it does not answer."""

    async def wait(self, longest: float) -> None:
        """Return when there may be arrivals, at the latest after `longest` seconds. May be cancelled."""

    async def take(self) -> InFlight:
        """Take arrivals, up to `TAKE_AT_MOST`; the last `forward` may have taken them already."""

    async def forward(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[ForwardOutcome]:
        """Publish messages, or hold them in the state store, and store their records and snapshots."""

    async def release(
        self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()
    ) -> list[ForwardOutcome]:
        """Publish and record jobs that were held. `COPY` for a job that is no longer held."""

    async def settle(self, tags: Sequence[str]) -> None:
        """Delete arrivals that were answered in another way."""

    def abandon(self) -> None:
        """After a failure: return all unanswered messages to the arrivals before the next take."""

    async def retire(self) -> None:
        """Return all unanswered messages to the arrivals, and take no more; forwarding continues."""

    async def tidy(self) -> int:
        """Renew this router's session, and return dead routers' messages to the arrivals; returns their number."""

    async def misdirected(self) -> list[Arrival]:
        """Requests that plain Celery sent to its default queue, if the broker can show them without taking them."""

    async def forget(self, misdirected: Sequence[Arrival]) -> None:
        """Remove these from that queue; other messages stay."""

    async def send(self, queue: str, envelope: Envelope) -> None:
        """Put a message in another application's queue."""

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event."""

    async def close(self) -> None:
        """Return in-flight messages, and disconnect."""


class QueueMover(Protocol):
    """A broker's class queues, for moving. Methods raise `BrokerUnavailableError` while the broker does not answer."""

    async def head(self, queue: str) -> Head:
        """What waits in the queue."""

    async def peek(self, queue: str, most: int) -> Inspected:
        """The queue, with up to `most` waiting messages per level: those served last, in reverse serving order.

        They stay in the queue, or return to it with `put_back`. A broker that shows only the messages served first
        gives those: it does not matter which of several similar jobs move.
        """

    async def records(self, jobs: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        """The named fields of each job's record, in order; fields that a record lacks are omitted."""

    async def move(self, token: str, steps: Sequence[Step]) -> list[bool]:
        """Move messages; returns which moved. The others have been taken, or this router no longer leads."""

    async def note_moves(self, moved: Sequence[Moved]) -> None:
        """Record moves for operators."""

    async def moves(self) -> list[Moved]:
        """The fleet's last moves, most recent first."""

    async def put_back(self) -> None:
        """Return messages that `peek` took to their queues."""

    async def close(self) -> None:
        """Disconnect."""
