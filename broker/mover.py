"""Moves waiting messages from one class's queue to another's: one small protocol, one file a broker.

The leader moves (`broker.valkey.leadership`): its token is checked where a move is made.
On both brokers the claim before compute makes a copy harmless, so a move that is cut in the middle runs a job once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from taxiway.contract.wire import Envelope

PEEK_BYTES = 4 * 2**20
"""Bytes of messages that one queue's level is looked at for; large ones are left where they are."""


@dataclass(frozen=True, slots=True)
class Peeked:
    """A waiting message: what identifies it to its broker, and its envelope."""

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
    """What waits in a class's queue: messages by level where the broker tells, else in all.

    `first` are the jobs that are served next, one a level, as far as the broker shows them.
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
class Shown:
    """A class's queue as it was looked at: how many messages wait there, and those that were seen."""

    depth: int
    messages: Sequence[Peeked] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One message's move: to which queue, as which envelope, and what changes in its job's record.

    `fields` hold the record's new fields: among them `cell` and `work`, by which the work hash is corrected.
    """

    peeked: Peeked
    queue: str
    envelope: Envelope
    fields: Mapping[str, str] = field(default_factory=dict)


class Yard(Protocol):
    """The class queues of a broker, for the one that moves. Methods raise `BrokerUnavailableError` while it is away."""

    async def head(self, queue: str) -> Head:
        """What waits in the queue."""

    async def peek(self, queue: str, most: int) -> Shown:
        """The queue with up to `most` waiting messages of each level, those served last, the very last first.

        They stay where they are, or come back with `put_back`. A broker that shows only those served first shows these:
        of jobs that are alike it is the same which of them move.
        """

    async def records(self, jobs: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        """Fields of jobs' records, in order; without those that a record lacks."""

    async def move(self, token: str, steps: Sequence[Step]) -> list[bool]:
        """Which messages moved; the others were taken meanwhile, or the lead was lost."""

    async def tell(self, moved: Sequence[Moved]) -> None:
        """Note moves that were made, for whoever looks at the fleet."""

    async def moves(self) -> list[Moved]:
        """The last moves of the fleet, the latest first."""

    async def put_back(self) -> None:
        """Return to their queues what `peek` took out of them."""

    async def close(self) -> None:
        """Disconnect."""
