"""The jobs whose rows of one variant and size bucket wait on a device."""

from __future__ import annotations

from workers import batcher
from workers.batcher import ALONE, BatchPolicy, Crowd, Portion, Share
from workers.work import Job

Portions = list[tuple[Job, list[int]]]
"""Jobs with the indices of their rows that run together."""


class Lane:
    """Rows that can run together, oldest job first. The device thread alone touches it."""

    def __init__(self, bucket: int, policy: BatchPolicy) -> None:
        self.bucket = bucket
        self.policy = policy
        self._jobs: dict[int, Job] = {}
        self._rows = 0
        self._newest = 0.0
        self._answered = 0.0
        self._gap = ALONE
        self._waiting = False

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        """Let the job's rows of this bucket wait here. It has company if it came before all others were answered."""
        if self._jobs or job.arrived < self._answered:
            self._gap = batcher.met(self._gap, max(0.0, job.arrived - self._newest))
            self._waiting = False
        self._newest = job.arrived
        self._jobs[id(job)] = job
        self._rows += len(job.waiting[self.bucket])

    def remove(self, job: Job) -> None:
        """Take the job's rows out."""
        if self._jobs.pop(id(job), None) is not None:
            self._rows -= len(job.waiting[self.bucket])

    def due(self, now: float) -> float:
        """Seconds until the lane's batch should run; 0 means now."""
        oldest = next(iter(self._jobs.values())).arrived
        wait = batcher.ready(Crowd(self._rows, oldest, self._newest), now, self.policy, self._gap)
        self._waiting = self._waiting or wait > 0
        return wait

    def urgency(self) -> tuple[float, float, int]:
        """Sorts lanes, the one with the most urgent job first."""
        return min(batcher.urgency(share) for share in self._shares())

    def take(self) -> Portions:
        """The rows of the next batch, which then no longer wait."""
        if self._waiting:
            self._gap, self._waiting = batcher.missed(self._gap), False
        return [(self._jobs[part.entry], self._cut(part)) for part in batcher.form(self._shares(), self.policy)]

    def answered(self, now: float) -> None:
        """The batch that was taken has its answers."""
        self._answered = now

    def _shares(self) -> list[Share]:
        return [
            Share(entry, len(job.waiting[self.bucket]), job.deadline, job.arrived) for entry, job in self._jobs.items()
        ]

    def _cut(self, portion: Portion) -> list[int]:
        job = self._jobs[portion.entry]
        rows = job.waiting[self.bucket]
        taken, job.waiting[self.bucket] = rows[: portion.rows], rows[portion.rows :]
        self._rows -= len(taken)
        if not job.waiting[self.bucket]:
            del self._jobs[portion.entry]
        return taken
