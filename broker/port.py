"""The values that routers and workers exchange with the broker, whose messages have one form here, `wire.Envelope`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import msgspec

from tasks.models.signature import KeyUse
from tasks.queues.receipts import PlacementReceipt
from taxiway.contract.job import MoveRecord
from taxiway.contract.wire import Envelope

TAKE_AT_MOST = 128
"""Messages per call: enough to share a round trip, few enough to decide in a few milliseconds."""

TAKE_BYTES = 8 * 2**20
"""Bytes of messages after which a call takes no more; the last message may exceed it. Reading and forwarding them
blocks a router's event loop for 4 ms per MiB."""

KEPT_DEAD = 10_000
"""Dead letters that are kept; the oldest are dropped."""

PEEK_BYTES = 4 * 2**20
"""Bytes of messages inspected per level of a queue; large messages are not moved."""


class Arrival(msgspec.Struct, frozen=True):
    """A message as it was taken. `raw` is its bytes at the broker; `envelope` is None if they cannot be decoded."""

    tag: str
    raw: bytes
    envelope: Envelope | None
    flaw: str = ""


class ForwardOutcome(IntEnum):
    """What became of a message to be forwarded, as forward.lua answers."""

    OVER = -2  # its tenant has `max_depth` jobs that have not ended
    CONFLICT = -1  # its idempotency key was first used for another request
    COPY = 0  # its job has a record, or the message is no longer this router's
    NEW = 1


class Affinity(msgspec.Struct, frozen=True):
    """Prefers the worker that ran an earlier job, whose prefix cache is warm, if it can take the message at once."""

    after: str  # the earlier job
    workers: tuple[str, ...]  # of the class
    most: int  # free slots fewer than another worker's that the preferred one may have
    lease: float  # seconds


class Outgoing(msgspec.Struct, frozen=True):
    """A placed message on its way to a class queue, with its job's record.

    The record in `fields` has `cell`, `work`, `arrived` and `rows`; `lengths` if the job generates, `spent` and `cost`
    if its tenant has a budget, `open` and `max_depth` if it has such a limit, `blobs`, the keys of its large inputs,
    and `holding`, the queue to hold it in, if it has no `queue`. Consecutive jobs with the same object are forwarded
    as one group.
    """

    tag: str
    """Of the arrival; empty if it was never one."""
    queue: str
    """The class queue; empty if the message is to be held."""
    level: int
    envelope: Envelope
    job: str
    fields: Mapping[str, str] = {}
    reply: str = ""
    """The client's name."""
    use: KeyUse | None = None
    """The job's use of an idempotency key."""
    affinity: Affinity | None = None
    receipt: PlacementReceipt | None = None
    """Of a job with labels that goes to a class."""

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


@dataclass(frozen=True, slots=True)
class StoredReceipts:
    """Lines of the audit log, of which the store keeps about the latest `most`."""

    lines: Sequence[bytes]
    most: int


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
    """A waiting message and its bytes at the broker."""

    queue: str
    level: int
    raw: bytes
    envelope: Envelope

    @property
    def job(self) -> str:
        """The job's id."""
        return str(self.envelope.headers.get("id", ""))


@dataclass(frozen=True, slots=True)
class QueueHead:
    """What waits in a class's queue: the number of messages by level, and the jobs that are served next in each."""

    depths: tuple[int, ...]
    first: tuple[str, ...] = ()


class Moved(MoveRecord, frozen=True, kw_only=True):
    """Jobs that moved together."""

    jobs: int


@dataclass(frozen=True, slots=True)
class MoveStep:
    """One message's move: the target queue, the new envelope, and the new fields of its job's record.

    `cell` and `work` among the `fields` correct the work hash.
    """

    peeked: Peeked
    queue: str
    envelope: Envelope
    fields: Mapping[str, str] = field(default_factory=dict)
