"""What the stages share: the queues between them, one per type (deliveries, jobs, endings, pieces of answers).

Also the interfaces of stage 3, which the other stages and the heartbeat use. `stages.device` with `workers.executor`
implements them for a device of this machine, `workers.endpoints` for an endpoint.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from broker.valkey.worker_store import RunUpdate, WorkerStore
from tasks.heartbeat import EndpointFacts, Yieldable
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.models.sizes import size_of_row
from tasks.topology import HardwareClass
from taxiway.contract.keys import LEVELS, PATIENT
from taxiway.contract.stream import Piece
from taxiway.errors import TaxiwayError
from workers.drain import Drain
from workers.learned import DeviceVariants
from workers.port import Row
from workers.stages.held import HeldJobs
from workers.stages.job import REVOKED, CeleryWorker, Delivery, Ended, Ending, RunningJob, late

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

AHEAD = 2
"""Batches that wait, claimed and prepared, while one runs."""

AHEAD_FOR = 0.025
"""Seconds of work that may wait if batches are short, so that one fetch brings many."""

MAX_UNWRITTEN = 1024
"""Maximum unwritten endings before fetching pauses: about 50 ms of writes (benchmarks.queue_depth)."""

_SMOOTHING = 0.2  # of the rows of a job


class AdmitQueue:
    """Deliveries to be claimed when due. Any thread may put; the admit thread takes."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[tuple[float, Delivery] | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Delivery]] = []
        self._order = itertools.count()

    def put(self, delivery: Delivery, *, pause: float = 0.0) -> None:
        """Add a delivery that is due after `pause` seconds."""
        self._inbox.put((time.monotonic() + pause, delivery))

    def close(self) -> None:
        """End the queue: `take` returns once the queued deliveries are taken."""
        self._inbox.put(None)

    def take(self) -> list[Delivery]:
        """Wait for due deliveries and return them; may be empty after `close`."""
        wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        with contextlib.suppress(queue.Empty):
            got = self._inbox.get(timeout=wait)
            while got is not None:
                heapq.heappush(self._later, (got[0], next(self._order), got[1]))
                got = self._inbox.get_nowait()
        due = []
        while self._later and self._later[0][0] <= time.monotonic():
            due.append(heapq.heappop(self._later)[2])
        return due

    def rest(self) -> list[Delivery]:
        """Deliveries that are not due yet, in order of due time."""
        return [delivery for _, _, delivery in sorted(self._later)]


class DeviceQueue:
    """Place jobs on their way to the device. Any thread may put; the device thread takes.

    `rows` counts waiting rows, `patient` is the device seconds of patient ones, and `rows_a_job` the recent mean of
    rows per job. `clock` is the store's time minus this host's monotonic clock; admission sets it.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.patient = 0.0
        self.rows_a_job = 1.0
        self.clock = 0.0
        self._notify: Callable[[], None] = lambda: None
        self._jobs: list[RunningJob] = []
        self._changed = threading.Condition()

    def put(self, jobs: Sequence[RunningJob]) -> None:
        """Add jobs."""
        if not jobs:
            return
        with self._changed:
            rows = sum(len(job.rows) for job in jobs)
            self._jobs += jobs
            self.rows += rows
            self.patient += sum(job.patient for job in jobs)
            self.rows_a_job += _SMOOTHING * (rows / len(jobs) - self.rows_a_job)
            self._changed.notify_all()
        self._notify()

    def notify(self, call: Callable[[], None]) -> None:
        """Call this after each `put` and `wake` from now on."""
        self._notify = call

    def wake(self) -> None:
        """Wake all waiting threads to check again. Thread-safe."""
        with self._changed:
            self._changed.notify_all()
        self._notify()

    def take(self, longest: float, news: Callable[[], bool]) -> list[RunningJob]:
        """All queued jobs, waiting up to `longest` seconds for the first, or until `news`."""
        with self._changed:
            if longest > 0:
                self._changed.wait_for(lambda: bool(self._jobs) or news(), longest)
            jobs, self._jobs, self.rows, self.patient = self._jobs, [], 0, 0.0
        return jobs

    def wait_for(self, condition: Callable[[], bool], longest: float) -> None:
        """Wait until the condition holds, at most `longest` seconds; it is checked at each `put` and `wake`."""
        with self._changed:
            self._changed.wait_for(condition, longest)


class EndingQueue:
    """Endings to be written. Any thread may put; the finish thread takes.

    Bounded through `wait_until_short`: their claims must be renewed, and their messages cannot move.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Sequence[Ending] | None] = queue.SimpleQueue()
        self._unwritten = 0
        self._fewer = threading.Condition()
        self._collecting: tuple[int, list[Ending]] | None = None

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[Ending]]:
        """The endings that this thread puts meanwhile, which no other thread takes. For one thread at a time."""
        found: list[Ending] = []
        self._collecting = threading.get_ident(), found
        try:
            yield found
        finally:
            self._collecting = None

    def put(self, endings: Sequence[Ending]) -> None:
        """Add endings."""
        collecting = self._collecting
        if collecting is not None and collecting[0] == threading.get_ident():
            collecting[1].extend(endings)
        elif endings:
            with self._fewer:
                self._unwritten += len(endings)
            self._inbox.put(endings)

    def wake(self) -> None:
        """Make `take` return, even with nothing. Thread-safe."""
        self._inbox.put(())

    def close(self) -> None:
        """Mark the end of the queue."""
        self._inbox.put(None)

    def take(self) -> tuple[list[Ending], bool]:
        """Wait for endings and return all of them, and whether the queue has ended."""
        taken: list[Ending] = []
        got = self._inbox.get()
        while got is not None:
            taken += got
            try:
                got = self._inbox.get_nowait()
            except queue.Empty:
                return taken, False
        return taken, True

    def wrote(self, endings: int) -> None:
        """Note that this many of the taken endings are written."""
        with self._fewer:
            self._unwritten -= endings
            self._fewer.notify_all()

    def wait_until_short(self, longest: float) -> bool:
        """Wait up to `longest` seconds for fewer than `MAX_UNWRITTEN` unwritten; whether they are. Thread-safe."""
        with self._fewer:
            return self._fewer.wait_for(lambda: self._unwritten < MAX_UNWRITTEN, longest)


StreamPart = Piece | RunUpdate
"""What is new of a job while it runs."""


class PieceQueue:
    """Pieces of streamed answers, and updates of runs. Any thread may put; the stream thread takes.

    Those of a job's row that follow each other and arrive during a write are joined.
    """

    def __init__(self) -> None:
        self.closed = False
        self._waiting: dict[tuple[str, int], list[StreamPart]] = {}
        self._changed = threading.Condition()

    def put(self, pieces: Sequence[tuple[str, StreamPart]]) -> None:
        """Add jobs' next pieces."""
        with self._changed:
            self._add(pieces)
            self._changed.notify()

    def close(self) -> None:
        """Mark the end of the queue. Thread-safe."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def take(self) -> list[tuple[str, StreamPart]]:
        """Wait for pieces and return all of them with their jobs; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed)
            return self._taken()

    def put_back(self, pieces: Sequence[tuple[str, StreamPart]], *, pause: float) -> None:
        """Put unwritten pieces back, before newer ones, and wait `pause` seconds or until closed."""
        with self._changed:
            since = self._taken()
            self._add([*pieces, *since])
            self._changed.wait_for(lambda: self.closed, timeout=pause)

    def _taken(self) -> list[tuple[str, StreamPart]]:
        taken, self._waiting = self._waiting, {}
        return [(job, piece) for (job, _), pieces in taken.items() for piece in pieces]

    def _add(self, pieces: Sequence[tuple[str, StreamPart]]) -> None:
        for job, piece in pieces:
            before = self._waiting.setdefault((job, piece.row), [])
            joined = _joined(before[-1], piece) if before else None
            before[-1:] = [*before[-1:], piece] if joined is None else [joined]


def _joined(part: StreamPart, after: StreamPart) -> StreamPart | None:
    """Both as one; None if that does not work."""
    if isinstance(part, Piece):
        return part.joined(after) if isinstance(after, Piece) else None
    return part.joined(after) if isinstance(after, RunUpdate) else None


def ahead_of(hardware: HardwareClass) -> float:
    """Maximum seconds of patient work that a worker of the class holds before it runs."""
    return max(AHEAD * hardware.runs_at_most, 2 * AHEAD_FOR)


def patient_seconds(job: RunningJob, variants: DeviceVariants) -> float:
    """Estimated device seconds of a patient job; 0 for any other."""
    if job.ticket.level < PATIENT:
        return 0.0
    sizes = [item.size for item in job.items] or [_size(job, row) for row in job.rows]
    profile = variants.known(job.model, job.variant).profile
    return variants.pace(job.key) * profile.latency(len(sizes), sum(sizes) / len(sizes))


def _size(job: RunningJob, row: Row) -> int:
    """The estimated size of an unprepared row; an invalid row is rejected later."""
    with suppress(TaxiwayError, KeyError, TypeError, ValueError):
        return job.model.expected_size if job.model.size_unit == "tokens" else size_of_row(job.model, row)
    return job.model.expected_size


@dataclass(frozen=True, slots=True)
class Shared:
    """What the stages of a worker share: the queues between them, the jobs that they hold, the store, and Celery.

    `admissions` takes deliveries to be decoded, and claimed if they are not, or no longer; `endings` how jobs ended;
    `pieces` the pieces of streamed answers. `drain` is the time limit for work after `stop`.
    """

    admissions: AdmitQueue
    endings: EndingQueue
    pieces: PieceQueue
    store: WorkerStore
    held: HeldJobs
    celery: CeleryWorker
    drain: Drain
    seal_keys: SealKeys | None = None
    """Opens sealed inputs, and seals what becomes of them."""

    def may_run(self, job: RunningJob, now: float) -> bool:
        """Whether the job may run, by the store's time; if not, its end is passed on, or it is claimed again."""
        delivery = job.delivery
        if self.celery.is_revoked(delivery.job):
            self.endings.put([Ended(delivery, error=REVOKED)])
        elif job.deadline < now:
            self.endings.put([late(delivery, now)])
        elif delivery.lost:
            self.admissions.put(delivery)  # its next claim shows whether it was cancelled or runs elsewhere
        else:
            return not delivery.ended
        return False


class DeviceUse(Protocol):
    """What a device computes now, and has computed. Any thread may read it.

    `running` are the rows on the device now. Unless it says otherwise, rows run beside each other, and in no batches.
    """

    running: int

    def computed(self, now: float) -> float:
        """Seconds that the device has computed."""

    def batch_age(self, now: float) -> float:
        """Seconds for which the running batch has run, 0 if there is none."""
        return 0.0

    def occupied(self, now: float) -> float:
        """Device seconds that the running batch will still spend on rows of ended jobs."""

    def blocked(self, now: float) -> tuple[float, int]:
        """Seconds until the device takes work again, and the first level that does not wait; 0 if it takes some now."""

    def blocking(self, now: float) -> dict[str, float]:
        """Seconds that a job of each model may wait for a batch of another."""
        return {}


class DeviceDriver(Protocol):
    """Stage 3. Thread-safe, except for `warm_up` and `run`. What it says of itself is true of most devices.

    `use` is what it computes, and `variants` what the device runs. `ahead` is the maximum seconds of patient work that
    may wait here.
    """

    use: DeviceUse
    variants: DeviceVariants
    ahead: float

    @property
    def fault(self) -> str:
        """Why the device takes no work now, though its worker does; empty if it takes some."""
        return ""

    @property
    def resting(self) -> bool:
        """Whether it takes nothing for a moment, not even what was fetched just now."""
        return False

    def memory(self) -> tuple[str, bytes]:
        """A key of the state store and what to keep there of what was learned; empty if nothing is kept."""
        return "", b""

    @property
    def endpoint(self) -> EndpointFacts | None:
        """What is known of the endpoint that the device is; None for other devices."""
        return None

    @property
    def yieldable(self) -> tuple[Yieldable, ...]:
        """The running jobs that can yield."""

    def warm_up(self, models: Sequence[Model]) -> None:
        """Prepare the device for these models, before `run`."""

    def run(self) -> None:
        """Run admitted jobs until stopped, then finish what ends in time."""

    def run_alone(self, job: RunningJob) -> bool:
        """Run a job on the caller's thread, if it is short and nothing else is here; whether it was taken over."""
        return False

    def stop(self) -> None:
        """Run the jobs here that end in time, requeue the rest, and end."""

    def renew(self, catalogue: Catalogue, book: ProfileBook, *, warm: Sequence[Model]) -> None:
        """Switch to a new catalogue and profiles, and keep these models warm."""

    def wait_for_capacity(self, longest: float) -> int:
        """Wait until there is capacity for jobs, at most `longest` seconds; returns for how many."""

    def levels(self) -> int:
        """How many of a queue's priority levels, first ones first, may be fetched."""
        return LEVELS

    def hung(self, now: float) -> bool:
        """Whether the device counts as hung."""
