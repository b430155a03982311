"""What routers and workers see of a broker, whichever it is: `Transport` and `QueueMover`, implemented once a broker.

`Transport` carries messages between arrivals, routers and class queues. A message that was taken and not answered
returns to the arrivals when its router dies, and is answered by `forward` or `settle` exactly once. `QueueMover` moves
waiting messages between class queues, for the leader (`broker.valkey.leader`): its fencing token is checked where a
move is made. A move that is cut in the middle leaves a copy, which the claim before compute drops. Messages have one
form here, `wire.Envelope`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import msgspec

from tasks.models.signature import KeyUse
from taxiway.contract.limits import LARGE
from taxiway.contract.wire import Envelope

TAKE_AT_MOST = 128
"""Messages that one call takes: enough to share a round trip, few enough to decide in some milliseconds."""

TAKE_BYTES = 8 * 2**20
"""Bytes of messages after which a call takes no more: the last one may go past it. What reads and forwards them holds a
router's event loop for 4 ms a MiB."""

PEEK_BYTES = 4 * 2**20
"""Bytes of messages that one queue's level is looked at for; large ones are left where they are."""


class Arrival(msgspec.Struct, frozen=True):
    """A message as it was taken. `raw` is what the broker held; `envelope` is None where that cannot be read."""

    tag: str
    raw: bytes
    envelope: Envelope | None
    flaw: str = ""


class InFlight(msgspec.Struct, frozen=True):
    """Arrivals, first served first, and the state store's time at which they were taken."""

    now: float
    arrivals: Sequence[Arrival] = ()


class Lead(msgspec.Struct, frozen=True):
    """Which worker of the class a message is led to, if it can take it at once: the one that holds or held a job.

    It is one of `workers`, and has at most `most` free slots less than any other of them. `lease` is in seconds.
    """

    after: str
    workers: tuple[str, ...]
    most: int
    lease: float


class Outgoing(msgspec.Struct, frozen=True):
    """A placed message on its way to a class queue, with its job's record. An empty `tag` was never an arrival.

    A message to be held has no `queue`: its `fields` name the `holding` queue. `fields` are the job's record: its
    `cell` and `work`, `arrived` and `rows`; `lengths` if it generates, `spent` and `cost` if its tenant has a budget,
    and `blobs`, the keys of its large inputs, which stay with the record until the job ends. Consecutive jobs with the
    same `fields` object are forwarded as one group. `reply` is the client's name, `use` the job's use of an idempotency
    key. A transport may ignore the `lead`.
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
    """What placements were decided from, as it is kept under its `name` for `keep` seconds."""

    name: str
    packed: bytes
    keep: int


class Holder(msgspec.Struct, frozen=True):
    """A worker that neither ended a job nor gave it back: since when by the store's clock, and whether it `ran`.

    A run that ended its worker within a tenth of a second may not have been told of.
    """

    worker: str
    since: float
    ran: bool


class DeadLetter(msgspec.Struct, frozen=True):
    """A message given up: why, when by the giver's clock, and its bytes as the broker held them.

    `by` is who gave it up, `job` its job where that is known, and `history` who held that job and ended.
    """

    reason: str
    at: float
    message: bytes
    by: str = ""
    job: str = ""
    history: tuple[Holder, ...] = ()


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


class Transport(Protocol):
    """A broker's arrivals and class queues. Every method raises `BrokerUnavailableError` while it does not answer."""

    async def wait(self, longest: float) -> None:
        """Return when arrivals may be there, at the latest after `longest` seconds. May be cancelled."""

    async def take(self) -> InFlight:
        """Take arrivals, up to `TAKE_AT_MOST`; some may have been taken as others were forwarded."""

    async def forward(self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()) -> list[bool]:
        """Publish and record, and keep the snapshots with the records; what is to be held is kept in the state store.

        False for a message that is not ours any more or whose job has a record already.
        """

    async def release(self, messages: Sequence[Outgoing], snapshots: Sequence[StoredSnapshot] = ()) -> list[bool]:
        """Publish and record jobs that were held. False for one that is not held any more."""

    async def settle(self, tags: Sequence[str]) -> None:
        """Forget arrivals that were answered in another way."""

    def abandon(self) -> None:
        """Before the next take, return to the arrivals all that was taken and not answered; after any failure."""

    async def retire(self) -> None:
        """Return to the arrivals what was taken and not answered, and take nothing more; forwarding goes on."""

    async def tidy(self) -> int:
        """Show that this router lives, and put back what dead ones had in flight; how many messages."""

    async def misdirected(self) -> list[Arrival]:
        """Requests that plain Celery sent to its default queue, where the broker can show them without taking them."""

    async def forget(self, misdirected: Sequence[Arrival]) -> None:
        """Take these out of that queue; what else is there stays as it is."""

    async def announce(self, routing_key: str, event: bytes) -> None:
        """Publish a Celery event."""

    async def close(self) -> None:
        """Stop, leaving nothing taken behind."""


class QueueMover(Protocol):
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

    async def note_moves(self, moved: Sequence[Moved]) -> None:
        """Record moves for operators."""

    async def moves(self) -> list[Moved]:
        """The last moves of the fleet, the latest first."""

    async def put_back(self) -> None:
        """Return to their queues what `peek` took out of them."""

    async def close(self) -> None:
        """Disconnect."""


P = ParamSpec("P")
T = TypeVar("T")

_thread = ThreadPoolExecutor(1, "large bodies")


async def beside(size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The value of `call`, run beside the event loop if `size`, in bytes, is large. Raises what it raises.

    All run on one thread, so that the loop competes with one. Python's interpreter lock is released every 5 ms, but not
    during a call into C; what runs here is bounded so that no such call takes over 100 ms (`request.ELEMENTS`).
    """
    if size <= LARGE:
        return call(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, lambda: call(*args, **kwargs))
