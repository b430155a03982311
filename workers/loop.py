"""The device thread: collects jobs, lets their rows form batches, claims them, runs them, and says how each ended."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence

from tasks.facts import variant_key
from tasks.scripts import Claim, Verdict
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    DeadlineExceededError,
    ExecutionError,
    TaxiwayError,
)
from workers.batcher import BatchPolicy
from workers.executor import Executor, Loaded
from workers.intake import gather, prepare
from workers.lane import Lane, Portions
from workers.pipelines import Item, Row
from workers.report import Batch, answer_of, generated_by, note
from workers.store import Store, insist
from workers.strategy import bury
from workers.work import Delivery, Dropped, Ended, Ending, Job, Outcome, Revoked

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 5
"""Claims of one job after which it is given up: it has ended as many workers."""

LOOK_AGAIN = 1.0
"""Longest pause, in seconds, before a job that another worker holds is looked at again."""

STALL = 20.0
"""A batch that takes this many times what its profile says, and `STALL_AT_LEAST` besides, counts as hung."""

STALL_AT_LEAST = 120.0
"""Seconds; first uses compile, and the longest generations take minutes."""

_IDLE = 60.0  # seconds; any arrival ends the wait
_WAKE = None


class DeviceLoop:
    """One device's jobs, from intake to outcome.

    Args:
        end: takes what ended; called on the device thread.
        accepted: told of each delivery whose batch is about to run.
        revoked: whether Celery's remote control revoked a job.

    `running` counts the rows on the device now, `busy` the seconds that it has computed.
    """

    def __init__(
        self,
        executor: Executor,
        store: Store,
        hardware_class: str,
        *,
        end: Callable[[Sequence[Ending]], None],
        accepted: Callable[[Sequence[Delivery]], None],
        revoked: Callable[[str], bool],
    ) -> None:
        self.executor = executor
        self.store = store
        self._hardware_class = hardware_class
        self._end = end
        self._accepted = accepted
        self._revoked = revoked
        self.running = 0
        self.busy = 0.0
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._later: list[tuple[float, int, Job]] = []
        self._turn = itertools.count()
        self._claimed: dict[Job, str] = {}
        self._stopping = threading.Event()
        self._must_end_by = math.inf

    def put(self, job: Job) -> None:
        """Hand a job over. Any thread may."""
        self._inbox.put(job)

    def stop(self) -> None:
        """End after the batch that runs now. Any thread may call it."""
        self._stopping.set()
        self._inbox.put(_WAKE)

    def claims(self) -> list[tuple[str, str]]:
        """Job and token of every claim that this device holds. Any thread may ask."""
        return [(job.delivery.job, token) for job, token in self._claimed.copy().items()]

    def hung(self, now: float) -> bool:
        """Whether the batch that runs now takes so long that it will not end. Any thread may ask."""
        return now > self._must_end_by

    def run(self) -> None:
        """Serve until stopped; then give back the claims of jobs that are not finished."""
        wait = 0.0
        while not self._stopping.is_set():
            self._collect(wait)
            lane, wait = self._next(time.monotonic())
            if lane is not None:
                self._serve(lane)
                wait = 0.0
        self._give_back()

    def _collect(self, wait: float) -> None:
        """Take in all jobs that came, waiting up to `wait` seconds for the first."""
        while self._later and self._later[0][0] <= time.monotonic():
            job = heapq.heappop(self._later)[2]
            job.arrived = time.monotonic()
            self._take_in(job)
        with contextlib.suppress(queue.Empty):
            got = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            while True:
                if got is not None:
                    self._take_in(got)
                got = self._inbox.get_nowait()

    def _take_in(self, job: Job) -> None:
        try:
            loaded = self.executor.load(job.model, job.variant)
            if not job.items:
                prepare(job, loaded)
        except TaxiwayError as error:
            self._end([Ended(job.delivery, Outcome(error=error))])
            return
        gather(job)
        for bucket in job.waiting:
            self._lane(loaded, bucket).add(job)

    def _lane(self, loaded: Loaded, bucket: int) -> Lane:
        key = (loaded.key, bucket)
        if key not in self._lanes:
            policy = BatchPolicy(self.executor.max_batch(loaded), self.executor.hardware.max_wait)
            self._lanes[key] = Lane(bucket, policy)
        return self._lanes[key]

    def _next(self, now: float) -> tuple[Lane | None, float]:
        """The lane whose batch runs now, or how long to wait for one."""
        waits = [(lane.due(now), lane) for lane in self._lanes.values() if lane]
        due = [lane for wait, lane in waits if wait <= 0]
        if due:
            return min(due, key=Lane.urgency), 0.0
        wait = min((wait for wait, _ in waits), default=_IDLE)
        if self._later:
            wait = min(wait, max(0.0, self._later[0][0] - now))
        return None, max(wait, 0.0001)

    def _serve(self, lane: Lane) -> None:
        batch = lane.take()
        try:
            batch = self._claim(batch)
        except BrokerUnavailableError:  # stopping while the store is away: the messages are delivered again
            return
        if batch:
            self._run(batch)
        lane.answered(time.monotonic())

    def _claim(self, batch: Portions) -> Portions:
        """The part of the batch that this device may run."""
        fresh = [job for job, _ in batch if not job.token]
        for job in [job for job in fresh if self._revoked(job.delivery.job)]:
            self._leave(job)
            self._end([Revoked(job.delivery)])
            fresh.remove(job)
        if fresh:
            asked = [(job.delivery.job, job.ticket.deadline_at) for job in fresh]
            now, claims = insist(
                lambda: self.store.claim(asked),
                self._stopping,
                lambda why: logger.warning("cannot claim", extra={"error": why}),
            )
            for job, claim in zip(fresh, claims, strict=True):
                self._settle(job, claim, now)
        self._accepted([job.delivery for job in fresh if job in self._claimed])
        return [(job, rows) for job, rows in batch if job in self._claimed]

    def _settle(self, job: Job, claim: Claim, now: float) -> None:
        """Act on the answer to a claim."""
        if claim.verdict is Verdict.RUN:
            job.token, job.started = claim.token, now
            self._claimed[job] = claim.token
            if int(claim.token.rpartition("#")[2]) > MOST_ATTEMPTS:
                self._give_up(job)
            return
        self._leave(job)
        if claim.verdict is Verdict.FINAL:
            self._end([Dropped(job.delivery)])
        elif claim.verdict is Verdict.LATE:
            late = now - job.ticket.deadline_at
            error = DeadlineExceededError(f"its deadline passed {late:.3f} s before a device was free for it")
            self._end([Ended(job.delivery, Outcome(error=error))])
        else:
            pause = min(max(claim.retry_in, 0.01), LOOK_AGAIN)
            heapq.heappush(self._later, (time.monotonic() + pause, next(self._turn), job))

    def _give_up(self, job: Job) -> None:
        """End a job that has ended its workers, and keep its message for whoever looks into it."""
        error = DeadLetteredError(f"given up: {MOST_ATTEMPTS} attempts to run it ended without an answer")
        bury(self.store, job.delivery.request.message, error.message)
        self._end([self._failed(job, error)])

    def _run(self, batch: Portions) -> None:
        items = [job.items[row] for job, rows in batch for row in rows]
        try:
            loaded = self.executor.load(batch[0][0].model, batch[0][0].variant)
        except ExecutionError as error:  # it was unloaded since, and cannot be loaded again
            self._end([self._failed(job, error) for job, _ in batch])
            return
        started = time.monotonic()
        self.running, self._must_end_by = len(items), started + _patience(loaded, items)
        answers = self.executor.run(loaded, items)
        seconds = time.monotonic() - started
        self.running, self._must_end_by = 0, math.inf
        self.busy += seconds
        self._end(self._answer(batch, answers, seconds))

    def _answer(self, batch: Portions, answers: Sequence[Row | TaxiwayError], seconds: float) -> list[Ending]:
        """Give each job its answers; the jobs that ended with them."""
        endings: list[Ending] = []
        rest = iter(answers)
        for job, rows in batch:
            error = note(job, rows, list(itertools.islice(rest, len(rows))), Batch(seconds, len(answers)))
            if error is not None:
                endings.append(self._failed(job, error))
            elif job.done:
                endings.append(self._answered(job))
        return endings

    def _answered(self, job: Job) -> Ended:
        try:
            result = answer_of(job, self._hardware_class, self.executor.device)
        except TaxiwayError as error:
            return self._failed(job, ExecutionError(f"{job.variant}: an output has no form on the wire: {error}"))
        return Ended(job.delivery, Outcome(result, generated=generated_by(job)), self._claimed.pop(job))

    def _failed(self, job: Job, error: TaxiwayError) -> Ended:
        self._leave(job)
        return Ended(job.delivery, Outcome(error=error), self._claimed.pop(job))

    def _leave(self, job: Job) -> None:
        """Take the job's rows out of the lanes they wait in."""
        for bucket in job.waiting:
            self._lanes[variant_key(job.model.id, job.variant), bucket].remove(job)

    def _give_back(self) -> None:
        """Release the claims of jobs that are not finished: their messages return to the queue."""
        with contextlib.suppress(BrokerUnavailableError):  # then the leases end by themselves
            self.store.release(self.claims())
        self._claimed.clear()


def _patience(loaded: Loaded, items: Sequence[Item]) -> float:
    """Seconds within which the batch must have ended."""
    profile = next(iter(loaded.variant.profiles.values()))
    size = sum(item.size for item in items) / len(items)
    return STALL_AT_LEAST + STALL * profile.latency(len(items), size)
