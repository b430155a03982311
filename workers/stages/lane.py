"""What waits on a device for its turn: lanes, the waiting rows of one variant and size bucket each."""

from __future__ import annotations

import itertools
import math
import time
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial

from tasks.models.model import Profile
from taxiway.contract.keys import PATIENT
from workers.decide import batcher
from workers.decide.batcher import ALONE, BatchPolicy, Row, WaitingRows
from workers.decide.occupation import Stint
from workers.executor import Executor, most_rows
from workers.learned import Loaded
from workers.stages.job import RunningJob, Urgency

Portions = list[tuple[RunningJob, list[int]]]
"""Jobs with the indices of their rows that run together."""

Key = tuple[str, int, str, str]
"""A lane's key: variant, size bucket, the suspect job that it is reserved for, if any, and the hardware class."""

_ORDER = itertools.count()


class Gaps:
    """The usual seconds between arrivals: learned from what came while earlier rows were unanswered."""

    def __init__(self) -> None:
        self.usual = ALONE
        self.newest = 0.0
        self.answered = 0.0  # when the last batch was
        self.waited = False  # a batch waited for more rows since the last one came
        self._together = 1

    def arrive(self, at: float, *, waiting: bool) -> None:
        """A job arrived; `waiting` says whether earlier rows wait."""
        if at > self.newest:
            if waiting or at < self.answered:
                self.usual = batcher.observe_gap(self.usual, (at - self.newest) / self._together)
                self.waited = False
            self.newest, self._together = at, 0
        self._together += 1

    def give_up(self) -> None:
        """The batch runs now: if it waited, it did so in vain."""
        if self.waited:
            self.usual, self.waited = batcher.widen_gap(self.usual), False


class Lane:
    """Rows of a variant that can run together. Only who has the device's turn changes it; any thread may read `rows`.

    `patient` counts the rows of jobs at patient levels.

    Args:
        profile: predicts what a batch takes.
        pace: gives recent batch times as a multiple of the prediction.
        retargeted: whether the class is not the worker's own.
        own_process: whether the rows run in a separate process.
    """

    def __init__(
        self,
        key: Key,
        policy: BatchPolicy,
        profile: Profile,
        pace: Callable[[], float],
        *,
        retargeted: bool = False,
        own_process: bool = False,
    ) -> None:
        self.key = key
        self.variant, self.bucket, self.alone, _ = key
        self.policy = policy
        self.retargeted = retargeted
        self.own_process = own_process
        self.profile = profile
        self._pace = pace
        self._urgent: list[tuple[Urgency, int, RunningJob]] = []
        self._line: deque[RunningJob] = deque()
        self.rows = 0
        self.patient = 0
        self._total = 0
        self._gaps = Gaps()

    def __bool__(self) -> bool:
        return self.rows > 0

    def add(self, job: RunningJob) -> None:
        """Add the job's rows of this bucket."""
        self._gaps.arrive(job.arrived, waiting=bool(self))
        insort(self._urgent, (job.urgency, next(_ORDER), job))
        self._line.append(job)
        self._count(job, len(job.waiting[self.bucket]))
        self._total += sum(self._sizes(job))

    def remove(self, job: RunningJob) -> None:
        """Remove the job's rows."""
        self._count(job, -len(job.waiting[self.bucket]))
        self._total -= sum(self._sizes(job))
        job.waiting[self.bucket] = []

    def jobs(self) -> set[RunningJob]:
        """The jobs with rows here."""
        return {job for *_, job in self._urgent if job.waiting[self.bucket]}

    def due(self, now: float, clock: float) -> float:
        """Seconds until the lane's batch should run; 0 means now. `clock` is the store's time less this host's."""
        while not self._line[0].waiting[self.bucket]:
            self._line.popleft()
        rows = min(self.rows, self.policy.max_batch)
        run = self._takes(rows, rows * self._total / self.rows)
        start_by = self.urgency()[1] - clock - run
        waiting = WaitingRows(self.rows, self._line[0].arrived, self._gaps.newest, start_by, run)
        wait = batcher.ready(waiting, now, self.policy, self._gaps.usual)
        self._gaps.waited |= wait > 0
        return wait

    def urgency(self) -> Urgency:
        """Sort key of lanes, most urgent job first."""
        while not self._urgent[0][2].waiting[self.bucket]:
            del self._urgent[0]
        return self._urgent[0][0]

    def turn(self) -> tuple[bool, Urgency]:
        """Sort key of lanes for running: the worker's own class before others, then by urgency."""
        return self.retargeted, self.urgency()

    @property
    def rank(self) -> tuple[bool, int]:
        """What of `turn` decides whether its batch may be formed while another runs: not the deadline."""
        return self.retargeted, self.urgency()[0]

    def take(self, now: float) -> Portions:
        """Take out the rows of the next batch, and those of jobs found late; `now` is on the store's clock."""
        self._gaps.give_up()
        taken: dict[RunningJob, list[int]] = defaultdict(list)
        seen: list[tuple[RunningJob, int]] = []

        def rows() -> Iterator[Row]:
            for (level, deadline, _), _, job in self._urgent:
                if deadline < now and job.waiting[self.bucket]:
                    taken[job] += job.waiting[self.bucket]
                    continue
                for index in job.waiting[self.bucket]:
                    seen.append((job, index))
                    yield Row(level, deadline, job.items[index].size)

        for place in batcher.form(rows(), self.policy, self._takes, now):
            job, index = seen[place]
            taken[job].append(index)
        for job, indices in taken.items():
            self._count(job, -len(indices))
            self._total -= sum(job.items[index].size for index in indices)
            waiting = job.waiting[self.bucket]
            job.waiting[self.bucket] = sorted(set(waiting).difference(indices)) if len(indices) < len(waiting) else []
        self._urgent = [entry for entry in self._urgent if entry[2].waiting[self.bucket]]
        return list(taken.items())

    @property
    def seconds(self) -> float:
        """Estimated seconds of the waiting rows in one batch. Any thread may read it."""
        rows, total = self.rows, self._total
        return self._takes(rows, total) if rows > 0 else 0.0

    @property
    def patient_seconds(self) -> float:
        """The part of `seconds` for patient rows. Any thread may read it."""
        rows = self.rows
        return self.seconds * self.patient / rows if rows > 0 else 0.0

    def batches(self) -> Iterator[tuple[set[RunningJob], float]]:
        """The jobs of each future batch, and its predicted seconds, if none is kept short for a deadline."""
        rows = [(job, index) for *_, job in self._urgent for index in job.waiting[self.bucket]]  # most urgent first
        while rows:
            front = [
                Row(job.ticket.level, job.deadline, job.items[index].size)
                for job, index in rows[: self.policy.max_batch]
            ]
            count = len(batcher.form(front, self.policy, self._takes, -math.inf))
            batch, rows = rows[:count], rows[count:]
            yield {job for job, _ in batch}, self.profile.latency(count, sum(row.size for row in front[:count]) / count)

    def answered(self, now: float) -> None:
        """Note that the batch taken last has been answered."""
        self._gaps.answered = now

    def _count(self, job: RunningJob, rows: int) -> None:
        self.rows += rows
        if job.ticket.level >= PATIENT:
            self.patient += rows

    def _sizes(self, job: RunningJob) -> list[int]:
        """The sizes of the job's waiting rows here."""
        return [job.items[row].size for row in job.waiting[self.bucket]]

    def _takes(self, rows: int, total: float) -> float:
        return self._pace() * self.profile.latency(rows, total / rows)


_RATE_OVER = 0.25  # seconds over which the rate of rows is measured


class RowRate:
    """The recent rate of rows per second."""

    def __init__(self) -> None:
        self.rows = 0.0
        self._since = time.monotonic()
        self._counted = 0

    def count(self, rows: int, now: float) -> None:
        """Count rows that have run."""
        self._counted += rows
        if now - self._since >= _RATE_OVER:
            self.rows = self._counted / (now - self._since)
            self._since, self._counted = now, 0


def key_of(job: RunningJob, bucket: int) -> Key:
    """The lane of a job's rows of a bucket. A suspect job (its worker crashed) gets a lane to itself.

    Each class has its own batching rules, so its own lanes.
    """
    return job.key, bucket, job.delivery.job if job.delivery.suspect else "", job.delivery.hardware_class


def is_short(job: RunningJob, executor: Executor, longest: float) -> bool:
    """Whether the job is one whole batch that is predicted to run for at most `longest` seconds."""
    loaded = executor.ready(job.model, job.variant)
    if loaded is None or loaded.interruptible is not None:
        return False
    one = len(job.waiting) == 1 and len(job.items) <= most_rows(job.hardware, loaded.variant)
    return one and not job.delivery.suspect and executor.predicted(loaded, job.items) <= longest


_IDLE_WAIT = 60.0  # seconds; any arrival ends the wait


class Lanes:
    """Rows that wait for the device, by lane. Only who has its turn changes them; any thread may iterate.

    `clock` gives the store's time less this host's.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._clock = clock
        self._lanes: dict[Key, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        """Those that have rows."""
        return (lane for lane in list(self._lanes.values()) if lane)

    def __bool__(self) -> bool:
        return any(self._lanes.values())

    def add(self, job: RunningJob, loaded: Loaded) -> None:
        """Add the waiting rows of a prepared job."""
        for bucket in job.waiting:
            self._lane(loaded, bucket, job).add(job)

    def remove(self, job: RunningJob) -> None:
        """Take the job's rows out."""
        for bucket in job.waiting:
            if (lane := self._lanes.get(key_of(job, bucket))) is not None:
                lane.remove(job)

    def served(self, lane: Lane, now: float) -> None:
        """The batch that was taken from a lane has been answered."""
        lane.answered(now)
        if lane.alone and not lane:
            del self._lanes[lane.key]

    def next(self, now: float) -> tuple[Lane | None, float]:
        """The lane whose batch runs now, or the seconds to wait for one.

        A batch waits for more rows only while the device would be idle, or run others of its level.
        """
        waits = [(lane.due(now, self._clock()), lane) for lane in self]
        due = [lane for wait, lane in waits if wait <= 0]
        if due:
            first, most_urgent = min(due, key=Lane.turn), min((lane for _, lane in waits), key=Lane.turn)
            return most_urgent if most_urgent.rank < first.rank else first, 0.0
        return None, max(min((wait for wait, _ in waits), default=_IDLE_WAIT), 0.0001)

    def more_urgent(self, job: RunningJob, now: float) -> Lane | None:
        """The lane with the most urgent due batch that runs in this process and precedes the job."""
        mine, here = job.urgency[:2], [lane for lane in self if not lane.alone and not lane.own_process]
        due = [lane for lane in here if lane.urgency()[:2] < mine and lane.due(now, self._clock()) <= 0]
        return min(due, key=Lane.turn, default=None)

    def variants(self, least: Urgency | None = None) -> set[str]:
        """The variants with jobs, or with some at least as urgent."""
        return {lane.variant for lane in self if least is None or lane.urgency() <= least}

    def stints(self) -> Iterator[Stint[RunningJob]]:
        """The waiting batches in running order, with a safe bound of their seconds."""
        surely = {loaded.key: self._executor.track(loaded).surely for loaded in self._executor.all_loaded()}
        for lane in sorted(self, key=Lane.turn):
            for jobs, seconds in lane.batches():
                yield jobs, seconds * surely.get(lane.variant, math.inf)

    def renew(self) -> None:
        """Predict by the profiles of what is loaded now."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane}
        known = {loaded.key: loaded.known for loaded in self._executor.all_loaded()}
        for lane in self:
            lane.profile = known[lane.variant].profile if lane.variant in known else lane.profile

    def _lane(self, loaded: Loaded, bucket: int, job: RunningJob) -> Lane:
        key = key_of(job, bucket)
        if key not in self._lanes:
            most = most_rows(job.hardware, loaded.variant)
            policy = BatchPolicy(most, job.hardware.max_wait, job.hardware.runs_at_most)
            pace = partial(self._executor.pace, loaded.key)
            retargeted = job.hardware is not self._executor.hardware
            profile, own_process = loaded.known.profile, loaded.interruptible is not None
            self._lanes[key] = Lane(key, policy, profile, pace, retargeted=retargeted, own_process=own_process)
        return self._lanes[key]
