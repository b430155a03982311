"""Stage 3: forms batches of rows, runs them, and passes on the outcome of each job. It never waits for a server.

Jobs whose variant is not loaded wait for the load outside the lanes (`Loads`).

A short job that comes alone to an idle device runs on the thread that fetched it (`run_alone`). The thread that
runs has the turn: no two threads are on the device.

Python callables run their rows in a separate process. While such a row runs, due batches of other variants with more
urgent jobs run on the device.

A job that a fault of the device ended is retried within the retry budget; a request's own error never is. If the device
has no memory left for work that it ran before (a leak, or the remains of a fault), the worker requeues its jobs and
exits. A request may also be too large for any device: a variant that ran out of memory for several jobs in a row runs
its model's example. If that succeeds, the jobs were too large and the worker stays.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from broker.valkey.worker_store import WorkerStore, insist
from tasks.heartbeat import Yieldable
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from taxiway.backoff import Outage
from taxiway.contract.keys import LEVELS, PATIENT
from taxiway.errors import BrokerUnavailableError, DeviceFaultError, FleetUnavailable, TaxiwayError
from workers.decide.faults import RETRIES, Budget
from workers.decide.occupation import unfinished
from workers.executor import Answer, Executor
from workers.stages.admit import gather, named_row, prepare
from workers.stages.job import Delivery, Ended, Ending, Returned, RunningJob
from workers.stages.lane import Lane, Lanes, Portions, is_short
from workers.stages.loads import Loads
from workers.stages.queues import AHEAD, AHEAD_FOR, DeviceDriver, DeviceQueue, Shared, ahead_of
from workers.stages.runs import BatchUse, DeviceRunner

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = os.EX_OSERR
"""Exit status of a worker whose device memory is exhausted (71): its supervisor starts another."""


def count_runs(store: WorkerStore, suspects: Sequence[Delivery], stopping: threading.Event) -> bool:
    """Count a run of each, alone, in the store before it begins: it may crash this worker. False without an answer."""
    begun = [(delivery.job, delivery.token, delivery.started) for delivery in suspects]

    def count() -> None:
        store.start(begun)
        store.alone([(job, token) for job, token, _ in begun], alone=True)

    try:
        insist(count, stopping, Outage(logger, "cannot count attempts"))
    except BrokerUnavailableError:  # stopping: the messages are delivered again
        return False
    for delivery in suspects:
        delivery.start_stored = True
    return True


class Retries:
    """Passes endings to the finish stage, except jobs to be retried. Only who has the device's turn.

    A retried delivery keeps its claim. Once the device's memory is exhausted, jobs that ran out of memory are kept for
    another worker. `runs_example` says whether a variant, by its key, can still run its model's example.
    """

    def __init__(self, shared: Shared, runs_example: Callable[[str], bool]) -> None:
        self._shared = shared
        self._limits = shared.store.limits
        self._runs_example = runs_example
        self._budget = Budget()
        self._exhausted = False
        self._starved: dict[str, set[str]] = {}

    def put(self, endings: Sequence[Ending]) -> None:
        """Pass on endings, and retry where allowed."""
        for ending in endings:
            if isinstance(ending, RunningJob):
                self._starved.pop(ending.key, None)
            elif isinstance(ending, Ended) and isinstance(ending.error, DeviceFaultError):
                self._starve(str(ending.error.details.get("variant")), ending.delivery.job)
        self._budget = self._budget.earned(sum(isinstance(ending, RunningJob) for ending in endings))
        self._shared.endings.put([ending for ending in endings if not self._retried(ending)])

    def _starve(self, variant: str, job: str) -> None:
        """Note that a job ran out of memory; the worker exits once that is the device's fault."""
        jobs = self._starved.setdefault(variant, set())
        jobs.add(job)
        if self._exhausted or len(jobs) < self._limits.memory_faults:
            return
        del self._starved[variant]
        self._exhausted = not self._runs_example(variant)
        if self._exhausted:
            logger.critical("device memory exhausted; worker requeues its jobs and exits", extra={"variant": variant})
            self._shared.drain.within(0.0)
            self._shared.celery.exit(OUT_OF_MEMORY)

    def _retried(self, ending: Ending) -> bool:
        delivery = ending.delivery
        error = ending.error if isinstance(ending, Ended) else None
        leaves = self._exhausted
        if not isinstance(error, FleetUnavailable) or not (leaves or self._affords(delivery, error)):
            return False
        seconds = RETRIES.longest if leaves else RETRIES.pause(delivery.retries + 1, random.random())
        logger.warning("runs again", extra={"job": delivery.job, "pause": round(seconds, 3), "error": error.message})
        delivery.retries += 1
        delivery.began = 0.0
        self._shared.admissions.put(delivery, pause=seconds)
        return True

    def _affords(self, delivery: Delivery, error: TaxiwayError) -> bool:
        """Whether a job may be retried; if so, the budget is charged."""
        if delivery.retries + 1 >= self._limits.attempts:
            return False
        if not self._budget.allows:
            logger.warning("no retry left", extra={"job": delivery.job, "error": error.message})
            return False
        self._budget = self._budget.spent()
        return True


OTHERS_FIRST = 0.005
"""Seconds for which a device that has its next batch leaves the queue to devices without one."""

ALONE_AT_MOST = 0.002
"""Longest predicted run, in seconds, of a job on the thread that fetched it, which fetches nothing meanwhile: a longer
job does not notice the 0.2 ms that it takes to wake the device and the finish thread."""


class DeviceStage(DeviceDriver):
    """Runs the admitted jobs of one device until each has an outcome; `finish` receives endings."""

    use: BatchUse
    variants: Executor

    def __init__(
        self, inbox: DeviceQueue, finish: Callable[[Sequence[Ending]], None], executor: Executor, shared: Shared
    ) -> None:
        self.variants = executor
        self.ahead = ahead_of(executor.hardware)  # seconds of patient work that may wait here besides the last job
        self._inbox = inbox
        self._finish = finish
        self._shared = shared
        self._lanes = Lanes(executor, lambda: inbox.clock)
        self._loads = Loads(executor, wake=inbox.wake, fail=self._fail)
        self.use = BatchUse(self._is_wanted, executor.hardware.runs_at_most)
        self._stopping = threading.Event()
        self._runner = DeviceRunner(
            executor, self.use, shared, wanted=self._is_wanted, serve_beside=self._serve_beside, stopping=self._stopping
        )
        self._changes: deque[Callable[[], None]] = deque()
        self._turns = threading.Lock()
        self._left_over = False  # `run_alone` did not end what it took over

    def renew(self, catalogue: Catalogue, book: ProfileBook, *, warm: Sequence[Model]) -> None:
        """Switch to a new catalogue and profiles, and keep these models warm. Thread-safe.

        A running batch finishes with the old model; waiting jobs of changed models are decoded again.
        """
        self._changes.append(partial(self._renew, catalogue, book, tuple(warm)))
        self._inbox.wake()

    def stop(self) -> None:
        """Run the jobs here that end in time, requeue the rest, and end. Thread-safe."""
        self._stopping.set()
        self._inbox.wake()

    def wait_for_capacity(self, longest: float) -> int:
        """Wait until the next batches need jobs, at most `longest` seconds; returns how many. Thread-safe.

        The number is the free rows divided by the recent rows per job. Jobs held here cannot move to another class, and
        more urgent jobs in the queue cannot overtake them.
        """
        self._inbox.wait_for(lambda: self._capacity() > 0 or self._stopping.is_set(), longest)
        self._inbox.wait_for(lambda: self._capacity(1) > 0 or self._stopping.is_set(), OTHERS_FIRST)
        capacity = self._capacity(1)
        return math.ceil((capacity if capacity > 0 else self._capacity()) / self._inbox.rows_a_job)

    def levels(self) -> int:
        """How many of a queue's priority levels, first ones first, may be fetched. Thread-safe.

        Patient work is fetched only while less than `ahead` seconds of it wait here: other devices may be free for it
        sooner.
        """
        patient = self._inbox.patient + self._loads.patient + sum(lane.patient_seconds for lane in self._lanes)
        return PATIENT if patient >= self.ahead else LEVELS

    def hung(self, now: float) -> bool:
        """Whether the running batch or load counts as hung. Thread-safe."""
        return now > self.use.must_end_by or self._loads.hung(now)

    @property
    def yieldable(self) -> tuple[Yieldable, ...]:
        """The running callable, if it can: no other batch is interrupted."""
        return self._runner.yieldable

    def warm_up(self, models: Sequence[Model]) -> None:
        """Load one variant of each model."""
        for model in models:
            self.variants.warm_up(model)

    def run(self) -> None:
        """Run until stopped, then finish what ends in time."""
        wait = 0.0
        while not self._stopping.is_set():
            jobs = self._inbox.take(wait, self._has_news)
            with self._turns:
                self._accept(jobs)
                wait = min(self._turn(time.monotonic()), self._loads.pause)
        with self._turns:
            while self._ends_in_time():
                self._turn(math.inf)  # no more rows will come for a batch to wait for
            self._loads.leave()
            for loaded in self.variants.all_loaded():
                if loaded.interruptible is not None:
                    self.variants.unload(loaded)  # and its process

    def run_alone(self, job: RunningJob) -> bool:
        """Run a job on the caller's thread, if it is short and nothing else is here; whether it was taken over.

        What does not end with its batch (it waits for others, or runs again) is left to the device thread. Thread-safe.
        """
        if not self._turns.acquire(blocking=False):
            return False
        try:
            if self._stopping.is_set() or not self._idle() or not is_short(job, self.variants, ALONE_AT_MOST):
                return False
            self._take_in(job)
            lane, _ = self._lanes.next(time.monotonic())
            if lane is not None:
                self._serve(lane)
            self._left_over = not self._idle()
            if self._left_over:
                self._inbox.wake()
            return True
        finally:
            self._turns.release()

    def _idle(self) -> bool:
        """Whether nothing waits or runs here."""
        return not (self._inbox.rows or self._loads.rows or self._changes or self._lanes)

    def _turn(self, now: float) -> float:
        """Run a due batch; returns the seconds until something is due."""
        lane, wait = self._lanes.next(now)
        if lane is not None:
            self._serve(lane, wake=True)
        return wait

    def _ends_in_time(self) -> bool:
        """Whether anything is left to run before the time limit; jobs that would not end by then are requeued."""
        self._collect()
        left = self._shared.drain.left
        late = set(unfinished(self._lanes.stints(), left))
        for job in late:
            self._lanes.remove(job)
        late.update(self._loads.give_up())
        if late:
            self._shared.held.requeue([job.delivery for job in sorted(late, key=lambda job: job.arrived)])
        return bool(self._lanes)

    def _capacity(self, batches: int = AHEAD) -> int:
        """Rows until `batches` batches, or `AHEAD_FOR` seconds of work, wait here."""
        lanes = list(self._lanes)
        batch = max([self.variants.hardware.max_batch, *(lane.policy.max_batch for lane in lanes)])
        rows = max(batches * batch, int(self.use.rate.rows * AHEAD_FOR))
        waiting = sum(lane.rows for lane in lanes)
        beside = max(0, self._loads.rows - rows)  # as many again may wait for loads without taking capacity from others
        return rows - waiting - self._inbox.rows - beside

    def _collect(self) -> None:
        self._accept(self._inbox.take(0.0, self._has_news))

    def _accept(self, jobs: Sequence[RunningJob]) -> None:
        """Take in jobs from the queue and from ended loads, and what has changed."""
        self._left_over = False
        for job in (*jobs, *self._loads.finish()):
            self._take_in(job)
        while self._changes and not self._runner.calling and not self._stopping.is_set():
            self._changes.popleft()()
        if not self._stopping.is_set():
            self._loads.begin(self._lanes.variants)
        if jobs and self._loads.rows:  # the new jobs may let other loads go ahead
            self._inbox.wake()

    def _has_news(self) -> bool:
        return self._loads.ended or self._stopping.is_set() or bool(self._changes) or self._left_over

    def _renew(self, catalogue: Catalogue, book: ProfileBook, warm: Sequence[Model]) -> None:
        """Unload removed variants, load warm models, and have jobs of changed models decoded again."""
        self.variants.renew(catalogue, book)
        waiting = set().union(*(lane.jobs() for lane in self._lanes))
        outdated = {job for job in waiting if not self.variants.is_current(job.model)}
        for job in outdated:
            self._lanes.remove(job)
        outdated |= set(self._loads.drop_outdated())
        self.variants.sweep()
        self._lanes.renew()
        for model in warm:
            self._loads.want(model)
        for job in sorted(outdated, key=lambda job: job.arrived):
            job.delivery.began = 0.0  # rows that already ran run again with the others
            self._shared.admissions.put(job.delivery)

    def _take_in(self, job: RunningJob) -> None:
        if not self.variants.is_current(job.model) and not self._stopping.is_set():
            self._shared.admissions.put(job.delivery)
            return
        loaded = self.variants.ready(job.model, job.variant)
        if loaded is None:
            self._loads.wait(job)
            return
        try:
            if not job.items:
                prepare(job, loaded)
        except TaxiwayError as error:
            self._fail([job], error)
            return
        self._lanes.add(job, loaded)

    def _serve(self, lane: Lane, *, wake: bool = False) -> None:
        """Run a lane's batch; `wake` unless the thread that waits for capacity is this one."""
        batch = self._begin(lane.take(time.monotonic() + self._inbox.clock))
        if wake:
            self._inbox.wake()
        if batch:
            self._run(batch)
        self._lanes.served(lane, time.monotonic())

    def _begin(self, batch: Portions) -> Portions:
        """The part of the batch whose jobs may still run."""
        now = time.monotonic() + self._inbox.clock
        out = {job for job, _ in batch if not self._may_run(job, now)}
        fresh = [job for job, _ in batch if not job.delivery.began and job not in out]
        for job in fresh:
            job.delivery.began, job.delivery.started = time.time(), now
        suspects = [job.delivery for job in fresh if job.delivery.suspect]
        if suspects and not count_runs(self._shared.store, suspects, self._stopping):
            return []
        for job in fresh:
            if job.delivery.task is not None and not job.delivery.retries:
                job.delivery.task.start()
        return [(job, rows) for job, rows in batch if job not in out] if out else batch

    def _may_run(self, job: RunningJob, now: float) -> bool:
        """Whether the job may run; if not, it is removed."""
        if self._shared.may_run(job, now):
            return True
        self._lanes.remove(job)
        return False

    def _run(self, batch: Portions) -> None:
        first = batch[0][0]
        loaded = self.variants.ready(first.model, first.variant)
        if loaded is None:  # it was unloaded since
            for job, _ in batch:
                self._lanes.remove(job)
                gather(job)  # it waits with all unanswered rows
                self._loads.wait(job)
            return
        with self.use.batch(sum(len(rows) for _, rows in batch)) as seconds:
            answers = self._runner.run(loaded, batch)
            if loaded.interruptible is not None and not loaded.interruptible.alive:  # it was lost with a row
                self.variants.unload(loaded)
                self._loads.replace(loaded.model, first.variant)
        endings = self._answer(batch, answers, seconds())
        self._finish(endings)
        if None in answers:
            ended = {ending.delivery for ending in endings}
            self._take_up([job for job, rows in batch if job.delivery not in ended and job.lacks(rows)])

    def _serve_beside(self, job: RunningJob) -> None:
        """Run due batches that are more urgent than the job, while its row runs in its own process."""
        self._collect()
        while (lane := self._lanes.more_urgent(job, time.monotonic())) is not None:
            self._serve(lane, wake=True)

    def _is_wanted(self, job: RunningJob) -> bool:
        """Whether a job's rows may continue: the job has not ended, and the worker has time to run them."""
        delivery = job.delivery
        ended = delivery.ended or delivery.lost or self._shared.celery.is_revoked(delivery.job)
        return not ended and self._shared.drain.left > 0 and job.deadline >= time.monotonic() + self._inbox.clock

    def _take_up(self, jobs: Sequence[RunningJob]) -> None:
        """Resume jobs whose rows were interrupted, if still wanted; what yielded, or outstays a drain, is requeued."""
        now = time.monotonic() + self._inbox.clock
        wanted = [job for job in jobs if self._may_run(job, now)]
        if self._shared.drain.left > 0:
            for job in wanted:
                self._lanes.remove(job)
                if job.yielded:
                    self._finish([Returned(job.delivery, counts=False)])
                    continue
                gather(job)
                self._take_in(job)

    def _answer(self, batch: Portions, answers: Sequence[Answer], seconds: float) -> list[Ending]:
        """Store the answers in their jobs; returns the jobs that ended."""
        endings: list[Ending] = []
        rest = iter(answers)
        for job, rows in batch:
            job.run_time += seconds
            job.device_time += seconds * len(rows) / len(answers)
            job.batch = max(job.batch, len(answers))
            error = _noted(job, rows, list(itertools.islice(rest, len(rows))))
            if error is not None:
                self._lanes.remove(job)
                endings.append(Ended(job.delivery, error=error))
            elif job.done:
                endings.append(job)
        return endings

    def _fail(self, jobs: Sequence[RunningJob], error: TaxiwayError) -> None:
        """Fail jobs that are in no lane."""
        self._finish([Ended(job.delivery, error=error) for job in jobs])


def _noted(job: RunningJob, rows: Sequence[int], answers: Sequence[Answer]) -> TaxiwayError | None:
    """Record the rows' answers in the job; returns the first error."""
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, TaxiwayError):
            return named_row(answer, row, job)
        job.answers[row] = answer
    return None
