"""Runs batches on the device: whole, or row by row in the process of a Python callable.

What callables report goes to the store, and so do their checkpoints, from which they go on. A job's claim covers that:
what a worker writes after it lost the claim is refused.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import numpy as np

from broker.valkey.worker_store import RunUpdate, insist
from tasks.heartbeat import Yieldable
from taxiway.backoff import Outage
from taxiway.contract.job import RunProgress
from taxiway.contract.keys import blob_key
from taxiway.contract.limits import Buffer
from taxiway.errors import BrokerUnavailableError
from workers.calling.channel import CallYieldedError
from workers.calling.child import FollowedRun
from workers.decide.checkpoints import (
    Checkpoint,
    Resuming,
    checksum,
    damaged,
    left,
    over_limit,
    read_checkpoint,
    unusable,
)
from workers.decide.occupation import BATCHES, Occupation, blocking_by_model
from workers.executor import Answer, Executor, run_rows, time_limit
from workers.learned import Loaded
from workers.port import Interruptible, RowWatch
from workers.stages.job import RunningJob, RunTimes
from workers.stages.lane import Portions, RowRate
from workers.stages.queues import Shared

logger = logging.getLogger(__name__)

UPDATE_EVERY = 0.25
"""Seconds between two updates of a run that reports."""

SIGN_EVERY = 1.0
"""Seconds between two updates of a run that does not: no more is unknown of what a lost worker did."""

MOST_NOTES = 4
"""Most notes on a job's checkpoints."""

_decode_report = msgspec.json.Decoder(tuple[float, str, Any]).decode


def _unread() -> Outage:
    return Outage(logger, "cannot read checkpoints")


class RowRun(FollowedRun):
    """The run of one row, from now on. Only who has the device's turn."""

    def __init__(self, shared: Shared, job: RunningJob, row: Resuming, expected: float) -> None:
        self._shared, self._job, self._row, self._expected = shared, job, row, expected
        self._began = time.monotonic()
        self._saved: Checkpoint | None = None
        self._transfer = 0.0  # seconds to write the last checkpoint
        self._ends = math.inf  # on the monotonic clock, by its reports
        self._sent = -math.inf
        self._new: RunProgress | None = None
        self._fraction = 0.0
        self._first: tuple[float, float] | None = None  # when the first report came, and its fraction
        self.resumed = 0.0  # useful seconds of the checkpoint that it goes on from

    @property
    def times(self) -> RunTimes:
        """Those of its job."""
        return self._job.times

    @property
    def seconds(self) -> float:
        """For how long it runs."""
        return time.monotonic() - self._began

    @property
    def useful(self) -> float:
        """Seconds that led to where it is, those of earlier runs included."""
        return self.resumed + self.seconds

    @property
    def yield_asked(self) -> bool:
        """Whether the worker leaves, or was asked to let another job run."""
        return self._shared.drain.begun or self._job.delivery.yields is not None

    @property
    def yieldable(self) -> Yieldable | None:
        """What it would cost to yield now; None if it cannot, or is not to. Thread-safe."""
        delivery, saved = self._job.delivery, self._saved
        if saved is None or not delivery.ticket.preemptible or delivery.lost or delivery.yields is not None:
            return None
        useful, left = self.useful, self._ends - time.monotonic()
        if not 0.0 < left < math.inf:  # it reports too seldom to tell
            left = max(self._expected - useful, useful)
        redo = self.times.ran + max(useful - saved.useful, 0.0) + 2 * self._transfer  # it is also read again
        return delivery.yieldable(useful, left, redo, cuts=self.times.yields, kind=saved.kind)

    def resume(self, checkpoint: Checkpoint, content: Buffer) -> None:
        """Go on from a checkpoint."""
        self._saved = checkpoint
        self.restored = checkpoint.form, np.frombuffer(content, np.uint8)
        self.resumed, self._fraction = checkpoint.useful, checkpoint.fraction
        self.note(f"resumed from a checkpoint at {checkpoint.fraction:.0%}, {checkpoint.useful:.3g} s of work")

    def look(self, report: bytes) -> None:
        """Take note of the latest report, and send an update if one is due."""
        now = time.monotonic()
        if report and self._job.delivery.sealed is None:
            self._new = self._read(report, now)
        if now - self._sent >= (SIGN_EVERY if self._new is None else UPDATE_EVERY):
            delivery = self._job.delivery
            update = RunUpdate(delivery.token, self._ran, self._new, celery=not delivery.ticket.reply)
            self._shared.pieces.put([(delivery.job, update)])
            self._sent, self._new = now, None

    def keep(self, form: str, content: memoryview, *, portable: bool) -> bool:
        """Keep a checkpoint under the job's claim; whether that was done."""
        job, row = self._job.delivery, self._row
        if job.sealed is not None:
            return self._refuse("its job is sealed")
        if content.nbytes > row.most:
            return self._refuse(over_limit(content.nbytes, row.most))
        checkpoint = Checkpoint(
            key=blob_key(uuid.uuid4().hex),
            job=row.job,
            row=row.row,
            form=form,
            size=content.nbytes,
            checksum=checksum(content),
            digest=row.digest,
            kind="" if portable else row.kind,
            useful=self.useful,
            fraction=self._fraction,
        )
        facts = msgspec.json.encode(checkpoint)
        store, key, began = self._shared.store, checkpoint.key, time.monotonic()
        try:
            kept = store.keep_checkpoint(job.job, job.token, key, content, facts, self._ran)
        except BrokerUnavailableError as error:
            return self._refuse(error.message)
        job.lost = job.lost or not kept  # else the job has ended, or runs elsewhere
        if kept:
            self._saved, self._transfer = checkpoint, time.monotonic() - began
        return kept

    def note(self, text: str) -> None:
        """Have the job's report say this."""
        logger.info("checkpoint", extra={"job": self._row.job, "note": text})
        if text not in self.times.notes and len(self.times.notes) < MOST_NOTES:
            self.times.notes.append(text)

    @property
    def _ran(self) -> float:
        """Seconds of all runs of the job."""
        return (self.times.before or 0.0) + self.times.ran + self.seconds

    def _refuse(self, why: str) -> bool:
        self.note(f"refused a checkpoint: {why}")
        return False

    def _read(self, report: bytes, now: float) -> RunProgress:
        """The job's progress; the rows before this one are done."""
        fraction, message, found = _decode_report(report)
        self._fraction = (self._row.row + fraction) / len(self._job.rows)
        if self._first is None:
            self._first = now, self._fraction
        since, first = self._first
        seconds = left(self._fraction, now - since, first)
        self._ends = math.inf if seconds is None else now + seconds
        self._job.delivery.progress = RunProgress(fraction=self._fraction, message=message, partial=found, left=seconds)
        return self._job.delivery.progress


class BatchUse:
    """What the device computes now, and has computed. Any thread may read it; only who has its turn changes it.

    Args:
        wanted: whether a job's rows may continue.
        longest: seconds for which the class's batches run at most.
    """

    def __init__(self, wanted: Callable[[RunningJob], bool], longest: float) -> None:
        self._wanted = wanted
        self._longest = longest
        self.running = 0
        self.busy = 0.0  # seconds of finished batches
        self.must_end_by = math.inf
        self.rate = RowRate()
        self._since: float | None = None
        self._beside = 0.0  # seconds of batches that ran beside a row in its own process
        self._whole: tuple[Occupation, Portions] | None = None
        self._batches: deque[tuple[float, str, float]] = deque(maxlen=BATCHES)

    def computed(self, now: float) -> float:
        """Seconds that the device has computed, including the running batch."""
        return self.busy + self.batch_age(now)

    def batch_age(self, now: float) -> float:
        """Seconds for which the running batch has run, 0 if there is none."""
        since = self._since
        return max(now - since, 0.0) if since is not None else 0.0

    def occupied(self, now: float) -> float:
        """Device seconds that the running batch will still spend on rows of ended jobs."""
        whole = self._whole
        if whole is None:
            return 0.0
        occupation, batch = whole
        unwanted = sum(len(rows) for job, rows in batch if not self._wanted(job))
        return occupation.left(now, unwanted / sum(len(rows) for _, rows in batch))

    def blocked(self, now: float) -> tuple[float, int]:
        """Seconds until a long, uninterruptible batch ends, and its most urgent level; 0 if there is none."""
        whole = self._whole
        if whole is None or not whole[0].longer_than(self._longest, now):
            return 0.0, 0
        levels = [job.ticket.level for job, _ in whole[1] if self._wanted(job)]
        return (whole[0].ends_in(now), min(levels)) if levels else (0.0, 0)  # ended jobs count in `occupied`

    def blocking(self, now: float) -> dict[str, float]:
        """Seconds that a job of each model may wait for a batch of another."""
        return blocking_by_model(reversed(tuple(self._batches)), now)

    @contextmanager
    def batch(self, rows: int) -> Iterator[Callable[[], float]]:
        """A batch runs within; then the call gives its seconds, without those of batches that ran beside it."""
        started, beside, seconds = time.monotonic(), self._beside, 0.0
        self._since, self.running = started, rows
        yield lambda: seconds
        seconds = time.monotonic() - started - (self._beside - beside)
        self.running, self.must_end_by = 0, math.inf
        self.busy, self._since = self.busy + seconds, None
        self.rate.count(rows, started + seconds)

    @contextmanager
    def whole(self, model: str, batch: Portions, predicted: float) -> Iterator[None]:
        """The batch cannot be interrupted within."""
        now = time.monotonic()
        self._whole = Occupation(now, predicted), batch
        try:
            yield
        finally:
            self._whole = None
            self._batches.append((now, model, time.monotonic() - now))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Other batches run within, while a row goes on in its own process."""
        started, outer = time.monotonic(), (self.running, self.must_end_by, self._since)
        yield
        seconds = time.monotonic() - started
        self._beside += seconds
        self.running, self.must_end_by, self._since = outer[0], outer[1] + seconds, outer[2]


class DeviceRunner:
    """Runs batches on the executor.

    Args:
        wanted: whether a job's rows may continue.
        serve_beside: runs due batches that are more urgent than the job, while its row runs in its own process.
        stopping: once it is set, an unavailable store is not waited for any more.
    """

    def __init__(
        self,
        executor: Executor,
        use: BatchUse,
        shared: Shared,
        *,
        wanted: Callable[[RunningJob], bool],
        serve_beside: Callable[[RunningJob], None],
        stopping: threading.Event,
    ) -> None:
        self._executor, self._use, self._shared = executor, use, shared
        self._wanted, self._serve_beside, self._stopping = wanted, serve_beside, stopping
        self._stall = shared.store.limits.stall  # seconds beyond its time limit after which a batch counts as hung
        self._fault: Exception | None = None
        self._running: RowRun | None = None
        self.calling = False  # a row runs in its own process: no model changes

    def run(self, loaded: Loaded, batch: Portions) -> Sequence[Answer]:
        """The answers to the rows of a batch; None for a row that was interrupted."""
        if loaded.interruptible is not None:
            return self._run_rows(loaded, loaded.interruptible, batch)
        items = [job.items[row] for job, rows in batch for row in rows]
        self._use.must_end_by = time.monotonic() + self._stall + time_limit(loaded, items)
        with self._use.whole(loaded.model.id, batch, self._executor.predicted(loaded, items)):
            return self._executor.run(loaded, items)

    def _run_rows(self, loaded: Loaded, runtime: Interruptible, batch: Portions) -> Sequence[Answer]:
        """Run the batch row by row, each while it is wanted."""
        rows = [(job.items[row], self._watch(loaded, job, row)) for job, rows in batch for row in rows]
        self._use.must_end_by = time.monotonic() + sum(watch.seconds for _, watch in rows) + self._stall
        self.calling = loaded.in_use = True  # a load beside it must evict other variants
        answers = run_rows(self._executor, loaded, runtime, rows)
        self.calling = loaded.in_use = False
        if self._fault is not None:  # from a batch that ran beside it: a fault of this process, not of the row
            raise self._fault
        return answers

    def _watch(self, loaded: Loaded, job: RunningJob, row: int) -> RowWatch:
        longest, named = loaded.variant.limits.time, "limits.time in its model.yaml"
        if longest is None:
            longest, named = self._stall + time_limit(loaded, [job.items[row]]), "limits.stall in queues.yaml, and more"
        run = partial(self._followed, job, row, self._executor.predicted(loaded, [job.items[row]]))
        return RowWatch(job.delivery.job, partial(self._goes_on, job), longest, named, run)

    def _goes_on(self, job: RunningJob) -> bool:
        """Whether the job's running row may continue; runs more urgent batches first."""
        try:
            if not job.delivery.suspect:  # else it runs alone
                with self._use.beside():
                    self._serve_beside(job)
        except Exception as error:  # raised here, it would count as the row's error
            self._fault = error
        job.yielded = job.yielded or job.outstays
        return self._fault is None and not job.yielded and self._wanted(job)

    @property
    def yieldable(self) -> tuple[Yieldable, ...]:
        """The run, if it would yield. Thread-safe."""
        run = self._running
        return () if run is None or (described := run.yieldable) is None else (described,)

    @contextmanager
    def _followed(self, job: RunningJob, row: int, expected: float, digest: str) -> Iterator[FollowedRun]:
        """The row runs within, by a callable of this digest: from the last usable checkpoint, if there is one.

        It is expected to take so many seconds in all.
        """
        wanted = Resuming(
            job.delivery.job, row, digest, self._executor.device.kind, self._shared.store.limits.checkpoint
        )
        run = RowRun(self._shared, job, wanted, expected)
        answered = False
        try:
            self._resume(run, wanted)
            self._running = run
            yield run
            answered = True
        except CallYieldedError:
            job.yielded = True
            raise
        finally:
            self._running = None
            job.times.add(run.seconds, resumed=run.resumed if answered else None)

    def _resume(self, run: RowRun, wanted: Resuming) -> None:
        """Have the run go on from the last usable checkpoint, and say which were refused."""
        try:
            earlier = insist(lambda: self._shared.store.earlier_runs(wanted.job), self._stopping, _unread())
            if run.times.before is None:
                run.times.before, run.times.yields = earlier.ran, earlier.yields
                if earlier.yielded:
                    run.note(earlier.yielded)
            for checkpoint in map(read_checkpoint, earlier.checkpoints):
                if isinstance(checkpoint, str):
                    run.note(f"refused a checkpoint: {checkpoint}")
                elif checkpoint.row == wanted.row and self._resumed(run, checkpoint, wanted):
                    return
        except BrokerUnavailableError:  # the worker stops
            return

    def _resumed(self, run: RowRun, checkpoint: Checkpoint, wanted: Resuming) -> bool:
        """Whether the run goes on from this checkpoint."""
        content, why = None, unusable(checkpoint, wanted)
        if not why:
            content = insist(lambda: self._shared.store.checkpoint(checkpoint.key), self._stopping, _unread())
            why = damaged(checkpoint, content)
        if why or content is None:
            run.note(f"refused a checkpoint: {why}")
            return False
        run.resume(checkpoint, content)
        return True
