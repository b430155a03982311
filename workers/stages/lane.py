"""A lane: the waiting rows of one variant and size bucket on a device."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator

from tasks.models.catalogue import Profile
from taxiway.contract.keys import PATIENT
from workers.decide import batcher
from workers.decide.batcher import ALONE, BatchPolicy, WaitingRows
from workers.stages.job import Job

Portions = list[tuple[Job, list[int]]]
"""Jobs with the indices of their rows that run together."""

Key = tuple[str, int, str, str]
"""A lane's key: variant, size bucket, the suspect job that it is reserved for, if any, and the hardware class."""

_ORDER = itertools.count()


class Lane:
    """Rows of a variant that can run together. Only the device thread changes it; any thread may read `rows`.

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
        self._urgent: list[tuple[float, float, int, Job]] = []
        self._line: deque[Job] = deque()
        self.rows = 0
        self.patient = 0
        self._total = 0
        self._newest = 0.0
        self._together = 1
        self._answered = 0.0
        self._gap = ALONE
        self._waiting = False

    def __bool__(self) -> bool:
        return self.rows > 0

    def add(self, job: Job) -> None:
        """Add the job's rows of this bucket. The gap before them counts if earlier rows were still unanswered."""
        if job.arrived > self._newest:
            if self or job.arrived < self._answered:
                self._gap = batcher.observe_gap(self._gap, (job.arrived - self._newest) / self._together)
                self._waiting = False
            self._newest, self._together = job.arrived, 0
        self._together += 1
        heapq.heappush(self._urgent, (job.deadline, job.arrived, next(_ORDER), job))
        self._line.append(job)
        self._count(job, len(job.waiting[self.bucket]))
        self._total += sum(self._sizes(job))

    def remove(self, job: Job) -> None:
        """Remove the job's rows."""
        self._count(job, -len(job.waiting[self.bucket]))
        self._total -= sum(self._sizes(job))
        job.waiting[self.bucket] = []

    def jobs(self) -> set[Job]:
        """The jobs with rows here."""
        return {job for *_, job in self._urgent if job.waiting[self.bucket]}

    def due(self, now: float, clock: float) -> float:
        """Seconds until the lane's batch should run; 0 means now. `clock` is the store's time less this host's."""
        while not self._line[0].waiting[self.bucket]:
            self._line.popleft()
        rows = min(self.rows, self.policy.max_batch)
        run = self._takes(rows, rows * self._total / self.rows)
        start_by = self.urgency()[0] - clock - run
        waiting = WaitingRows(self.rows, self._line[0].arrived, self._newest, start_by, run)
        wait = batcher.ready(waiting, now, self.policy, self._gap)
        self._waiting = self._waiting or wait > 0
        return wait

    def urgency(self) -> tuple[float, float, int]:
        """Sort key of lanes, most urgent job first."""
        while not self._urgent[0][3].waiting[self.bucket]:
            heapq.heappop(self._urgent)
        return self._urgent[0][:3]

    def turn(self) -> tuple[bool, tuple[float, float, int]]:
        """Sort key of lanes for running: the worker's own class before others, then by urgency."""
        return self.retargeted, self.urgency()

    def take(self, room: int) -> Portions:
        """Take out the rows of the next batch, at most `room`."""
        room = min(room, self.policy.max_batch)
        if self._waiting:
            self._gap, self._waiting = batcher.widen_gap(self._gap), False
        heads = self._heads(room)
        sizes = [size for head in heads for size in self._sizes(head[3])]
        room = batcher.fill(sizes[:room], self.policy, self._takes)
        self._total -= sum(sizes[:room])
        portions: Portions = []
        for head in heads:
            job = head[3]
            waiting = job.waiting[self.bucket]
            rows = min(room, len(waiting))
            room -= rows
            if rows:
                self._count(job, -rows)
                portions.append((job, waiting[:rows]))
                job.waiting[self.bucket] = waiting[rows:]
            if rows < len(waiting):
                heapq.heappush(self._urgent, head)
        return portions

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

    def batches(self) -> Iterator[tuple[set[Job], float]]:
        """The jobs of each future batch, and its predicted seconds."""
        rows = [(head[3], size) for head in sorted(self._urgent) for size in self._sizes(head[3])]
        while rows:
            sizes = [size for _, size in rows[: self.policy.max_batch]]
            count = batcher.fill(sizes, self.policy, self._takes)
            batch, rows = rows[:count], rows[count:]
            yield {job for job, _ in batch}, self.profile.latency(count, sum(sizes[:count]) / count)

    def answered(self, now: float) -> None:
        """Note that the batch taken last has been answered."""
        self._answered = now

    def _count(self, job: Job, rows: int) -> None:
        self.rows += rows
        if job.ticket.level >= PATIENT:
            self.patient += rows

    def _sizes(self, job: Job) -> list[int]:
        """The sizes of the job's waiting rows here."""
        return [job.items[row].size for row in job.waiting[self.bucket]]

    def _takes(self, rows: int, total: float) -> float:
        return self._pace() * self.profile.latency(rows, total / rows)

    def _heads(self, room: int) -> list[tuple[float, float, int, Job]]:
        """Pop the most urgent jobs that fill `room` rows from the heap."""
        heads, rows = [], 0
        while self._urgent and rows < room:
            head = heapq.heappop(self._urgent)
            waiting = len(head[3].waiting[self.bucket])
            if waiting:
                heads.append(head)
                rows += waiting
        return heads
