"""A job inside a worker: its delivery, waiting rows and outcome. `CeleryWorker` is what the stages need of Celery."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from broker.valkey.jobs import Claim, Course, YieldRequest, exceeded
from broker.valkey.jobs import Ending as StoredEnding
from tasks.heartbeat import Yieldable, three_digits
from tasks.models.model import Model
from tasks.telemetry import ParentSpan
from tasks.ticket import Ticket
from tasks.topology import HardwareClass
from taxiway.contract.job import GenerationPart, Result, RunProgress, Tokens
from taxiway.contract.limits import Buffer
from taxiway.contract.sealed import Sealed
from taxiway.contract.stream import NOTHING, CutGeneration
from taxiway.contract.wire import Envelope
from taxiway.errors import JobCancelledError, TaxiwayError
from workers.port import Item, Row


class Headers(msgspec.Struct, frozen=True):
    """The fields of Celery's headers needed for a plain job's events."""

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
    """A job that Celery's consumer received: Celery acknowledges and reports it. Thread-safe."""

    @property
    def followed(self) -> bool:
        """Whether other tasks follow it: a link, an errback, a chain or a chord."""

    def start(self) -> None:
        """Report that the job runs."""

    def finish(self, ended: Ended, token: str, written: StoredEnding | None) -> None:
        """Send the follow-up tasks, report the job's end, and acknowledge it.

        `written` is the ending in the store; without it, the result is stored now, under the fencing token.
        """

    def drop(self, error: TaxiwayError | None) -> None:
        """Acknowledge a job that ended elsewhere, with the error of its stored result, if it has one."""

    def revoke(self) -> None:
        """End the job as revoked."""

    def requeue(self) -> None:
        """Return the message to its queue."""

    def dead_letter(self, reason: str) -> None:
        """Keep a copy of the message among the dead letters."""


class Delivery(msgspec.Struct, eq=False):
    """A message that this worker holds: fetched from the class queue under `tag`, or received by Celery as a `task`."""

    job: str
    ticket: Ticket
    body: bytes
    content_type: str
    received: float
    """Seconds since the epoch on this host's clock, for events."""
    hardware_class: str
    """The class of its queue, whose part of the ticket applies."""
    tag: str = ""
    headers: Headers | None = None
    task: CeleryTask | None = None
    parent: ParentSpan | None = None
    """Its trace context."""
    claim: Claim | None = None
    """The store's latest answer."""
    since: float = 0.0
    """When the worker fetched it, on the monotonic clock."""
    lost: bool = False
    """The claim has ended since."""
    began: float = 0.0
    """Like `received`; 0 until the start."""
    started: float = 0.0
    """The start on the store's clock."""
    retries: int = 0
    """Its runs after device faults."""
    tenant: str = ""
    """Known once the request was read."""
    sealed: Sealed | None = None
    """Its inputs as they came, if they were sealed: what becomes of them is sealed with the same keys."""
    start_stored: bool = False
    """The store has recorded the start."""
    ended: bool = False
    progress: RunProgress | None = None
    """What its callable last reported."""
    yields: YieldRequest | None = None
    """A request to keep what is done and return the job: it ends with `Returned(…, counts=False)` once that is kept."""
    yield_by: float = math.inf
    """By then, on the monotonic clock. A job that cannot yield ignores it."""

    def asked_to_yield(self, request: YieldRequest) -> None:
        """Note a request, unless there is one."""
        if self.yields is None:
            self.yield_by = time.monotonic() + request.seconds
            self.yields = request

    @property
    def token(self) -> str:
        """The fencing token of its claim; empty without a claim."""
        return self.claim.token if self.claim is not None else ""

    @property
    def deadline_at(self) -> float:
        """The earlier deadline of its message and its record, on the store's clock; 0 if it has none."""
        recorded = self.claim.deadline_at if self.claim is not None else 0.0
        return min(filter(None, (self.ticket.deadline_at, recorded)), default=0.0)

    def yieldable(self, run: float, left: float, redo: float, *, cuts: int, kind: str = "") -> Yieldable:
        """The job as one that can yield; the seconds are as there."""
        seconds = (three_digits(run), three_digits(left), three_digits(redo))
        return Yieldable(self.job, self.token, self.tag, self.ticket.level, self.deadline_at, *seconds, cuts, kind)

    @property
    def suspect(self) -> bool:
        """Whether a worker crashed while it held the job, which may be the cause."""
        return self.claim is not None and self.claim.blamed > 0


class RunTimes(msgspec.Struct):
    """Seconds of a job's runs, and notes on its checkpoints."""

    before: float | None = None
    """Those before its present claim; None until read."""
    ran: float = 0.0
    """Those since."""
    useful: float = 0.0
    """The part of both that led to its answers."""
    yields: int = 0
    """How many earlier ones yielded."""
    notes: list[str] = []

    def add(self, seconds: float, *, resumed: float | None) -> None:
        """A row ran for so long, from a checkpoint that had `resumed` seconds of it; None if it has no answer."""
        self.ran += seconds
        self.useful += 0.0 if resumed is None else resumed + seconds

    @property
    def redone(self) -> float:
        """Seconds of work that was lost and done again."""
        return round(max(0.0, (self.before or 0.0) + self.ran - self.useful), 3)


class TextRun(msgspec.Struct, eq=False):
    """A job's answer, as far as it is one plain text: what earlier runs kept of it, and what this run makes of it."""

    seed: int | None = None
    kept: CutGeneration = NOTHING
    """What earlier runs left."""
    seam: str = ""
    """How this run went on from the one before."""
    text: str = ""
    """The answer so far."""
    tokens: int = 0
    """Its length."""
    part: GenerationPart | None = None
    """This run, once it ended or was kept last."""

    @property
    def parts(self) -> tuple[GenerationPart, ...]:
        """All runs so far."""
        return self.kept.parts if self.part is None else (*self.kept.parts, self.part)

    def restart(self, reason: str) -> None:
        """Begin the answer again."""
        self.kept, self.seam = msgspec.structs.replace(self.kept, text="", tokens=0), f"restarted: {reason}"

    def cut(self, attempt: int, reason: str) -> CutGeneration:
        """What to keep, if this run ends here for this reason; nothing is added by a run that did not begin."""
        if self.part is None:
            return msgspec.structs.replace(self.kept, attempt=attempt)
        parts = (*self.kept.parts, msgspec.structs.replace(self.part, ended=reason))
        return CutGeneration(attempt, self.text, self.tokens, self.seed, parts)


Urgency = tuple[int, float, float]
"""A job's priority level, deadline and arrival: the lowest goes first."""


class RunningJob(msgspec.Struct, eq=False):
    """A job in the device stage; only who has the device's turn changes it."""

    delivery: Delivery
    hardware: HardwareClass
    """The class that it runs for."""
    model: Model
    variant: str
    key: str
    """Names the variant."""
    rows: tuple[Row, ...]
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]
    single: bool
    arrived: float
    deadline: float = math.inf
    """On the store's clock, infinite if there is none."""
    items: list[Item] = []
    waiting: dict[int, list[int]] = {}
    """Indices of rows that are in no batch, by size bucket."""
    answers: list[Row | None] = []
    # Seconds, in all
    load_time: float = 0.0
    """Of waiting for loads."""
    run_time: float = 0.0
    device_time: float = 0.0
    batch: int = 0
    """Rows of its largest batch."""
    tokens: Tokens | None = None
    """Of rows that ran on an endpoint."""
    billed: float = 0.0
    """US dollars for the use of an endpoint."""
    stream: bool = False
    """The answer is streamed to the client."""
    patient: float = 0.0
    """Estimated device seconds of a patient job, 0 of any other."""
    generation: TextRun | None = None
    """Its answer, where that can be cut and go on."""
    times: RunTimes = msgspec.field(default_factory=RunTimes)
    """Of the runs of a callable that has a `Run`."""
    yielded: bool = False
    """It returns to its queue, to go on from its checkpoint."""

    @property
    def ticket(self) -> Ticket:
        """The router's ticket."""
        return self.delivery.ticket

    @property
    def urgency(self) -> Urgency:
        """Sort key of jobs, most urgent first."""
        return self.ticket.level, self.deadline, self.arrived

    @property
    def attempt(self) -> int:
        """The number of the job's claims, including this one."""
        return int(self.delivery.token.rpartition("#")[2])

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return None not in self.answers

    @property
    def outstays(self) -> bool:
        """Whether it runs a callable that has a `Run`, and has not yielded in time."""
        asked = self.delivery.yields is not None and self.times.before is not None
        return asked and time.monotonic() >= self.delivery.yield_by

    def lacks(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has no answer."""
        return any(self.answers[row] is None for row in rows)


class Ended(msgspec.Struct, frozen=True):
    """How a job ended: with a result or an error.

    It is written under the claim of its delivery; without a claim, it ends the job whatever its holder.
    """

    delivery: Delivery
    result: Result | None = None
    """In plain values; `meta` is its stored form."""
    error: TaxiwayError | None = None
    meta: bytes = b""
    rows: int = 1
    """Of the request."""
    billed: float = 0.0
    """The part of the cost that is for the use of an endpoint, in US dollars."""
    generated: tuple[int, ...] = ()
    """Tokens of each generated answer."""
    blobs: Mapping[str, Buffer] = {}
    """The values that the result references."""

    def unwrap(self) -> Any:
        """The result in the form that Celery passes on; raises the error if the job failed."""
        if self.error is not None:
            raise self.error
        return msgspec.to_builtins(self.result)


class Dropped(msgspec.Struct, frozen=True):
    """A delivery of a job that has already ended: it is only acknowledged."""

    delivery: Delivery


class Returned(msgspec.Struct, frozen=True):
    """A delivery that its device could not run to its end: it returns to its queue, and runs elsewhere or later.

    With `counts` the run counts as one of the job's attempts. What is `kept` of its answer is stored before.
    """

    delivery: Delivery
    counts: bool
    kept: CutGeneration | None = None


class Used(msgspec.Struct, frozen=True):
    """What a row of a delivery used of an endpoint, however it ended."""

    delivery: Delivery
    tokens: Tokens
    # US dollars for the tokens, and for the time
    dollars: float
    time_dollars: float
    # Seconds until the first part of the answer, and for each further token; None if unknown
    first: float | None
    each: float | None
    aborted: bool
    """Its connection was closed before the answer."""
    excess: int = 0
    """Tokens that the endpoint counted beyond what the request may have; they are in no other figure."""


Ending = RunningJob | Ended | Dropped | Returned | Used
"""What became of a delivery; a `RunningJob` is one whose rows all have their answers."""


REVOKED = JobCancelledError("the job was revoked")
"""The error of an ending of a job that Celery's remote control revoked."""


def late(delivery: Delivery, now: float) -> Ended:
    """The ending of a job whose deadline has passed; `now` is on the store's clock."""
    ticket = delivery.ticket
    started = delivery.started if delivery.began else 0.0
    course = Course(now, delivery.deadline_at, ticket.accepted, delivery.hardware_class, started=started)
    return Ended(delivery, error=exceeded(course))


def taken(delivery: Delivery, now: float, *, expired: bool) -> float:
    """Seconds from a job's placement to its end, `now` on this host's clock; of an expired one, at least so many."""
    assert delivery.ticket.promise is not None
    since = delivery.deadline_at if expired else delivery.started + now - delivery.began
    return since - delivery.ticket.promise.placed


class CeleryWorker(Protocol):
    """Celery's consumer, remote control and events. Thread-safe."""

    def queues(self) -> Sequence[str]:
        """The class queues that the worker consumes now."""

    def receive(self, envelope: Envelope, body: bytes, *, tag: str, queue: str) -> None:
        """Pass Celery's consumer a message of a class queue that it must handle itself: a canvas, an eta.

        Celery acknowledges it under `tag`.
        """

    @property
    def receiving(self) -> int:
        """How many messages passed to `receive` the consumer has not processed yet."""

    def tags(self) -> list[str]:
        """The tags of messages that it received and has not acknowledged."""

    def is_revoked(self, job: str) -> bool:
        """Whether remote control revoked the job."""

    def report_end(self, ended: Ended) -> None:
        """Report to Celery's tools how a plain job ended here."""

    def report_release(self, delivery: Delivery, error: TaxiwayError | None = None) -> None:
        """Report that a plain job left the worker unfinished; `error` is from its stored result, if any."""

    def flush_events(self) -> None:
        """Send pending task events. Finish thread only."""

    def flush_full_group(self) -> None:
        """Send pending task events if they fill a group. Finish thread only."""

    def exit(self, status: int) -> None:
        """Start the worker's warm shutdown, with this exit status."""
