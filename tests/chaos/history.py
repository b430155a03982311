"""What happened: an event a line of JSON, as they were seen. Times are this host's, since the epoch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Something that was seen at a time."""

    at: float = msgspec.field(default_factory=time.time)


class Submitted(Event, frozen=True, kw_only=True):
    """A producer began to ask for job `number`. `deadline` is in seconds, 0 for none."""

    number: int
    model: str
    deadline: float = 0.0
    key: str = ""


class Accepted(Event, frozen=True, kw_only=True):
    """A submit that was called at `began` returned at a door, `replicated` where that is what the door says."""

    number: int
    job: str
    door: str
    began: float
    replicated: bool = False


class Refused(Event, frozen=True, kw_only=True):
    """The submit failed for good; what it asked for may run all the same where that is `unclear`."""

    number: int
    error: str
    unclear: bool = False


class Cancelling(Event, frozen=True, kw_only=True):
    """A producer asked that the job does not run."""

    job: str


class Observed(Event, frozen=True, kw_only=True):
    """A producer was told at a door how the job ended. `answer` is the number that came, `digest` covers all."""

    job: str
    door: str
    state: str
    digest: str
    answer: int | None = None


class Unanswered(Event, frozen=True, kw_only=True):
    """A producer's wait for the job at a door ended without a result. `told` is the last error that it got."""

    job: str
    door: str
    told: str = ""


class Struck(Event, frozen=True, kw_only=True):
    """A fault began: what, and to whom. `skipped` says why it could not be."""

    fault: str
    target: str = ""
    skipped: str = ""


class Parted(Event, frozen=True, kw_only=True):
    """The store has failed over: what was written in the `window` seconds before may be lost."""

    window: float


class Ran(Event, frozen=True, kw_only=True):
    """A model ran job `number` to its end; when is not known."""

    number: int


class Stored(Event, frozen=True, kw_only=True):
    """The job as the state store has it once all is calm; times by the store's clock. `digest` is the result's."""

    job: str
    state: str
    digest: str
    answer: int | None = None
    accepted: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    deadline_at: float = 0.0


AnyEvent = Submitted | Accepted | Refused | Cancelling | Observed | Unanswered | Struck | Parted | Ran | Stored


class Recorder:
    """Appends events to a file. Any thread may."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._turn = threading.Lock()
        self._encode = msgspec.json.Encoder().encode

    def note(self, *events: AnyEvent) -> None:
        """Write them down now."""
        lines = b"".join(self._encode(event) + b"\n" for event in events)
        with self._turn:
            self._file.write(lines)

    def close(self) -> None:
        """Nothing is noted after this."""
        self._file.close()


def read_history(path: Path) -> Iterator[AnyEvent]:
    """The events in the file, the first first."""
    decode = msgspec.json.Decoder(AnyEvent).decode
    with path.open("rb") as lines:
        for line in lines:
            yield decode(line)
