"""A job inside a worker: how its message came, which of its rows still wait, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from broker.valkey.claims import Claim
from broker.valkey.deadlines import Course, exceeded
from broker.valkey.endings import Ending as StoredEnding
from tasks.models.catalogue import Model
from tasks.ticket import Ticket
from tasks.topology import HardwareClass
from tasks.tracing import Trail
from taxiway.contract.blobs import Buffer
from taxiway.contract.job import Result
from taxiway.errors import TaxiwayError
from workers.pipelines import Item, Row


class Headers(msgspec.Struct, frozen=True):
    """What Celery's headers say of a plain job: enough for its events."""

    id: str
    task: str
    taxiway: str
    root_id: str | None = None
    parent_id: str | None = None
    argsrepr: str | None = ""
    kwargsrepr: str | None = ""
    shadow: str | None = None
    eta: str | None = None
    compression: str | None = None
    stamped_headers: list[str] | None = None
    traceparent: Any = None
    tracestate: Any = None


class CeleryTask(Protocol):
    """A job whose message Celery's consumer received: Celery acknowledges it and reports it. Any thread may call."""

    @property
    def followed(self) -> bool:
        """Whether other tasks follow from it: a link, an errback, a chain or a chord."""

    def start(self) -> None:
        """Report that the job runs."""

    def finish(self, outcome: Outcome, token: str, written: StoredEnding | None) -> None:
        """Send what follows from the job, report its end, and acknowledge it.

        `written` is the end that the store has; without it, the result is stored now, under the fencing token.
        """

    def drop(self, error: TaxiwayError | None) -> None:
        """Acknowledge a job that ended elsewhere, with the error of its stored result, if it has one."""

    def revoke(self) -> None:
        """End the job as revoked."""

    def requeue(self) -> None:
        """Return the message to its queue."""

    def dead_letter(self, reason: str) -> None:
        """Keep a copy of the message among the dead letters."""


@dataclass(slots=True, eq=False)
class Delivery:
    """One message that this worker holds: taken from the class queue under `tag`, or received by Celery as a `task`.

    `hardware_class` is the one whose queue it came from: it runs by that class's part of the ticket. `claim` is the
    store's latest answer, and `lost` says that the claim has ended since. `since` is when the worker took it, by the
    monotonic clock. `received` and `began` are seconds since the epoch by this host's clock, for events; `started` is
    the start by the store's clock. `began` is 0 until then. `trail` is the trace that it is part of. `retries` counts
    its runs after device faults. `start_stored` says that the store knows of the start.
    """

    job: str
    ticket: Ticket
    body: bytes
    content_type: str
    received: float
    tag: str = ""
    hardware_class: str = field(kw_only=True)
    headers: Headers | None = None
    task: CeleryTask | None = None
    trail: Trail | None = None
    claim: Claim | None = None
    since: float = 0.0
    lost: bool = False
    began: float = 0.0
    started: float = 0.0
    retries: int = 0
    start_stored: bool = False
    ended: bool = False

    @property
    def token(self) -> str:
        """The fencing token of its claim; empty where it has none."""
        return self.claim.token if self.claim is not None else ""

    @property
    def suspect(self) -> bool:
        """Whether a worker ended while it held the job: the job may be why."""
        return self.claim is not None and self.claim.claims > 1


@dataclass(slots=True, eq=False)
class Job:
    """A job whose rows wait, run or are answered; only the device thread changes it.

    `hardware` is the class that it runs for, `key` names the variant. `deadline` is by the store's clock, infinite
    where there is none. `waiting` maps a size bucket to the indices of rows that no batch took. With `stream` the
    client reads the answer as it is generated.
    """

    delivery: Delivery
    hardware: HardwareClass
    model: Model
    variant: str
    key: str
    rows: tuple[Row, ...]
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]
    single: bool
    arrived: float
    deadline: float = math.inf
    items: list[Item] = field(default_factory=list)
    waiting: dict[int, list[int]] = field(default_factory=dict)
    answers: list[Row | None] = field(default_factory=list)
    run_time: float = 0.0
    device_time: float = 0.0
    batch: int = 0
    stream: bool = False

    @property
    def ticket(self) -> Ticket:
        """The router's order."""
        return self.delivery.ticket

    @property
    def attempt(self) -> int:
        """How many claims the job has had, with the present one."""
        return int(self.delivery.token.rpartition("#")[2])

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return None not in self.answers


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: with a result in plain values, and `meta`, its form in the store; or with an error.

    `generated` is the length of each answer that a model generated, in tokens; `blobs` are the values that the result
    refers to, and `rows` counts the request's.
    """

    result: Result | None = None
    error: TaxiwayError | None = None
    meta: bytes = b""
    rows: int = 1
    generated: tuple[int, ...] = ()
    blobs: Mapping[str, Buffer] = field(default_factory=dict)

    def unwrap(self) -> Any:
        """The result as Celery passes it on; raises the error where that is how it ended."""
        if self.error is not None:
            raise self.error
        return msgspec.to_builtins(self.result)


@dataclass(frozen=True, slots=True)
class Answered:
    """A job whose rows all have their answers."""

    job: Job

    @property
    def delivery(self) -> Delivery:
        """Its message."""
        return self.job.delivery


@dataclass(frozen=True, slots=True)
class Ended:
    """A delivery and its outcome, written under its claim; without a claim, the job ends whoever holds it."""

    delivery: Delivery
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Dropped:
    """A delivery of a job that has already ended: it is only acknowledged."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Revoked:
    """A delivery of a job that Celery's remote control revoked."""

    delivery: Delivery


Ending = Answered | Ended | Dropped | Revoked


def late(delivery: Delivery, now: float) -> Ended:
    """The end of a job whose deadline has passed; `now` is by the store's clock."""
    ticket = delivery.ticket
    started = delivery.started if delivery.began else 0.0
    course = Course(now, ticket.deadline_at, ticket.accepted, delivery.hardware_class, started=started)
    return Ended(delivery, Outcome(error=exceeded(course)))
