"""The jobs whose rows of one variant and size bucket wait on a device."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator

from tasks.catalogue import Profile
from workers import batcher
from workers.batcher import ALONE, BatchPolicy, Crowd
from workers.work import Job

Portions = list[tuple[Job, list[int]]]
"""Jobs with the indices of their rows that run together."""

Key = tuple[str, int, str, str]
"""A lane's: variant, size bucket, the job that is alone there, if it must be, and the hardware class."""

_ORDER = itertools.count()


class Lane:
    """Rows of a variant that can run together. The device thread alone changes it; any may read `rows`.

    Args:
        profile: predicts what a batch takes.
        lent: whether the worker only helps the class out.
    """

    def __init__(self, key: Key, policy: BatchPolicy, profile: Profile, *, lent: bool = False) -> None:
        self.key = key
        self.variant, self.bucket, self.alone, _ = key
        self.policy = policy
        self.lent = lent
        self.profile = profile
        self._urgent: list[tuple[float, float, int, Job]] = []
        self._line: deque[Job] = deque()
        self.rows = 0
        self._newest = 0.0
        self._together = 1
        self._answered = 0.0
        self._gap = ALONE
        self._waiting = False

    def __bool__(self) -> bool:
        return self.rows > 0

    def add(self, job: Job) -> None:
        """Let the job's rows of this bucket wait here. It has company if it came before all others were answered."""
        if job.arrived > self._newest:
            if self or job.arrived < self._answered:
                self._gap = batcher.met(self._gap, (job.arrived - self._newest) / self._together)
                self._waiting = False
            self._newest, self._together = job.arrived, 0
        self._together += 1
        heapq.heappush(self._urgent, (job.deadline, job.arrived, next(_ORDER), job))
        self._line.append(job)
        self.rows += len(job.waiting[self.bucket])

    def remove(self, job: Job) -> None:
        """Take the job's rows out."""
        self.rows -= len(job.waiting[self.bucket])
        job.waiting[self.bucket] = []

    def jobs(self) -> set[Job]:
        """The jobs that have rows here."""
        return {job for *_, job in self._urgent if job.waiting[self.bucket]}

    def due(self, now: float, clock: float) -> float:
        """Seconds until the lane's batch should run; 0 means now. `clock` is the store's time less this host's."""
        while not self._line[0].waiting[self.bucket]:
            self._line.popleft()
        rows = min(self.rows, self.policy.max_batch)
        run = self.profile.latency(rows, self.bucket)
        start_by = self.urgency()[0] - clock - run
        crowd = Crowd(self.rows, self._line[0].arrived, self._newest, start_by, run)
        wait = batcher.ready(crowd, now, self.policy, self._gap)
        self._waiting = self._waiting or wait > 0
        return wait

    def urgency(self) -> tuple[float, float, int]:
        """Sorts lanes, the one with the most urgent job first."""
        while not self._urgent[0][3].waiting[self.bucket]:
            heapq.heappop(self._urgent)
        return self._urgent[0][:3]

    def turn(self) -> tuple[bool, tuple[float, float, int]]:
        """Sorts lanes by whose batch runs first: the worker's own class before others, then by urgency."""
        return self.lent, self.urgency()

    def take(self, room: int) -> Portions:
        """The rows of the next batch, at most `room`, which then no longer wait."""
        room = min(room, self.policy.max_batch)
        if self._waiting:
            self._gap, self._waiting = batcher.missed(self._gap), False
        heads = self._heads(room)
        portions: Portions = []
        taken = batcher.cut([len(head[3].waiting[self.bucket]) for head in heads], room)
        for head, rows in zip(heads, taken, strict=True):
            job = head[3]
            waiting = job.waiting[self.bucket]
            portions.append((job, waiting[:rows]))
            job.waiting[self.bucket] = waiting[rows:]
            self.rows -= rows
            if rows < len(waiting):
                heapq.heappush(self._urgent, head)
        return portions

    def batches(self) -> Iterator[tuple[set[Job], float]]:
        """The jobs of each batch that is to come, and the seconds that its profile gives it."""
        rows = [head[3] for head in sorted(self._urgent) for _ in head[3].waiting[self.bucket]]
        for first in range(0, len(rows), self.policy.max_batch):
            batch = rows[first : first + self.policy.max_batch]
            yield set(batch), self.profile.latency(len(batch), self.bucket)

    def answered(self, now: float) -> None:
        """The batch that was taken has its answers."""
        self._answered = now

    def _heads(self, room: int) -> list[tuple[float, float, int, Job]]:
        """The most urgent jobs, as many as fill `room` rows, out of the heap."""
        heads, rows = [], 0
        while self._urgent and rows < room:
            head = heapq.heappop(self._urgent)
            waiting = len(head[3].waiting[self.bucket])
            if waiting:
                heads.append(head)
                rows += waiting
        return heads
