"""How much a worker takes from its queue before it runs: what waits here, claimed, cannot move to another device."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.topology import HardwareClass
from taxiway.keys import PATIENT
from workers.executor import Executor
from workers.work import Job

AHEAD = 2
"""Batches that wait here, claimed and prepared, while one runs."""

AHEAD_FOR = 0.025
"""Seconds of work that may wait here where batches are short: one fetch then brings many."""


def ahead_of(hardware: HardwareClass) -> float:
    """Most seconds of patient work that a worker of the class takes from its queue before it runs."""
    return max(AHEAD * hardware.runs_at_most, 2 * AHEAD_FOR)


def patient_seconds(jobs: Iterable[Job], executor: Executor) -> float:
    """What those of the jobs take that nobody waits for, about; jobs that are not prepared yet do not count."""
    return sum(_seconds(job, executor) for job in jobs if job.ticket.level >= PATIENT)


def _seconds(job: Job, executor: Executor) -> float:
    loaded = executor.ready(job.model, job.variant)
    if loaded is None or not job.items:
        return 0.0
    size = sum(item.size for item in job.items) / len(job.items)
    return executor.pace(loaded.key) * loaded.known.profile.latency(len(job.items), size)
