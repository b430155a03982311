"""Stage 3: forms batches of rows, runs them, and passes on the outcome of each job. It never waits for a server.

Jobs whose variant is not loaded wait for the load outside the lanes (`Loads`).

A short job that comes alone to an idle device runs on the thread that fetched it (`run_alone`). The thread that
runs has the turn: no two threads are on the device.

Python callables run their rows in a separate process. While such a row runs, due batches of other variants with more
urgent jobs run on the device.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from taxiway.contract.keys import LEVELS, PATIENT
from taxiway.errors import TaxiwayError
from workers.decide.batcher import BatchPolicy
from workers.decide.occupation import BATCHES, Occupation, Stint, blocking_by_model, unfinished
from workers.executor import Answer, Executor, WatchedItem, most_rows, run_rows, time_limit
from workers.learned import Loaded
from workers.port import Interruptible, Item, Watch
from workers.stages.admit import gather, prepare
from workers.stages.job import Answered, Ended, Ending, Job, Outcome, Revoked, late
from workers.stages.lane import Key, Lane, Loads, Portions, RowRate, Urgency, is_short, key_of, urgency
from workers.stages.queues import AHEAD, AHEAD_FOR, DeviceQueue, EndingSink, Shared, ahead_of
from workers.stages.results import Batch, note
from workers.stages.retries import count_runs

OTHERS_FIRST = 0.005
"""Seconds for which a device that has its next batch leaves the queue to devices without one."""

ALONE_AT_MOST = 0.002
"""Longest predicted run, in seconds, of a job on the thread that fetched it, which fetches nothing meanwhile: a longer
job does not notice the 0.2 ms that it takes to wake the device and the finish thread."""

_IDLE = 60.0  # seconds; any arrival ends the wait


class DeviceStage:
    """Runs the admitted jobs of one device until each has an outcome.

    Args:
        finish: receives endings.

    `ahead` is the maximum of patient work (seconds) that may wait here, not counting the last job. `running` counts the
    rows on the device now, `busy` the total seconds of finished batches.
    """

    def __init__(
        self,
        inbox: DeviceQueue,
        finish: EndingSink,
        executor: Executor,
        shared: Shared,
    ) -> None:
        self.executor = self.variants = executor
        self.fault = ""
        self.endpoint = None
        self._store = shared.store
        self._inbox = inbox
        self._finish = finish
        self._admit = shared.admissions
        self._held = shared.held
        self._celery = shared.celery
        self._drain = shared.drain
        self.running = 0
        self.busy = 0.0
        self._busy_since: float | None = None
        self.ahead = ahead_of(executor.hardware)
        self._renewals: deque[tuple[Catalogue, ProfileBook, Sequence[Model]]] = deque(maxlen=1)
        self._controls: deque[tuple[Sequence[Model], Collection[str]]] = deque()
        self._lanes: dict[Key, Lane] = {}
        self._rate = RowRate()
        self._stopping = threading.Event()
        self._turns = threading.Lock()
        self._alone = False
        self._left_over = False  # `run_alone` did not end what it took over
        self._must_end_by = math.inf
        self._whole: tuple[Occupation, Portions] | None = None
        self._batches: deque[tuple[float, str, float]] = deque(maxlen=BATCHES)
        self._calling = False
        self._beside = 0.0
        self._fault: Exception | None = None
        self._loads = Loads(executor, wake=inbox.wake, fail=self._fail)

    def renew(self, catalogue: Catalogue, book: ProfileBook, *, warm: Sequence[Model]) -> None:
        """Switch to a new catalogue and profiles, and keep these models warm. Thread-safe.

        A running batch finishes with the old model; waiting jobs of changed models are decoded again.
        """
        self._renewals.append((catalogue, book, tuple(warm)))
        self._inbox.wake()

    def control(self, *, load: Sequence[Model], unloaded: Collection[str]) -> None:
        """Load these models as far as memory allows, and unload those of these names once no job needs them.

        Thread-safe.
        """
        for model in load:
            self.executor.retry(model)
        self._controls.append((load, unloaded))
        self._inbox.wake()

    def stop(self) -> None:
        """Run the jobs here that end in time, requeue the rest, and end. Thread-safe."""
        self._stopping.set()
        self._inbox.wake()

    def wait_for_room(self, longest: float) -> int:
        """Wait until the next batches need jobs, at most `longest` seconds; returns how many. Thread-safe.

        The number is the free rows divided by the recent rows per job. Jobs held here cannot move to another class, and
        more urgent jobs in the queue cannot overtake them.
        """
        self._inbox.wait_for(lambda: self._room() > 0 or self._stopping.is_set(), longest)
        self._inbox.wait_for(lambda: self._room(1) > 0 or self._stopping.is_set(), OTHERS_FIRST)
        room = self._room(1)
        return math.ceil((room if room > 0 else self._room()) / self._inbox.rows_a_job)

    def levels(self) -> int:
        """How many of a queue's priority levels, first ones first, may be fetched. Thread-safe.

        Patient work is fetched only while less than `ahead` seconds of it wait here: other devices may be free for it
        sooner.
        """
        lanes = [lane for lane in list(self._lanes.values()) if lane.patient]
        patient = self._inbox.patient + self._loads.patient + sum(lane.patient_seconds for lane in lanes)
        return PATIENT if patient >= self.ahead else LEVELS

    def computed(self, now: float) -> float:
        """Seconds that the device has computed, including the running batch. Thread-safe."""
        return self.busy + self.batch_age(now)

    def memory(self) -> tuple[str, bytes]:
        """Nothing: each process learns about its device by itself."""
        return "", b""

    def batch_age(self, now: float) -> float:
        """Seconds for which the running batch has run, 0 if there is none. Thread-safe."""
        since = self._busy_since
        return max(now - since, 0.0) if since is not None else 0.0

    def hung(self, now: float) -> bool:
        """Whether the running batch or load counts as hung. Thread-safe."""
        return now > self._must_end_by or self._loads.hung(now)

    def occupied(self, now: float) -> float:
        """Device seconds that the running batch will still spend on rows of ended jobs. Thread-safe."""
        whole = self._whole
        if whole is None:
            return 0.0
        occupation, batch = whole
        unwanted = sum(len(rows) for job, rows in batch if not self._is_wanted(job))
        return occupation.left(now, unwanted / sum(len(rows) for _, rows in batch))

    def blocked(self, now: float) -> tuple[float, int]:
        """Seconds until a long, uninterruptible batch ends, and its most urgent level; 0 if there is none.

        Thread-safe.
        """
        whole = self._whole
        if whole is None or not whole[0].longer_than(self.executor.hardware.runs_at_most, now):
            return 0.0, 0
        levels = [job.ticket.level for job, _ in whole[1] if self._is_wanted(job)]
        return (whole[0].ends_in(now), min(levels)) if levels else (0.0, 0)  # ended jobs count in `occupied`

    def blocking(self, now: float) -> dict[str, float]:
        """Seconds that a job of each model may wait for a batch of another. Thread-safe."""
        return blocking_by_model(reversed(tuple(self._batches)), now)

    def warm_up(self, models: Sequence[Model]) -> None:
        """Load one variant of each model."""
        for model in models:
            self.executor.warm_up(model)

    def run(self) -> None:
        """Run until stopped, then finish what ends in time."""
        wait = 0.0
        while not self._stopping.is_set():
            jobs = self._inbox.take(wait, self._has_news)
            with self._turns:
                self._accept(jobs)
                wait = self._turn(time.monotonic())
        with self._turns:
            while self._ends_in_time():
                self._turn(math.inf)  # no more rows will come for a batch to wait for
            self._loads.leave()
            for loaded in self.executor.all_loaded():
                if loaded.interruptible is not None:
                    self.executor.unload(loaded)  # and its process

    def run_alone(self, job: Job) -> bool:
        """Run a job on the caller's thread, if it is short and nothing else is here; whether it was taken over.

        What does not end with its batch (it waits for others, or runs again) is left to the device thread. Thread-safe.
        """
        if not self._turns.acquire(blocking=False):
            return False
        try:
            if self._stopping.is_set() or not self._idle() or not is_short(job, self.executor, ALONE_AT_MOST):
                return False
            self._alone = True
            self._take_in(job)
            self._turn(time.monotonic())
            self._left_over = not self._idle()
            if self._left_over:
                self._inbox.wake()
            return True
        finally:
            self._alone = False
            self._turns.release()

    def _idle(self) -> bool:
        """Whether nothing waits or runs here."""
        elsewhere = self._inbox.rows or self._loads.rows or self._renewals or self._controls
        return not elsewhere and not any(self._lanes.values())

    def _turn(self, now: float) -> float:
        """Run a due batch; returns the seconds until something is due."""
        lane, wait = self._next(now)
        if lane is not None:
            self._serve(lane)
        return wait

    def _ends_in_time(self) -> bool:
        """Whether anything is left to run before the time limit; jobs that would not end by then are requeued."""
        self._collect()
        left = self._drain.left
        late = set(unfinished(self._stints(), left))
        for job in late:
            self._leave(job)
        late.update(self._loads.give_up())
        if late:
            self._held.requeue([job.delivery for job in sorted(late, key=lambda job: job.arrived)])
        return any(self._lanes.values())

    def _stints(self) -> Iterator[Stint[Job]]:
        """The waiting batches in running order, with a safe bound of their seconds."""
        surely = {loaded.key: self.executor.track(loaded).surely for loaded in self.executor.all_loaded()}
        for lane in sorted(filter(None, self._lanes.values()), key=Lane.turn):
            for jobs, seconds in lane.batches():
                yield jobs, seconds * surely.get(lane.variant, math.inf)

    def _room(self, batches: int = AHEAD) -> int:
        """Rows until `batches` batches, or `AHEAD_FOR` seconds of work, wait here."""
        lanes = [lane for lane in list(self._lanes.values()) if lane]
        batch = max([self.executor.hardware.max_batch, *(lane.policy.max_batch for lane in lanes)])
        rows = max(batches * batch, int(self._rate.rows * AHEAD_FOR))
        waiting = sum(lane.rows for lane in lanes)
        beside = max(0, self._loads.rows - rows)  # as many again may wait for loads without taking room from others
        return rows - waiting - self._inbox.rows - beside

    def _collect(self) -> None:
        self._accept(self._inbox.take(0.0, self._has_news))

    def _accept(self, jobs: Sequence[Job]) -> None:
        """Take in jobs from the queue and from ended loads, and what is renewed."""
        self._left_over = False
        renewal = self._renewals.pop() if self._renewals and not self._calling else None
        if renewal is not None and not self._stopping.is_set():
            self._renew(*renewal)
        for job in jobs:
            self._take_in(job)
        for job in self._loads.finish():
            self._take_in(job)
        if self._controls and not self._calling:
            self._control(*self._controls.popleft())
        if not self._stopping.is_set():
            self._loads.begin(self._in_lanes)
        if jobs and self._loads.rows:  # the new jobs may let other loads go ahead
            self._inbox.wake()

    def _has_news(self) -> bool:
        return self._loads.ended or self._stopping.is_set() or bool(self._renewals or self._controls or self._left_over)

    def _renew(self, catalogue: Catalogue, book: ProfileBook, warm: Sequence[Model]) -> None:
        """Unload removed variants, load warm models, and have jobs of changed models decoded again."""
        self.executor.renew(catalogue, book)
        waiting = set().union(*(lane.jobs() for lane in self._lanes.values()))
        outdated = {job for job in waiting if not self.executor.is_current(job.model)}
        for job in outdated:
            self._leave(job)
        outdated |= set(self._loads.drop_outdated())
        self.executor.sweep()
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane}
        known = {loaded.key: loaded.known for loaded in self.executor.all_loaded()}
        for lane in self._lanes.values():
            lane.profile = known[lane.variant].profile if lane.variant in known else lane.profile
        for model in warm:
            self._loads.want(model)
        for job in sorted(outdated, key=lambda job: job.arrived):
            job.delivery.began = 0.0  # rows that already ran run again with the others
            self._admit.put(job.delivery)

    def _control(self, load: Sequence[Model], unloaded: Collection[str]) -> None:
        for model in load:
            if self.executor.is_current(model):
                self._loads.want(model)
        self.executor.unload_unused(unloaded, {lane.variant for lane in self._lanes.values() if lane})

    def _take_in(self, job: Job) -> None:
        if not self.executor.is_current(job.model) and not self._stopping.is_set():
            self._admit.put(job.delivery)
            return
        loaded = self.executor.ready(job.model, job.variant)
        if loaded is None:
            self._loads.wait(job)
            return
        try:
            if not job.items:
                prepare(job, loaded)
        except TaxiwayError as error:
            self._fail([job], error)
            return
        for bucket in job.waiting:
            self._lane(loaded, bucket, job).add(job)

    def _in_lanes(self, least: Urgency) -> set[str]:
        """The variants in lanes with jobs at least as urgent."""
        return {lane.variant for lane in self._lanes.values() if lane and lane.urgency() <= least}

    def _lane(self, loaded: Loaded, bucket: int, job: Job) -> Lane:
        key = key_of(job, bucket)
        if key not in self._lanes:
            most = most_rows(job.hardware, loaded.variant)
            policy = BatchPolicy(most, job.hardware.max_wait, job.hardware.runs_at_most)
            pace = partial(self.executor.pace, loaded.key)
            retargeted = job.hardware is not self.executor.hardware
            profile, own_process = loaded.known.profile, loaded.interruptible is not None
            self._lanes[key] = Lane(key, policy, profile, pace, retargeted=retargeted, own_process=own_process)
        return self._lanes[key]

    def _next(self, now: float) -> tuple[Lane | None, float]:
        """The lane whose batch runs now, or the seconds to wait for one."""
        waits = [(lane.due(now, self._inbox.clock), lane) for lane in self._lanes.values() if lane]
        due = [lane for wait, lane in waits if wait <= 0]
        if due:
            return min(due, key=Lane.turn), 0.0
        return None, max(min((wait for wait, _ in waits), default=_IDLE), 0.0001)

    def _serve(self, lane: Lane) -> None:
        batch = self._begin(lane.take(time.monotonic() + self._inbox.clock))
        if not self._alone:  # else the thread that waits for room is this one
            self._inbox.wake()
        if batch:
            self._run(batch)
        lane.answered(time.monotonic())
        if lane.alone and not lane:
            del self._lanes[lane.key]

    def _begin(self, batch: Portions) -> Portions:
        """The part of the batch whose jobs may still run."""
        now = time.monotonic() + self._inbox.clock
        out = {job for job, _ in batch if not self._may_run(job, now)}
        fresh = [job for job, _ in batch if not job.delivery.began and job not in out]
        for job in fresh:
            job.delivery.began, job.delivery.started = time.time(), now
        suspects = [job.delivery for job in fresh if job.delivery.suspect]
        if suspects and not count_runs(self._store, suspects, self._stopping):
            return []
        for job in fresh:
            if job.delivery.task is not None and not job.delivery.retries:
                job.delivery.task.start()
        return [(job, rows) for job, rows in batch if job not in out] if out else batch

    def _may_run(self, job: Job, now: float) -> bool:
        """Whether the job may run; if not, it is removed."""
        delivery = job.delivery
        if self._celery.is_revoked(delivery.job):
            self._finish.put([Revoked(delivery)])
        elif job.deadline < now:
            self._finish.put([late(delivery, now)])
        elif delivery.lost:
            self._admit.put(delivery)  # its next claim shows whether it was cancelled or runs elsewhere
        elif not delivery.ended:
            return True
        self._leave(job)
        return False

    def _run(self, batch: Portions) -> None:
        items = [job.items[row] for job, rows in batch for row in rows]
        loaded = self.executor.ready(batch[0][0].model, batch[0][0].variant)
        if loaded is None:  # it was unloaded since
            self._await_load([job for job, _ in batch])
            return
        started = self._busy_since = time.monotonic()
        beside = self._beside
        self.running = len(items)
        if loaded.interruptible is not None:
            answers = self._run_rows(loaded, loaded.interruptible, batch)
        else:
            answers = self._run_whole(loaded, batch, items)
        seconds = time.monotonic() - started - (self._beside - beside)
        self.running, self._must_end_by = 0, math.inf
        self.busy, self._busy_since = self.busy + seconds, None
        self._rate.count(len(items), started + seconds)
        endings = self._answer(batch, answers, seconds)
        self._finish.put(endings)
        if None in answers:
            ended = {ending.delivery for ending in endings}
            self._take_up([job for job, rows in batch if job.delivery not in ended and job.lacks(rows)])

    def _run_whole(self, loaded: Loaded, batch: Portions, items: Sequence[Item]) -> Sequence[Answer]:
        """Run the batch, which cannot be interrupted; meanwhile `occupied` gives the part spent on ended jobs."""
        now = time.monotonic()
        self._must_end_by = now + self._store.limits.stall + time_limit(loaded, items)
        self._whole = Occupation(now, self.executor.predicted(loaded, items)), batch
        try:
            return self.executor.run(loaded, items)
        finally:
            self._whole = None
            self._batches.append((now, loaded.model.id, time.monotonic() - now))

    def _run_rows(self, loaded: Loaded, runtime: Interruptible, batch: Portions) -> Sequence[Answer]:
        """Run the batch row by row, each while it is wanted; a runtime lost with a row is loaded again."""
        rows = [WatchedItem(job.items[row], self._watch(loaded, job, row)) for job, rows in batch for row in rows]
        longest = sum(row.watch.seconds for row in rows)
        self._must_end_by = time.monotonic() + longest + self._store.limits.stall
        self._calling = loaded.in_use = True  # a load beside it must evict other variants, and no model changes
        answers = run_rows(self.executor, loaded, runtime, rows)
        self._calling = loaded.in_use = False
        if self._fault is not None:  # from a batch that ran beside it: a fault of this process, not of the row
            raise self._fault
        if not runtime.alive:
            self.executor.unload(loaded)
            self._loads.replace(loaded.model, batch[0][0].variant)
        return answers

    def _watch(self, loaded: Loaded, job: Job, row: int) -> Watch:
        limit, goes_on = loaded.variant.limits.time, partial(self._goes_on, job)
        if limit is not None:
            return Watch(job.delivery.job, goes_on, limit, "limits.time in its model.yaml")
        longest = self._store.limits.stall + time_limit(loaded, [job.items[row]])
        return Watch(job.delivery.job, goes_on, longest, "limits.stall in queues.yaml, and more")

    def _goes_on(self, job: Job) -> bool:
        """Whether the job's running row may continue; runs more urgent batches first."""
        try:
            self._run_beside(job)
        except Exception as error:  # raised here, it would count as the row's error
            self._fault = error
        return self._fault is None and self._is_wanted(job)

    def _run_beside(self, job: Job) -> None:
        """Run due batches that are more urgent than the job, while its row runs in its own process."""
        if job.delivery.suspect:  # it runs alone
            return
        started, outer = time.monotonic(), (self.running, self._must_end_by, self._busy_since)
        self._collect()
        while (lane := self._more_urgent(job)) is not None:
            self._serve(lane)
        seconds = time.monotonic() - started
        self._beside += seconds
        self.running, self._must_end_by, self._busy_since = outer[0], outer[1] + seconds, outer[2]

    def _more_urgent(self, job: Job) -> Lane | None:
        """The lane with the most urgent due batch that runs in this process and precedes the job."""
        now = time.monotonic()
        due = [
            lane
            for lane in self._lanes.values()
            if lane and not lane.alone and not lane.own_process and self._goes_before(lane, job, now)
        ]
        return min(due, key=Lane.turn, default=None)

    def _goes_before(self, lane: Lane, job: Job, now: float) -> bool:
        if lane.urgency()[:2] >= urgency(job)[:2]:
            return False
        return lane.due(now, self._inbox.clock) <= 0

    def _is_wanted(self, job: Job) -> bool:
        """Whether a job's rows may continue: the job has not ended, and the worker has time to run them."""
        delivery = job.delivery
        ended = delivery.ended or delivery.lost or self._celery.is_revoked(delivery.job)
        return not ended and self._drain.left > 0 and job.deadline >= time.monotonic() + self._inbox.clock

    def _take_up(self, jobs: Sequence[Job]) -> None:
        """Resume jobs whose rows were interrupted, if still wanted; a draining worker requeues them."""
        now = time.monotonic() + self._inbox.clock
        wanted = [job for job in jobs if self._may_run(job, now)]
        if self._drain.left > 0:
            for job in wanted:
                self._leave(job)
                gather(job)
                self._take_in(job)

    def _await_load(self, jobs: Sequence[Job]) -> None:
        """Make jobs wait, with all unanswered rows, until their variant is loaded again."""
        for job in jobs:
            self._leave(job)
            gather(job)
            self._loads.wait(job)

    def _answer(self, batch: Portions, answers: Sequence[Answer], seconds: float) -> list[Ending]:
        """Store the answers in their jobs; returns the jobs that ended."""
        endings: list[Ending] = []
        rest, ran = iter(answers), Batch(seconds, len(answers))
        for job, rows in batch:
            error = note(job, rows, list(itertools.islice(rest, len(rows))), ran)
            if error is not None:
                endings.append(self._failed(job, error))
            elif job.done:
                endings.append(Answered(job))
        return endings

    def _fail(self, jobs: Sequence[Job], error: TaxiwayError) -> None:
        """Fail jobs that are in no lane."""
        self._finish.put([Ended(job.delivery, Outcome(error=error)) for job in jobs])

    def _failed(self, job: Job, error: TaxiwayError) -> Ended:
        self._leave(job)
        return Ended(job.delivery, Outcome(error=error))

    def _leave(self, job: Job) -> None:
        """Take the job's rows out of the lanes they wait in."""
        for bucket in job.waiting:
            if (lane := self._lanes.get(key_of(job, bucket))) is not None:
                lane.remove(job)
