"""How much a worker takes from its queue before it runs: what waits here, claimed, cannot move to another device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from tasks.models.sizes import size_of_row
from tasks.topology import HardwareClass
from taxiway.contract.keys import PATIENT
from taxiway.errors import TaxiwayError
from workers.executor import Executor
from workers.pipelines import Row
from workers.stages.job import Job

AHEAD = 2
"""Batches that wait here, claimed and prepared, while one runs."""

AHEAD_FOR = 0.025
"""Seconds of work that may wait here where batches are short: one fetch then brings many."""


def ahead_of(hardware: HardwareClass) -> float:
    """Most seconds of patient work that a worker of the class takes from its queue before it runs."""
    return max(AHEAD * hardware.runs_at_most, 2 * AHEAD_FOR)


def patient_seconds(jobs: Iterable[Job], executor: Executor) -> float:
    """What those of the jobs take that nobody waits for, about."""
    return sum(_seconds(job, executor) for job in jobs if job.ticket.level >= PATIENT)


def _seconds(job: Job, executor: Executor) -> float:
    sizes = [item.size for item in job.items] or [_size(job, row) for row in job.rows]
    profile = executor.known(job.model, job.variant).profile
    return executor.pace(job.key) * profile.latency(len(sizes), sum(sizes) / len(sizes))


def _size(job: Job, row: Row) -> int:
    """The size of a row that is not prepared, as far as it tells it; what is wrong with it is said later."""
    with suppress(TaxiwayError, KeyError, TypeError, ValueError):
        return job.model.expected_size if job.model.size_unit == "tokens" else size_of_row(job.model, row)
    return job.model.expected_size
