"""Events of a run, one JSON object a line, in the order observed. Times are this host's, since the epoch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """An event and its time."""

    at: float = msgspec.field(default_factory=time.time)


class Submitted(Event, frozen=True, kw_only=True):
    """A producer began to submit job `number`. `deadline` is in seconds, 0 for none."""

    number: int
    model: str
    deadline: float = 0.0
    key: str = ""


class Accepted(Event, frozen=True, kw_only=True):
    """A submit that began at `began` returned at an interface; `replicated` if the interface confirmed replication."""

    number: int
    job: str
    interface: str
    began: float
    replicated: bool = False


class Refused(Event, frozen=True, kw_only=True):
    """The submit failed permanently; if `unclear`, the job may run all the same."""

    number: int
    error: str
    unclear: bool = False


class CancelRequested(Event, frozen=True, kw_only=True):
    """A producer requested cancellation."""

    job: str


class Observed(Event, frozen=True, kw_only=True):
    """A producer learned at an interface how the job ended. `answer` is the result's number, `digest` covers it."""

    job: str
    interface: str
    state: str
    digest: str
    answer: int | None = None


class Unanswered(Event, frozen=True, kw_only=True):
    """A producer's wait for the job at an interface ended without a result. `error` is the last error that it got."""

    job: str
    interface: str
    error: str = ""


class FaultInjected(Event, frozen=True, kw_only=True):
    """A fault was injected into a target. `skipped` is the reason why it was not."""

    fault: str
    target: str = ""
    skipped: str = ""


class FailedOver(Event, frozen=True, kw_only=True):
    """The store failed over: writes of the last `window` seconds may be lost."""

    window: float


class Ran(Event, frozen=True, kw_only=True):
    """A model ran job `number` to its end, at an unknown time."""

    number: int


class Stored(Event, frozen=True, kw_only=True):
    """The job's record in the state store after the run; times by the store's clock. `digest` is the result's."""

    job: str
    state: str
    digest: str
    answer: int | None = None
    accepted: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    deadline_at: float = 0.0


class BatchRead(Event, frozen=True, kw_only=True):
    """How a batch that began at `began` ended; of its lines `answered` are in the output, and `missing` in no file.

    Of runs, `wrong` have another's answer, or lost or repeated a step. They went on from checkpoints `resumed` times;
    `yielded` of these they had been asked to yield.
    """

    status: str
    began: float
    lines: int
    answered: int = 0
    missing: int = 0
    repeated: int = 0
    wrong: int = 0
    resumed: int = 0
    yielded: int = 0


AnyEvent = (
    Submitted
    | Accepted
    | Refused
    | CancelRequested
    | Observed
    | Unanswered
    | FaultInjected
    | FailedOver
    | Ran
    | Stored
    | BatchRead
)


class Recorder:
    """Appends events to a file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._encode = msgspec.json.Encoder().encode

    def record(self, *events: AnyEvent) -> None:
        """Append events."""
        lines = b"".join(self._encode(event) + b"\n" for event in events)
        with self._lock:
            self._file.write(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(path: Path) -> Iterator[AnyEvent]:
    """The file's events, oldest first."""
    decode = msgspec.json.Decoder(AnyEvent).decode
    with path.open("rb") as lines:
        for line in lines:
            yield decode(line)
